"""Which layers and heads rank tokens well, told from a dense pass over a prompt and the dense model's own answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..modeling.configuration_spts import Probe
from ..modeling.selection import pool_scores, probe_scores, reduce_heads, select
from ..modeling.stock_layer import cos_sin_of, layer_windows
from ..modeling.windows import outside
from ..tasks.runner import encode
from .dense_reference import Dense

SHARE = 0.25  # of the prompt's tokens that a layer ranks highest
HEAD_SHARE = 0.1  # that a head does
FINDING = Probe(window_size=64, kernel_size=95)  # what heads are judged with
EDGE = 4  # first tokens, which take attention whatever they say


@dataclass(frozen=True)
class Attention:
    """One layer's attention in a dense pass over T tokens, as probing takes it: `key` (1, G, T, d) in float32 and, from
    the places `first` to `last`, `queries(first, last)` (1, H, last - first, d)."""

    key: torch.Tensor
    queries: Callable[[int, int], torch.Tensor]
    scaling: float
    window: int | None

    def scores(self, first: int, last: int) -> torch.Tensor:
        """Mean attention (H, T') that each head's tokens from `first` to `last` pay to all T' up to the last one."""
        places = torch.arange(last, device=self.key.device)[None]
        hidden = outside(places, last - first, self.window)
        return probe_scores(self.queries(first, last), self.key[:, :, :last], self.scaling, hidden=hidden)[0]


@torch.no_grad()
def each_layer(whole: Any, ids: torch.Tensor, note: Callable[[int, Attention], None]) -> None:
    """Run `ids` (1, T) through the dense model, and have every layer noted by its number."""
    windows = layer_windows(whole.config)

    def watch(number: int, attention: Any, args: Any, kwargs: dict) -> None:
        normed, layer = args[0] if args else kwargs["hidden_states"], whole.model.layers[number]
        cos_sin = cos_sin_of(kwargs["position_embeddings"])

        def queries(first: int, last: int) -> torch.Tensor:
            return layer.probes(normed[:, first:last], *(table[:, first:last] for table in cos_sin))

        key = layer.keys(normed, *cos_sin).float()  # once, as scores are told from it again and again
        note(number, Attention(key, queries, attention.scaling, windows[number]))

    handles = []
    try:
        for number, layer in enumerate(whole.model.layers):
            handles.append(layer.self_attn.register_forward_pre_hook(partial(watch, number), with_kwargs=True))
        whole(ids, spts=False, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def found_by(raw: torch.Tensor, probe: Probe, truth: torch.Tensor, middle: slice, share: float) -> float:
    """How much of `truth` (T,) in the `middle` of the tokens falls on the `share` of them that scores `raw` (T,),
    pooled, rank highest."""
    score, truth = pool_scores(raw[None], probe.kernel_size)[:, middle], truth[middle]
    top = select(score, raw[None, middle], max(1, round(share * len(truth))))[0]
    return float(truth[top].sum() / truth.sum().clamp_min(1e-9))  # a window may hide all of it


def _tokens(whole: Any, tokenizer: Any, prompt: Dense, probe: Probe) -> tuple[torch.Tensor, int, int]:
    """Prompt and answer (1, T), where the prompt's last queries begin, and where it ends."""
    ids = encode(tokenizer, [prompt.item.text], whole.device)["input_ids"]
    length = ids.shape[1]
    return torch.cat([ids, prompt.answer.to(ids.device)[None]], dim=1), length - min(probe.window_size, length), length


def reliability(whole: Any, tokenizer: Any, prompt: Dense, probe: Probe) -> list[float]:
    """For every layer: of the attention that the tokens of the dense answer pay to the prompt there (mean over heads;
    but to its first 4 tokens and to those that probe), the share that falls on the quarter of the prompt which the
    layer's probe ranks highest, without scores of layers before; a layer none of whose heads is chosen goes by their
    mean. From a dense pass."""
    ids, asking, length = _tokens(whole, tokenizer, prompt, probe)
    found = list[float]()

    def note(number: int, attention: Attention) -> None:
        raw = reduce_heads(attention.scores(asking, length)[None], probe.heads_of(number) or "mean")[0]
        truth = attention.scores(length, ids.shape[1]).mean(dim=0)
        found.append(found_by(raw, probe, truth, slice(EDGE, asking), SHARE))

    each_layer(whole, ids, note)
    return found


def retrieval_heads(whole: Any, tokenizer: Any, prompt: Dense) -> list[list[float]]:
    """For every layer and head: of what the dense answer copies from the prompt, the share that falls on the tenth of
    the prompt which this head alone, probing with 64 queries pooled over 95, ranks highest.

    What is copied: the attention that the model pays, over all layers and heads, while it predicts a token of the
    answer, to the same token in the prompt; heads that do this are the retrieval heads of arXiv 2404.15574. From a
    dense pass.
    """
    ids, asking, length = _tokens(whole, tokenizer, prompt, FINDING)
    copied, scores = ids.new_zeros(length, dtype=torch.float32), list[torch.Tensor]()

    def note(number: int, attention: Attention) -> None:
        for end in range(length, ids.shape[1]):  # the token before it predicts the one there
            copied.add_(attention.scores(end - 1, end).mean(dim=0)[:length] * (ids[0, :length] == ids[0, end]))
        scores.append(attention.scores(asking, length))

    each_layer(whole, ids, note)
    return [[found_by(raw, FINDING, copied, slice(EDGE, asking), HEAD_SHARE) for raw in layer] for layer in scores]
