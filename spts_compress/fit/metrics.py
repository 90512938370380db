"""How well a proxy ranks tokens, on tokens it was not fitted on."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr

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

    def note(number: int, layer: Any, _: Any, args: tuple, predicted: torch.Tensor) -> None:
        parts = (layer.feed_forward(part) for part in args[0].split(1024, dim=1))
        true = torch.cat([part.float().norm(dim=-1)[0] for part in parts])
        if relative:
            true = true / args[0][0].float().square().mean(-1).sqrt()
        norms.setdefault(number, []).append((predicted[0], true))  # a proxy may be called piece by piece

    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer, "proxy"):
                hooks.enter_context(layer.proxy.register_forward_hook(partial(note, number, layer)))
        model(**inputs, logits_to_keep=1)
    rankings, schedule = {}, model.config.schedule()
    for number, pieces in norms.items():
        counts = schedule.counts(number, inputs["input_ids"].shape[1])
        predicted, true = map(torch.cat, zip(*pieces, strict=True))
        rankings[number] = ranking(predicted, true, counts.ffn_tokens / counts.candidates_in)
    return rankings
