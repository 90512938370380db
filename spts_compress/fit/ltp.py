"""Proxies that predict the norm of a feed-forward network's output, made from its weights and calibration tokens.

What needs no gradient steps is here: channel pruning, truncated SVD, and a regression; `refine.py` goes on from that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cost import LayerShape
from ..modeling.configuration_spts import Proxy
from ..modeling.selection import FeedForwardProxy
from ..modeling.stock_layer import Norms, activation_of

CHANNELS_AT_ONCE = 1024  # bounds the saliencies held at a time to N x 1024 numbers
RATING_TOKENS = 4096  # channels are rated on that many tokens, evenly spread
PENALTIES = (1e-4, 1e-3, 1e-2)  # of the ridge regression, in units of each feature's variance


@dataclass(frozen=True)
class FeedForward:
    """A layer's gated feed-forward network after its RMS norm, in float32, acting on states of unit RMS.

    `gate` and `up` (D_ff, D) hold the norm's weight `norm` (D); `down` is (D, D_ff). Of experts there is none that all
    tokens share: D_ff is then 0, what they do to a token is only known from calibration, and `routed` is the number of
    channels that work on one token.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    eps: float
    activation: str
    routed: int = 0

    @property
    def width(self) -> int:
        """Channels that work on one token."""
        return self.routed or len(self.gate)

    @classmethod
    def of(cls, layer: nn.Module, config: Any, places: Norms | None = None) -> "FeedForward":
        """From a stock decoder layer. Without a norm before it, states are taken as if they had unit RMS."""
        mlp: Any = layer.mlp
        name = (places or Norms()).before_feed_forward
        scale, numbers = torch.ones(config.hidden_size), (config.rms_norm_eps, activation_of(config))
        if name is not None:  # what a norm multiplies by is its weight, or 1 more in some families
            norm = getattr(layer, name)
            scale = norm(scale.to(norm.weight.device)).detach()
        if hasattr(mlp, "experts"):
            none, number = scale.new_zeros(0, len(scale)), int(layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]
            routed = LayerShape.of(config, number).intermediate
            return cls(none, none, none.T, scale, *numbers, routed)
        down = mlp.down_proj.weight.detach().float()
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj.weight.detach().float().chunk(2)
        else:
            gate, up = mlp.gate_proj.weight.detach().float(), mlp.up_proj.weight.detach().float()
        scale = scale.to(gate)
        return cls(gate * scale, up * scale, down, scale, *numbers)

    def unit(self, states: torch.Tensor) -> torch.Tensor:
        """Residual states (N, D) divided by their root mean square, in float32."""
        states = states.float()
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class Tokens:
    """What one layer's feed-forward network does to N tokens.

    `unit` (N, D): the states before it, of unit RMS; `rms` (N,): what they were divided by; `log_norm` (N,):
    `log ||FFN(x)||`. All float32.
    """

    unit: torch.Tensor
    rms: torch.Tensor
    log_norm: torch.Tensor

    @classmethod
    def of(cls, ffn: FeedForward, states: torch.Tensor, norms: torch.Tensor) -> "Tokens":
        """From residual states (N, D) and the norms (N,) of the network's outputs for them."""
        rms = (states.float().square().mean(-1) + ffn.eps).sqrt()
        return cls(ffn.unit(states), rms, norms.float().clamp_min(1e-20).log())

    @classmethod
    def cat(cls, parts: "list[Tokens]") -> "Tokens":
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("unit", "rms", "log_norm")))

    def __getitem__(self, index: Any) -> "Tokens":
        return Tokens(self.unit[index], self.rms[index], self.log_norm[index])

    def __len__(self) -> int:
        return len(self.unit)


def channel_importance(ffn: FeedForward, act: nn.Module, unit: torch.Tensor, top: float) -> torch.Tensor:
    """Importance of each channel (D_ff): mean of the top fraction `top` of its saliencies
    `|act(x W_gate)_j * (x W_up)_j|` over the tokens `unit` (N, D)."""
    count = max(1, round(top * len(unit)))
    parts = zip(ffn.gate.split(CHANNELS_AT_ONCE), ffn.up.split(CHANNELS_AT_ONCE), strict=True)
    return torch.cat(
        [(act(unit @ gate.T) * (unit @ up.T)).abs().topk(count, dim=0).values.mean(dim=0) for gate, up in parts]
    )


