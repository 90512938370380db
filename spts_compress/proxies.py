"""Proxies that predict the norm of a feed-forward network's output, fitted from its weights and calibration states."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .modeling.spts import FeedForwardProxy

CHANNELS_AT_ONCE = 1024  # bounds the saliencies held at a time to N x 1024 numbers


@dataclass(frozen=True)
class FeedForward:
    """A layer's gated feed-forward network behind its RMS norm, in float32, acting on states of unit RMS.

    `gate` and `up` (D_ff, D) hold the norm's weight `norm` (D); `down` is (D, D_ff).
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    eps: float
    activation: str

    @classmethod
    def of(cls, layer: nn.Module, config: Any) -> "FeedForward":
        """From a stock decoder layer."""
        mlp: Any = layer.mlp
        gate, up, down = (getattr(mlp, f"{part}_proj").weight.detach().float() for part in ("gate", "up", "down"))
        norm = layer.post_attention_layernorm.weight.detach().float()  # type: ignore[union-attr, operator]
        return cls(gate * norm, up * norm, down, norm, config.rms_norm_eps, config.hidden_act)

    def unit(self, states: torch.Tensor) -> torch.Tensor:
        """Residual states (N, D) divided by their root mean square, in float32."""
        states = states.float()
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)


def channel_importance(ffn: FeedForward, act: nn.Module, unit: torch.Tensor, top: float) -> torch.Tensor:
    """Importance of each channel (D_ff): mean of the top fraction `top` of its saliencies
    `|act(x W_gate)_j * (x W_up)_j|` over the tokens `unit` (N, D)."""
    count = max(1, round(top * len(unit)))
    parts = zip(ffn.gate.split(CHANNELS_AT_ONCE), ffn.up.split(CHANNELS_AT_ONCE), strict=True)
    return torch.cat(
        [(act(unit @ gate.T) * (unit @ up.T)).abs().topk(count, dim=0).values.mean(dim=0) for gate, up in parts]
    )


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of `matrix` (m, n) by `left @ right`, (m, rank) and (rank, n) (Eckart and Young)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def fit(ffn: FeedForward, states: torch.Tensor, channels: int, rank: int, top: float) -> FeedForwardProxy:
    """Channel pruning, then low rank: the proxy of one layer, in float32.

    Args:
        ffn: the layer's feed-forward network.
        states: residual states in front of it on calibration text, (N, D).
        channels: D_low.
        rank: r, at most D and D_low.
        top: rho, the fraction of most salient tokens that rates a channel.
    """
    proxy = FeedForwardProxy(ffn.gate.shape[1], channels, rank, ffn.activation, ffn.eps)
    importance = channel_importance(ffn, proxy.activation, ffn.unit(states), top)
    kept = importance.topk(channels).indices.sort().values
    gate, gate_down = truncated_svd(ffn.gate[kept], rank)
    up, up_down = truncated_svd(ffn.up[kept], rank)
    with torch.no_grad():
        for parameter, value in ((proxy.gate, gate), (proxy.up, up), (proxy.down, torch.cat([gate_down, up_down]))):
            parameter.copy_(value)
    return proxy.eval()
