"""How well a proxy ranks tokens, on tokens it was not fitted on."""

import torch
from scipy.stats import spearmanr
from torch import nn

from .modeling.spts import FeedForwardProxy
from .proxies import FeedForward


@torch.no_grad()
def true_norms(ffn: FeedForward, act: nn.Module, unit: torch.Tensor) -> torch.Tensor:
    """`||FFN(x)||` of tokens of unit RMS (N, D), (N,)."""
    parts = unit.split(1024)
    return torch.cat([((act(p @ ffn.gate.T) * (p @ ffn.up.T)) @ ffn.down.T).norm(dim=-1) for p in parts])


@torch.no_grad()
def norms(proxy: FeedForwardProxy, ffn: FeedForward, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three norms for each residual state (N, D): the proxy's prediction, of the network's output, of its input."""
    unit = ffn.unit(states)
    return {
        "predicted": proxy(states.float()),
        "true": true_norms(ffn, proxy.activation, unit),
        "input_norm": (unit * ffn.norm).norm(dim=-1),
    }


def ranking(predicted: torch.Tensor, true: torch.Tensor, share: float) -> dict[str, float]:
    """Spearman correlation, and recall: the part of the true top `share` of tokens that the prediction puts there."""
    count = max(1, round(share * len(true)))
    top = set(true.topk(count).indices.tolist())
    hit = len(top & set(predicted.topk(count).indices.tolist()))
    return {"spearman": float(spearmanr(predicted.numpy(), true.numpy()).statistic), "recall": hit / count}


def of(unit: dict[str, torch.Tensor], share: float) -> dict:
    """A proxy's ranking, from `norms`, beside the free baseline: the norm of the feed-forward input."""
    made = {
        name: ranking(unit[key], unit["true"], share)
        for name, key in (("proxy", "predicted"), ("input_norm", "input_norm"))
    }
    return {"share": share, **made}
