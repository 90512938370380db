"""Which layers rank tokens well: how much of the attention that the answer will pay goes to a layer's own top ones."""

import copy
from functools import partial
from typing import Any

import torch

from ..evaluation.runner import encode
from ..modeling.configuration_spts import Probe
from ..modeling.spts import layer_windows, outside, pool_scores, probe_scores, tables_of
from .shared import Dense

SHARE = 0.25  # of the prompt's tokens
EDGE = 4  # first tokens, which take attention whatever they say


@torch.no_grad()
def reliability(whole: Any, tokenizer: Any, prompt: Dense, probe: Probe) -> list[float]:
    """For every layer: of the attention that the tokens of the dense answer pay to the prompt there (mean over heads;
    but to its first 4 tokens and to those that probe), the share that falls on the quarter of the prompt which the
    layer's probe ranks highest, without scores of layers before. From a dense pass."""
    ids = encode(tokenizer, [prompt.item.text], whole.device)["input_ids"]
    length, found, handles = ids.shape[1], list[float](), []
    ids = torch.cat([ids, prompt.answer.to(ids.device)[None]], dim=1)
    skipping = whole.model.layers[-1]  # layers in front of the first skipping one are stock ones
    places, windows = torch.arange(ids.shape[1], device=ids.device)[None], layer_windows(whole.config)

    def note(layer: Any, attention: Any, args: Any, kwargs: dict) -> None:
        normed = args[0] if args else kwargs["hidden_states"]
        tables, made = tables_of(kwargs["position_embeddings"]), copy.copy(skipping)
        made._modules = layer._modules  # a stock layer's, with a skipping one's methods

        def queries(first: int, last: int) -> torch.Tensor:
            return made.probes(normed[:, first:last], *(table[:, first:last] for table in tables))

        key, asking, window = made.keys(normed, *tables), min(probe.queries, length), windows[len(found)]
        query = queries(length - asking, length)
        unseen = outside(places[:, :length], asking, window)
        raw = probe_scores(query, key[:, :, :length], attention.scaling, probe.heads, unseen=unseen)
        score = pool_scores(raw, probe.pool)
        unseen = outside(places, ids.shape[1] - length, window)
        truth = probe_scores(queries(length, ids.shape[1]), key, attention.scaling, unseen=unseen)
        middle = slice(EDGE, length - asking)
        score, truth = score[0, middle], truth[0, middle]
        top = score.topk(max(1, round(SHARE * len(score)))).indices
        found.append(float(truth[top].sum() / truth.sum().clamp_min(1e-9)))  # a window may hide all of it

    try:
        for layer in whole.model.layers:
            handles.append(layer.self_attn.register_forward_pre_hook(partial(note, layer), with_kwargs=True))
        whole(ids, spts=False, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
