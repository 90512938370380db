"""What feed-forward networks do on calibration text, layer by layer: the dense model, one layer at a time."""

from collections.abc import Iterator

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
    places: Norms | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each of `layers` in turn: (layer, residual states in front of the feed-forward network and its norm (N, D),
    norms of what it adds to them (N,) in float32) for the N tokens of `sequences`.

    Only one layer's inputs and one hidden state a token are held. Hidden states in front of the layer being worked on
    are kept in `store`, so that a killed run goes on there. Of several processes each runs its share of the sequences,
    and gets every so manieth of the layers, for which the others' shares are sent to it.

    Raises:
        UserError: if the model's states are not finite, or there are more processes than sequences.
    """
    decoder, places = model.model, places or Norms()
    if len(sequences) < ranks.size:
        raise UserError(f"{ranks.size} processes for {len(sequences)} calibration sequences: start fewer")
    share = ranks.mine(sequences)
    sizes = [len(s) for s in share]
    if ranks.size > 1:
        key = f"{key}-{ranks.rank}of{ranks.size}"
    first = next((n for n in range(min(layers), 0, -1) if store.path(f"{HIDDEN}-{n}", key, ".safetensors").exists()), 0)
    if len(set(ranks.all([first]))) > 1:
        first = 0
    kept = store.tensors(f"{HIDDEN}-{first}", key) if first else None
    if kept is None:
        first = 0
        states = torch.cat([decoder.embed_tokens(s.to(model.device)[None])[0] for s in share])
    else:
        states = kept["states"].to(model.device)
    kinds, rotary, masks = layer_kinds(model.config), {}, {}
    for size in set(sizes):
        shape = states.new_empty(1, size, model.config.hidden_size)
        positions = torch.arange(size, device=model.device)[None]
        rotary[size] = position_tables(decoder.rotary_emb, model.config, shape, positions)
        masks[size] = {kind: MASKS[kind](model.config, shape, None, None) for kind in set(kinds)}
    held: tuple[int, torch.Tensor, torch.Tensor] | None = None
    saved = first
    for number in tqdm(
        range(first, max(layers) + 1), desc="calibrating", unit="layer", initial=first, total=max(layers) + 1
    ):
        layer, kind = decoder.layers[number], kinds[number]
        inputs: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        handles = [
            getattr(layer, places.before_feed_forward or "mlp").register_forward_pre_hook(
                lambda _, args, kept=inputs: kept.append(args[0][0])
            ),
            getattr(layer, places.after_feed_forward or "mlp").register_forward_hook(
                lambda _, args, output, kept=norms: kept.append(
                    torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32)
                )
            ),
        ]
        try:
            states = torch.cat(
                [
                    layer(
                        part[None],
                        attention_mask=masks[len(part)][kind],
                        position_embeddings=rotary[len(part)][kind],
                    )[0]
                    for part in states.split(sizes)
                ]
            )
        finally:
            for handle in handles:
                handle.remove()
        if not torch.isfinite(states).all():
            raise UserError(
                f"layer {number}: the model's states are not finite on the calibration text; check its weights"
            )
        if number not in layers:
            continue
        owner = layers.index(number) % ranks.size
        if ranks.size > 1:  # each may have a device of its own
            inputs, norms = [part.cpu() for part in inputs], [part.cpu() for part in norms]
        if (made := ranks.to(owner, list(zip(inputs, norms, strict=True)))) is not None:
            captured, norm = (torch.cat(parts).to(model.device) for parts in zip(*made, strict=True))
            held = number, captured, norm
        if owner == ranks.size - 1 or number == max(layers):  # each has one layer, or there are no more
            if held is not None:
                yield held
            held = None
            store.put_tensors(f"{HIDDEN}-{number + 1}", key, {"states": states})
            store.drop(f"{HIDDEN}-{saved}", key)
            saved = number + 1
    store.drop(f"{HIDDEN}-{saved}", key)
