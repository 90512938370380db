"""What feed-forward networks do on calibration text, layer by layer: the dense model, one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..modeling.stock_layer import MASKS, Norms, layer_kinds, position_tables
from ..utils.distributed import Ranks
from ..utils.errors import UserError
from ..utils.store import Store

HIDDEN = "hidden"


@torch.no_grad()
def feed_forward(
    model: PreTrainedModel,
    sequences: list[torch.Tensor],
    layers: list[int],
    store: Store,
    key: str,
    ranks: Ranks,
    norms: Norms | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each of `layers` in turn: (layer, residual states before the feed-forward network and its norm (N, D),
    norms of what it adds to them (N,) in float32) for the N tokens of `sequences`.

    Only one layer's inputs and one hidden state a token are held. Hidden states before the layer being worked on are
    kept in `store`, so that a killed run goes on there. Of `ranks.size` processes each runs its share of the sequences,
    and gets every `ranks.size`-th of the layers, for which the others' shares are sent to it.

    Raises:
        UserError: if the model's states are not finite, or there are more processes than sequences.
    """
    if len(sequences) < ranks.size:
        raise UserError(f"{ranks.size} processes for {len(sequences)} calibration sequences: start fewer")
    if ranks.size > 1:
        key = f"{key}-{ranks.rank}of{ranks.size}"
    own = ranks.shard(sequences)
    first, states = _resumed(model, own, min(layers), store, key, ranks)
    arguments = {size: layer_arguments(model, size) for size in {len(s) for s in own}}
    captured: tuple[int, torch.Tensor, torch.Tensor] | None = None
    last, stored = max(layers), first
    for number in tqdm(range(first, last + 1), desc="calibrating", unit="layer", initial=first, total=last + 1):
        layer, parts = model.model.layers[number], states.split([len(s) for s in own])
        with _hooks(layer, norms or Norms()) as (inputs, sizes):
            states = torch.cat([layer(part[None], **arguments[len(part)][number])[0] for part in parts])
        if not torch.isfinite(states).all():
            raise UserError(
                f"layer {number}: the model's states are not finite on the calibration text; check its weights"
            )
        if number not in layers:
            continue
        owner = layers.index(number) % ranks.size
        if ranks.size > 1:  # each may have a device of its own
            inputs, sizes = [part.cpu() for part in inputs], [part.cpu() for part in sizes]
        if (gathered := ranks.gather(list(zip(inputs, sizes, strict=True)), owner)) is not None:
            before, added = (torch.cat(parts).to(model.device) for parts in zip(*gathered, strict=True))
            captured = number, before, added
        if owner == ranks.size - 1 or number == last:  # each has one layer, or there are no more
            if captured is not None:
                yield captured
            captured = None
            store.put_tensors(f"{HIDDEN}-{number + 1}", key, {"states": states})
            store.drop(f"{HIDDEN}-{stored}", key)
            stored = number + 1
    store.drop(f"{HIDDEN}-{stored}", key)


def _resumed(
    model: Any, sequences: list[torch.Tensor], latest: int, store: Store, key: str, ranks: Ranks
) -> tuple[int, torch.Tensor]:
    """The layer to go on with, at most `latest` and the same for all processes, and the hidden states before it."""
    numbers = (n for n in range(latest, 0, -1) if store.path(f"{HIDDEN}-{n}", key, ".safetensors").exists())
    first = next(numbers, 0)
    unit = store.tensors(f"{HIDDEN}-{first}", key) if first else None
    if len(set(ranks.all_gather([first if unit else 0]))) == 1 and unit:
        return first, unit["states"].to(model.device)
    return 0, torch.cat([model.model.embed_tokens(s.to(model.device)[None])[0] for s in sequences])


def layer_arguments(model: Any, size: int) -> list[dict[str, Any]]:
    """What each stock layer is called with beside the states (B, `size`, D) of sequences of `size` tokens."""
    kinds = layer_kinds(model.config)
    shape = torch.empty(1, size, model.config.hidden_size, dtype=model.dtype, device=model.device)
    positions = torch.arange(size, device=model.device)[None]
    rotary = position_tables(model.model.rotary_emb, model.config, shape, positions)
    masks = {kind: MASKS[kind](model.config, shape, None, None) for kind in set(kinds)}
    return [{"attention_mask": masks[k], "position_embeddings": rotary[k]} for k in kinds]


@contextmanager
def _hooks(layer: torch.nn.Module, norms: Norms) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Collects what comes to a layer's feed-forward network, and the norms of what that adds."""
    inputs: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []

    def size(_: Any, __: Any, output: torch.Tensor) -> None:
        sizes.append(torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32))

    before, after = (getattr(layer, name or "mlp") for name in (norms.before_feed_forward, norms.after_feed_forward))
    with before.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])), after.register_forward_hook(size):
        yield inputs, sizes
