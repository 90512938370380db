"""Which layers and heads rank tokens well, told from a dense pass over a prompt and the dense model's own answer."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..modeling.configuration_spts import Probe
from ..modeling.layer_plan import heads_of
from ..modeling.selection import pool_scores, probe_scores, ranked, reduce_heads, select
from ..modeling.stock_layer import cos_sin_of, layer_windows
from ..modeling.windows import outside
from ..tasks.runner import encode
from .dense_reference import DenseReference

SHARE = 0.25  # of the prompt's tokens that a layer ranks highest
HEAD_SHARE = 0.1  # that a head does
FINDING = Probe(window_size=64, kernel_size=95)  # what heads are judged with
EDGE = 4  # first tokens, which take attention whatever they say

# Mean attention (H, T') that each head's tokens from the first to before the last position pay to all T' before it.
Attention = Callable[[int, int], torch.Tensor]


@torch.no_grad()
def each_layer(model: Any, ids: torch.Tensor, note: Callable[[int, Attention], None]) -> None:
    """Run `ids` (1, T) through the dense model, and have every layer's attention noted by its number."""
    windows = layer_windows(model.config)

    def watch(number: int, attention: Any, args: Any, kwargs: dict) -> None:
        normed, layer = args[0] if args else kwargs["hidden_states"], model.model.layers[number]
        cos_sin = cos_sin_of(kwargs["position_embeddings"])
        key = layer.keys(normed, *cos_sin).float()  # once, as scores are told from it again and again

        def scores(first: int, last: int) -> torch.Tensor:
            query = layer.probes(normed[:, first:last], *(table[:, first:last] for table in cos_sin))
            unseen = outside(torch.arange(last, device=key.device)[None], last - first, windows[number])
            return probe_scores(query, key[:, :, :last], attention.scaling, unseen=unseen)[0]

        note(number, scores)

    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            hook = partial(watch, number)
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        model(ids, spts=False, logits_to_keep=1, use_cache=False)


def found_by(raw: torch.Tensor, probe: Probe, truth: torch.Tensor, middle: slice, share: float) -> float:
    """How much of `truth` (T,) in the `middle` of the tokens falls on the `share` of them that scores `raw` (T,),
    pooled, rank highest."""
    score, truth = pool_scores(raw[None], probe.kernel_size)[:, middle], truth[middle]
    top = select(ranked(score, raw[None, middle]), max(1, round(share * len(truth))))[0]
    return float(truth[top].sum() / truth.sum().clamp_min(1e-9))  # a window may hide all of it


def _tokens(model: Any, tokenizer: Any, reference: DenseReference, probe: Probe) -> tuple[torch.Tensor, int, int]:
    """Prompt and answer (1, T), where the prompt's last queries begin, and where it ends."""
    ids = encode(tokenizer, [reference.item.text], model.device)["input_ids"]
    length = ids.shape[1]
    whole = torch.cat([ids, reference.answer.to(ids.device)[None]], dim=1)
    return whole, length - min(probe.window_size, length), length


def reliability(model: Any, tokenizer: Any, probe: Probe, reference: DenseReference) -> list[float]:
    """For every layer: of the attention that the tokens of the dense answer pay to the prompt there (mean over heads;
    but to its first 4 tokens and to those that probe), the share that falls on the quarter of the prompt which the
    layer's probe ranks highest, without scores of layers before; a layer none of whose heads is chosen goes by their
    mean. From a dense pass."""
    ids, first, length = _tokens(model, tokenizer, reference, probe)
    heads, shares = heads_of(probe, range(len(model.model.layers)), model.device), list[float]()

    def note(number: int, attention: Attention) -> None:
        raw = reduce_heads(attention(first, length)[None], "mean" if heads[number] is None else heads[number])[0]
        truth = attention(length, ids.shape[1]).mean(dim=0)
        shares.append(found_by(raw, probe, truth, slice(EDGE, first), SHARE))

    each_layer(model, ids, note)
    return shares


def retrieval_heads(model: Any, tokenizer: Any, reference: DenseReference) -> list[list[float]]:
    """For every layer and head: of what the dense answer copies from the prompt, the share that falls on the tenth of
    the prompt which this head alone, probing with 64 queries pooled over 95, ranks highest.

    What is copied: the attention that the model pays, over all layers and heads, while it predicts a token of the
    answer, to the same token in the prompt; heads that do this are the retrieval heads of arXiv 2404.15574. From a
    dense pass.
    """
    ids, first, length = _tokens(model, tokenizer, reference, FINDING)
    copied, scores = ids.new_zeros(length, dtype=torch.float32), list[torch.Tensor]()

    def note(number: int, attention: Attention) -> None:
        for end in range(length, ids.shape[1]):  # the token before it predicts the one there
            copied.add_(attention(end - 1, end).mean(dim=0)[:length] * (ids[0, :length] == ids[0, end]))
        scores.append(attention(first, length))

    each_layer(model, ids, note)
    return [[found_by(raw, FINDING, copied, slice(EDGE, first), HEAD_SHARE) for raw in layer] for layer in scores]
