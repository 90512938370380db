"""The proxies of all skipping layers: captured, fitted and kept, a layer at a time."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibrate import capture
from ..calibrate.data import Blocks
from ..modeling.configuration_spts import Proxy, Schedule
from ..modeling.stock_layer import Norms
from ..recipe import ProxySection
from ..utils.distributed import Ranks
from ..utils.errors import UserError
from ..utils.store import Store, as_tensor, fingerprint, from_tensor
from . import metrics
from .ltp import FeedForward, Tokens
from .size import choose

UNKNOWN_SHARE = 0.25  # that a proxy is chosen at whose layer runs on all of its candidates, so that any would do


def fit_proxies(
    model: PreTrainedModel,
    schedule: Schedule,
    section: ProxySection,
    sequences: Blocks,
    length: int,
    key: str,
    places: Norms,
    store: Store,
    ranks: Ranks,
) -> tuple[Schedule, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Fit what `store` does not have yet.

    Args:
        schedule: with the largest size of each layer's proxy.
        length: of a prompt whose budgets the proxies are to tell.
        key: fingerprint of all that decides what the model computes.
        places: where the norms of the decoder layers stand.

    Returns:
        The schedule with the sizes that were chosen, the parameters by their name in the exported model, and for each
        layer what was tried and the `norms` of tokens that nothing was fitted or chosen on, see `judged`.

    Raises:
        UserError: if a finished unit can't be read.
    """
    blocks, relative = sequences.fit + sequences.held_out, schedule.ffn_selection == "relative"
    layers, dtype = range(schedule.start, model.config.num_hidden_layers), model.dtype
    data_key = fingerprint(key, [block.tolist() for block in blocks])
    shares = {layer: _share(schedule, layer, length) for layer in layers}
    shares = {layer: share if share < 1 else UNKNOWN_SHARE for layer, share in shares.items()}
    full = {layer: schedule.proxy_of(layer) for layer in layers}
    options = section.model_dump(exclude={"channels", "rank"})
    own_key = fingerprint(data_key, sequences.sizes, options, relative)
    keys = {n: fingerprint(own_key, [full[n].channels, full[n].rank], n, shares[n]) for n in layers}
    missing = ranks.broadcast([layer for layer in layers if store.tensors(f"proxy-{layer}", keys[layer]) is None])
    fitted, held_out = sequences.sizes
    parts = [fitted, held_out // 2, held_out - held_out // 2]
    captured = capture.feed_forward(model, blocks, missing, store, data_key, ranks, places) if missing else ()
    for layer, states, norms in captured:
        ffn = FeedForward.of(model.model.layers[layer], model.config, places)
        tokens, check, judge = (
            Tokens.of(ffn, *part) for part in zip(states.split(parts), norms.split(parts), strict=True)
        )
        proxy, tried = choose(ffn, full[layer], tokens, check, section, shares[layer], relative)
        proxy.to(dtype)  # judged as it is exported
        kept = {f"judged.{name}": value for name, value in metrics.norms(proxy, ffn, judge).items()}
        made = {**proxy.state_dict(), **kept, "choice": as_tensor(tried)}
        store.put_tensors(f"proxy-{layer}", keys[layer], made)
    ranks.barrier()
    parameters: dict[str, torch.Tensor] = {}
    fits, sizes = [], []
    for layer in layers:
        unit = store.tensors(f"proxy-{layer}", keys[layer])
        if unit is None:
            raise UserError(f"{store.root}: the proxy of layer {layer} can't be read; run again to fit it anew")
        tried = from_tensor(unit.pop("choice"))
        kept = {name.removeprefix("judged."): unit.pop(name) for name in list(unit) if name.startswith("judged.")}
        fits.append({"layer": layer, "norms": kept, **tried})
        chosen = tried["candidates"][tried["chosen"]]
        sizes.append(Proxy(max(1, chosen["channels"]), chosen["rank"]))
        parameters |= {f"model.layers.{layer}.proxy.{name}": value for name, value in unit.items()}
    return replace(schedule, proxy=tuple(sizes)), parameters, fits


def judged(fits: list[dict[str, Any]], schedule: Schedule, length: int) -> list[dict[str, Any]]:
    """Of the layers that skip by `schedule`, in place of the norms the `share` of its candidates that the feed-forward
    network runs on in a prompt of `length` tokens, and how well the proxy, and the norm of the input, rank at it."""
    relative, rows = schedule.ffn_selection == "relative", []
    for fit in (fit for fit in fits if fit["layer"] >= schedule.start):
        row = {name: value for name, value in fit.items() if name != "norms"}
        if schedule.proxy:
            share = _share(schedule, fit["layer"], length)
            row |= {"share": share, **metrics.fidelity(fit["norms"], share, relative)}
        rows.append(row)
    return rows


def _share(schedule: Schedule, layer: int, length: int) -> float:
    """The part of its candidates that a layer's feed-forward network runs on, whatever `min_length` is."""
    counts = replace(schedule, min_length=0).counts(layer, length)
    return counts.ffn_tokens / counts.candidates_in