def truncated_svd(
    matrix: torch.Tensor, rank: int, inputs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of `matrix` (m, n) by `left @ right`, (m, rank) and (rank, n).

    Without `inputs` the error is the Frobenius norm of the difference (Eckart and Young). With `inputs` (N, n) it is
    the mean squared error of what the matrix gives for them: directions count as much as the data uses them.
    """
    if inputs is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        spread, axes = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
        spread = spread.clamp_min(spread.max() * 1e-7).sqrt()
        left, values, right = torch.linalg.svd(matrix @ axes * spread, full_matrices=False)
        right = right / spread @ axes.T
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def ridge(
    unit: torch.Tensor, target: torch.Tensor, penalties: Sequence[float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ridge regression, in closed form, of a number a token, `target` (N,), on its state `u` of unit RMS, (N, D), and
    on `u * u`: for each penalty the weights of both, (D,) each, and the constant."""
    features = torch.cat([unit, unit.square()], dim=1)
    mean = features.mean(0)
    features -= mean
    gram, moment = features.T @ features, (features.T @ (target - target.mean())).double()
    variance = gram.diagonal().clamp_min(float(gram.diagonal().max()) * 1e-9 + 1e-12)
    for penalty in penalties:
        factor, failed = torch.linalg.cholesky_ex((gram + torch.diag(penalty * variance)).double())
        while failed:  # fewer tokens than features, or equal features
            penalty *= 10
            factor, failed = torch.linalg.cholesky_ex((gram + torch.diag(penalty * variance)).double())
        weights = torch.cholesky_solve(moment[:, None], factor)[:, 0].float()
        linear, square = weights.chunk(2)
        yield linear, square, target.mean() - mean @ weights


@torch.no_grad()
def predict(proxy: FeedForwardProxy, unit: torch.Tensor) -> torch.Tensor:
    """Predicted norms (N,) of states (N, D), a few at a time, in the proxy's own type."""
    parts = unit.to(proxy.down.dtype).split(4096)
    return torch.cat([proxy(part) for part in parts]).clamp_min(1e-20)


def log_error(proxy: FeedForwardProxy, tokens: Tokens) -> float:
    """Mean squared error of the predicted log norms."""
    return float((predict(proxy, tokens.unit).log() - tokens.log_norm).square().mean())


def most_important(ffn: FeedForward, tokens: Tokens, channels: int, top: float) -> torch.Tensor:
    """The `channels` most important channels, in order."""
    sample = tokens.unit[:: max(1, len(tokens) // RATING_TOKENS)]
    act = FeedForwardProxy(1, 1, 0, ffn.activation, ffn.eps).activation
    return channel_importance(ffn, act, sample, top).topk(channels).indices.sort().values


@torch.no_grad()
def blank(ffn: FeedForward, size: Proxy) -> FeedForwardProxy:
    """A proxy of that size, in float32, whose parameters are 0 but for the power, which is 1."""
    proxy = FeedForwardProxy(ffn.gate.shape[1], size.channels, size.rank, ffn.activation, ffn.eps)
    for parameter in proxy.parameters():
        parameter.zero_()
    proxy.constants[1] = 1
    return proxy.to(ffn.gate.device).eval()


@torch.no_grad()
def low_rank(
    ffn: FeedForward, channels: torch.Tensor, rank: int, inputs: torch.Tensor | None = None
) -> FeedForwardProxy:
    """The paper's proxy: the `channels` (D_low), their matrices of rank `rank` by truncated SVD; weighted by the
    states `inputs` (N, D) if they are given."""
    proxy = blank(ffn, Proxy(len(channels), rank))
    gate, gate_down = truncated_svd(ffn.gate[channels], rank, inputs)
    up, up_down = truncated_svd(ffn.up[channels], rank, inputs)
    proxy.gate.copy_(gate)
    proxy.up.copy_(up)
    proxy.down[:-1] = torch.cat([gate_down, up_down])
    return proxy


@torch.no_grad()
def centre(proxy: FeedForwardProxy, tokens: Tokens) -> None:
    """Set the constant so that the mean error of the log norm is 0."""
    proxy.constants[0] += (tokens.log_norm - predict(proxy, tokens.unit).log()).mean()


@torch.no_grad()
def fit_ridge(ffn: FeedForward, tokens: Tokens, check: Tokens) -> FeedForwardProxy:
    """The proxy of rank 0: ridge regression of the log norm, with the penalty that is best on `check`."""
    fitted = []
    for solved in ridge(tokens.unit, tokens.log_norm, PENALTIES):
        proxy = blank(ffn, Proxy(1, 0))
        proxy.down[-1], proxy.square[:], proxy.constants[0] = solved
        fitted.append(proxy)
    return min(fitted, key=lambda proxy: log_error(proxy, check))


@torch.no_grad()
def geometric_mean(low: FeedForwardProxy, regressed: FeedForwardProxy) -> None:
    """Make `low` the geometric mean of itself and the regression. The two err in different ways, most of all on text
    unlike the calibration's, so that the mean is better than either."""
    low.down[-1] = (low.down[-1] + regressed.down[-1]) / 2
    low.square[:] = (low.square + regressed.square) / 2
    low.constants[0] = (low.constants[0] + regressed.constants[0]) / 2
    low.constants[1] /= 2
