"""What feed-forward networks do on calibration text, layer by layer: the dense model, one layer at a time."""

from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .errors import UserError
from .store import Store

HIDDEN = "hidden"


@torch.no_grad()
def feed_forward(
    model: PreTrainedModel, sequences: list[torch.Tensor], layers: list[int], store: Store, key: str
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each of `layers` in turn: (layer, residual states in front of the feed-forward norm (N, D), norms of the
    feed-forward outputs (N,) in float32) for the N tokens of `sequences`.

    Only one layer's inputs and one hidden state a token are held. Hidden states in front of the layer being worked on
    are kept in `store`, so that a killed run goes on there.

    Raises:
        UserError: if the model's states are not finite.
    """
    decoder = model.model
    sizes = [len(s) for s in sequences]
    first = next((n for n in range(min(layers), 0, -1) if store.path(f"{HIDDEN}-{n}", key, ".safetensors").exists()), 0)
    kept = store.tensors(f"{HIDDEN}-{first}", key) if first else None
    if kept is None:
        first = 0
        states = torch.cat([decoder.embed_tokens(s.to(model.device)[None])[0] for s in sequences])
    else:
        states = kept["states"].to(model.device)
    rotary, masks = {}, {}
    for size in set(sizes):
        shape = states.new_empty(1, size, model.config.hidden_size)
        rotary[size] = decoder.rotary_emb(shape, position_ids=torch.arange(size, device=model.device)[None])
        masks[size] = create_causal_mask(model.config, shape, None, None)
    for number in tqdm(
        range(first, max(layers) + 1), desc="calibrating", unit="layer", initial=first, total=max(layers) + 1
    ):
        layer = decoder.layers[number]
        inputs: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        handles = [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, kept=inputs: kept.append(args[0][0])
            ),
            layer.mlp.register_forward_hook(
                lambda _, args, output, kept=norms: kept.append(
                    torch.linalg.vector_norm(output[0], dim=-1, dtype=torch.float32)
                )
            ),
        ]
        try:
            states = torch.cat(
                [
                    layer(part[None], attention_mask=masks[len(part)], position_embeddings=rotary[len(part)])[0]
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
        if number in layers:
            yield number, torch.cat(inputs), torch.cat(norms)
            store.put_tensors(f"{HIDDEN}-{number + 1}", key, {"states": states})
            store.drop(f"{HIDDEN}-{number}", key)
    store.drop(f"{HIDDEN}-{max(layers) + 1}", key)
