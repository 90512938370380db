"""How well a proxy ranks tokens, on tokens it was not fitted on."""

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from ..modeling.selection import FeedForwardProxy
from .ltp import FeedForward, Tokens, predict


def norms(proxy: FeedForwardProxy, ffn: FeedForward, tokens: Tokens) -> dict[str, torch.Tensor]:
    """For each of N tokens: the predicted norm of the network's output, the true one, the norm of its input, and the
    root mean square of the residual state; (N,) each."""
    return {
        "predicted": predict(proxy, tokens.unit),
        "true": tokens.log_norm.exp(),
        "input_norm": (tokens.unit * ffn.norm).norm(dim=-1),
        "rms": tokens.rms,
    }


def ranking(predicted: torch.Tensor, true: torch.Tensor, share: float) -> dict[str, float]:
    """Spearman correlation, and recall: the part of the true top `share` of tokens that the prediction puts there."""
    count = max(1, round(share * len(true)))
    top = set(true.topk(count).indices.tolist())
    hit = len(top & set(predicted.topk(count).indices.tolist()))
    return {"spearman": float(spearmanr(predicted.cpu(), true.cpu()).statistic), "recall": hit / count}


def fidelity(unit: dict[str, torch.Tensor], share: float, relative: bool) -> dict[str, dict[str, float]]:
    """A proxy's ranking, from `norms`, beside the free baseline: the norm of the feed-forward input. `relative`: of
    norms divided by the state's own."""
    scale = unit["rms"] if relative else torch.ones_like(unit["rms"])
    return {
        name: ranking(unit[key] / scale, unit["true"] / scale, share)
        for name, key in (("proxy", "predicted"), ("input_norm", "input_norm"))
    }


@torch.no_grad()
def on_skipped_states(model: Any, inputs: dict[str, torch.Tensor], relative: bool) -> dict[int, dict[str, float]]:
    """Each skipping layer's ranking of the candidates of one prompt (1, n) at its own budget, on the states that
    skipping really leaves there."""
    norms: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    layers = dict(enumerate(model.model.layers))
    handles = []

    def watch(number: int, layer: Any) -> None:
        def hook(proxy: nn.Module, args: tuple, predicted: torch.Tensor) -> None:
            states = args[0]
            parts = (layer.feed_forward(part) for part in states.split(1024, dim=1))
            true = torch.cat([part.float().norm(dim=-1)[0] for part in parts])
            if relative:
                true = true / states[0].float().square().mean(-1).sqrt()
            norms.setdefault(number, []).append((predicted[0], true))  # a proxy may be called piece by piece

        handles.append(layer.proxy.register_forward_hook(hook))

    try:
        for number, layer in layers.items():
            if hasattr(layer, "proxy"):
                watch(number, layer)
        model(**inputs, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    rankings, schedule = {}, model.config.schedule()
    for number, pieces in norms.items():
        counts = schedule.counts(number, inputs["input_ids"].shape[1])
        predicted, true = map(torch.cat, zip(*pieces, strict=True))
        rankings[number] = ranking(predicted, true, counts.ffn_tokens / counts.candidates_in)
    return rankings
