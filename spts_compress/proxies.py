"""Proxies that predict the norm of a feed-forward network's output, fitted from its weights and calibration inputs."""

from dataclasses import dataclass

import torch
from torch import nn

from .modeling.spts import FeedForwardProxy

CHANNELS_AT_ONCE = 1024  # bounds the saliencies held at a time to N x 1024 numbers


@dataclass(frozen=True)
class FeedForward:
    """A gated feed-forward network's weights in float32: `gate` and `up` (D_ff, D), `down` (D, D_ff)."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    activation: str

    @classmethod
    def of(cls, mlp: nn.Module, activation: str) -> "FeedForward":
        gate, up, down = (getattr(mlp, f"{part}_proj").weight.detach().float() for part in ("gate", "up", "down"))
        return cls(gate, up, down, activation)


def channel_importance(ffn: FeedForward, act: nn.Module, inputs: torch.Tensor, top: float) -> torch.Tensor:
    """Importance of each channel (D_ff): mean of the top fraction `top` of its saliencies
    `|act(x W_gate)_j * (x W_up)_j|` over the tokens `inputs` (N, D)."""
    count = max(1, round(top * len(inputs)))
    inputs = inputs.float()
    parts = zip(ffn.gate.split(CHANNELS_AT_ONCE), ffn.up.split(CHANNELS_AT_ONCE), strict=True)
    return torch.cat(
        [(act(inputs @ gate.T) * (inputs @ up.T)).abs().topk(count, dim=0).values.mean(dim=0) for gate, up in parts]
    )


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of `matrix` (m, n) by `left @ right`, (m, rank) and (rank, n) (Eckart and Young)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def fit(ffn: FeedForward, inputs: torch.Tensor, channels: int, rank: int, top: float) -> FeedForwardProxy:
    """Channel pruning, then low rank: the proxy of one layer, in float32.

    Args:
        ffn: the layer's feed-forward network.
        inputs: its inputs on calibration text, (N, D).
        channels: D_low, clipped to D_ff.
        rank: r, clipped to D and D_low.
        top: rho, the fraction of most salient tokens that rates a channel.
    """
    proxy = FeedForwardProxy(ffn.gate.shape[1], channels, rank, ffn.activation)
    kept = channel_importance(ffn, proxy.activation, inputs, top).topk(channels).indices.sort().values
    gate, gate_down = truncated_svd(ffn.gate[kept], rank)
    up, up_down = truncated_svd(ffn.up[kept], rank)
    with torch.no_grad():
        for parameter, value in ((proxy.gate, gate), (proxy.up, up), (proxy.down, torch.cat([gate_down, up_down]))):
            parameter.copy_(value)
    return proxy.eval()
