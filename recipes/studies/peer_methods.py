"""What else brings a first token sooner, or a smaller cache, without training: each as a prefill, from its paper.

A prefill takes a stock causal model (of projections named as Llama's and Qwen2's, and no windows), a prompt's ids
(1, n) and the method's setting. It gives the logits (1, V) of the next token, the cache, the place of that token, and
its own FLOPs, counted as in `spts_compress.cost`, without what the method spends on scores. `extend` goes on from it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool1d, pad
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from spts_compress.cost import LayerShape

Prefilled = tuple[torch.Tensor, Any, int, float]


def begin(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """States (1, n, D) before the first layer, their positions (1, n), and an empty cache."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model.model.embed_tokens(ids), positions, DynamicCache(config=model.config)


def through(model: Any, layers: Sequence[Any], states: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
    """States (1, m, D) after some stock layers: in each, they attend to all that the cache holds there, which may be
    of another length in every layer, and causally to each other."""
    rotary, count = model.model.rotary_emb(states, position_ids=positions), states.shape[1]
    for layer in layers:
        held, mask = cache.get_seq_length(layer.self_attn.layer_idx), None
        if held and count > 1:
            mask = torch.ones(1, 1, count, held + count, dtype=torch.bool, device=states.device).tril(held)
        states = layer(states, position_embeddings=rotary, attention_mask=mask, past_key_values=cache)
    return states


def head(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits (m, V) after the last layer's states (1, m, D)."""
    return model.lm_head(model.model.norm(states))[0]


def extend(model: Any, cache: Any, ids: torch.Tensor, position: int) -> torch.Tensor:
    """Logits (m, V) of further tokens `ids` (1, m), the first of them at `position`."""
    states, positions, _ = begin(model, ids)
    return head(model, through(model, model.model.layers, states, positions + position, cache))


def keys_and_values(model: Any, layer: Any, states: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """What a layer would cache of states (1, m, D): both (1, heads, m, size)."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    shape = (*states.shape[:2], -1, attention.head_dim)
    key, value = (part(normed).view(shape).transpose(1, 2) for part in (attention.k_proj, attention.v_proj))
    return [apply_rotary_pos_emb(key, key, *model.model.rotary_emb(states, position_ids=positions))[0], value]


def products(model: Any, layer: Any, states: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> Any:
    """Products (heads, m, n) of the queries of states (1, m, D) before a layer and its keys (1, heads, n, size)."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    query = attention.q_proj(normed).view(*states.shape[:2], -1, attention.head_dim).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *model.model.rotary_emb(states, position_ids=positions))
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    return (query.float() @ keys.float().transpose(2, 3))[0] * attention.scaling


def attention(model: Any, layer: Any, before: torch.Tensor, positions: torch.Tensor, cache: Any, last: int) -> Any:
    """Attention (heads, last, n) of the `last` tokens, after a layer ran on states `before` (1, n, D)."""
    keys = cache.layers[layer.self_attn.layer_idx].keys
    found = products(model, layer, before[:, -last:], positions[:, -last:], keys)
    later = torch.ones(found.shape[1:], dtype=torch.bool, device=keys.device).triu(keys.shape[2] - found.shape[1] + 1)
    return torch.softmax(found.masked_fill(later, float("-inf")), dim=-1)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest scores, in order."""
    return scores.topk(min(count, len(scores))).indices.sort().values


def work(config: Any, attended: Sequence[float], fed: Sequence[float] | None = None) -> float:
    """FLOPs of a prefill whose layers run attention on `attended` tokens, and the feed-forward network on `fed` ones
    (by default the same)."""
    shapes = (LayerShape.of(config, layer) for layer in range(len(attended)))
    parts = zip(shapes, attended, fed or attended, strict=True)
    return sum(s.dense(count) - s.feed_forward(count) + s.feed_forward(network) for s, count, network in parts)


def plain(model: Any, ids: torch.Tensor) -> Prefilled:
    """The stock prefill."""
    states, positions, cache = begin(model, ids)
    states = through(model, model.model.layers, states, positions, cache)
    return (
        head(model, states[:, -1:]),
        cache,
        ids.shape[1],
        work(model.config, [ids.shape[1]] * len(model.model.layers)),
    )


def pop(model: Any, ids: torch.Tensor, skipped: int, last: int) -> Prefilled:
    """As POP (arXiv 2602.03295): in the last `skipped` layers only the `last` tokens run, and of the others keys and
    values are cached that are computed from the states they have."""
    states, positions, cache = begin(model, ids)
    layers, first = model.model.layers, len(model.model.layers) - skipped
    states = through(model, layers[:first], states, positions, cache)
    for layer in layers[first:]:
        found = keys_and_values(model, layer, states[:, :-last], positions[:, :-last])
        cache.update(*found, layer.self_attn.layer_idx)
    states = through(model, layers[first:], states[:, -last:], positions[:, -last:], cache)
    return head(model, states[:, -1:]), cache, ids.shape[1], pop_work(model.config, ids.shape[1], skipped, last)


def pop_work(config: Any, length: int, skipped: int, last: int) -> float:
    shape, layers = LayerShape.of(config), config.num_hidden_layers
    beside = 2.0 * (length - last) * (shape.key + shape.value + last * shape.pair)
    return skipped * beside + work(config, [length] * (layers - skipped) + [last] * skipped)


def gemfilter(model: Any, ids: torch.Tensor, layer: int, tokens: float) -> Prefilled:
    """GemFilter (arXiv 2409.17422): the layers before `layer` read the prompt; those `tokens` of it, a share, whose
    keys in this layer have the largest products with the last query, summed over heads, pooled over 5 neighbours, are
    the prompt of the whole model."""
    states, positions, cache = begin(model, ids)
    states = through(model, model.model.layers[:layer], states, positions, cache)
    chooser = model.model.layers[layer]
    keys, _ = keys_and_values(model, chooser, states, positions)
    scores = products(model, chooser, states[:, -1:], positions[:, -1:], keys).sum((0, 1))
    chosen = best(avg_pool1d(scores[None], 5, 1, 2)[0], round(tokens * len(scores)))
    return *plain(model, ids[:, chosen])[:3], gemfilter_work(model.config, ids.shape[1], layer, tokens)


def gemfilter_work(config: Any, length: int, layer: int, tokens: float) -> float:
    keys = 2.0 * length * LayerShape.of(config).key
    return keys + work(config, [length] * layer) + work(config, [tokens * length] * config.num_hidden_layers)


def fastkv(model: Any, ids: torch.Tensor, layer: int, tokens: float) -> Prefilled:
    """FastKV (arXiv 2502.01068): all layers to `layer` read the prompt; those `tokens` of it, a share, with the most
    attention of the last 8 queries in this layer, pooled over 7 neighbours, go on. What a layer reads is cached."""
    states, positions, cache = begin(model, ids)
    layers = model.model.layers
    before = through(model, layers[:layer], states, positions, cache)
    states = through(model, layers[layer : layer + 1], before, positions, cache)
    scores = attention(model, layers[layer], before, positions, cache, 8).mean((0, 1))
    scores = avg_pool1d(scores[None], 7, 1, 3)[0]
    scores[-8:] = float("inf")
    chosen = best(scores, round(tokens * len(scores)))
    states = through(model, layers[layer + 1 :], states[:, chosen], positions[:, chosen], cache)
    return head(model, states[:, -1:]), cache, len(scores), fastkv_work(model.config, len(scores), layer, tokens)


def fastkv_work(config: Any, length: int, layer: int, tokens: float) -> float:
    after = config.num_hidden_layers - layer - 1
    return work(config, [length] * (layer + 1) + [tokens * length] * after)


def drops(model: Any) -> range:
    """The layers where UniPrefill drops tokens: for 32 layers those of its own code, 7, 11, ... 27."""
    count = len(model.model.layers)
    return range(max(0, count // 4 - 1), count - 4, 4)


def uniprefill(model: Any, ids: torch.Tensor, mass: float) -> Prefilled:
    """UniPrefill's rule (arXiv 2605.06221): in every fourth layer, blocks of 64 tokens are sorted by the mean attention
    of the last 128 queries; those that hold the share `mass` of it go on, with the first and the last 128 tokens. They
    leave between the layer's attention and its feed-forward network."""
    states, positions, cache = begin(model, ids)
    for index, layer in enumerate(model.model.layers):
        count = states.shape[1]
        if index not in drops(model) or count <= 256:
            states = through(model, [layer], states, positions, cache)
            continue
        rotary = model.model.rotary_emb(states, position_ids=positions)
        added = layer.self_attn(
            layer.input_layernorm(states), position_embeddings=rotary, attention_mask=None, past_key_values=cache
        )[0]
        scores = attention(model, layer, states, positions, cache, 128).mean((0, 1))
        blocks = pad(scores, (0, -count % 64)).view(-1, 64).mean(1)
        ranked = blocks.sort(descending=True)
        kept = torch.zeros_like(blocks, dtype=torch.bool)
        kept[ranked.indices[(ranked.values / blocks.sum()).cumsum(0) <= mass]] = True
        kept[:2] = kept[-2:] = kept[ranked.indices[0]] = True
        chosen = kept.repeat_interleave(64)[:count].nonzero()[:, 0]
        states, positions = (states + added)[:, chosen], positions[:, chosen]
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    read = [held.keys.shape[2] for held in cache.layers]
    return head(model, states[:, -1:]), cache, ids.shape[1], work(model.config, read, [*read[1:], read[-1]])


def importance(draft: Any, ids: torch.Tensor, ahead: int = 8) -> torch.Tensor:
    """Speculative prefill's (arXiv 2502.02789) worth of a prompt's tokens, (n,): the attention of each of the next
    `ahead` tokens that the draft model writes, pooled over 13 neighbours, the largest of all heads of all layers; the
    mean over these tokens."""
    logits, cache, position, _ = plain(draft, ids)
    found = []
    for step in range(ahead):
        states, positions, _ = begin(draft, logits.argmax(-1)[None])
        positions, seen = positions + position + step, []
        for layer in draft.model.layers:
            before, states = states, through(draft, [layer], states, positions, cache)
            seen.append(attention(draft, layer, before, positions, cache, 1)[:, 0, : ids.shape[1]])
        found.append(avg_pool1d(torch.cat(seen), 13, 1, 6).amax(0))
        logits = head(draft, states)
    return torch.stack(found).mean(0)


Spans = Sequence[tuple[int, int]]


def carried(scores: torch.Tensor, spans: Spans, onto: Spans) -> torch.Tensor:
    """Scores of tokens at `spans` of a text's characters, as those of another tokenizer's tokens at `onto`: the mean
    over each one's characters."""
    letters = np.zeros(1 + max(end for _, end in (*spans, *onto)))
    for (start, end), score in zip(spans, scores.tolist(), strict=True):
        letters[start + 1 : end + 1] = score
    sums = letters.cumsum()
    return torch.tensor([(sums[end] - sums[start]) / max(1, end - start) for start, end in onto], device=scores.device)


def drafted(model: Any, ids: torch.Tensor, scores: torch.Tensor, tokens: float) -> Prefilled:
    """Speculative prefill: chunks of 32 tokens of the highest mean of `scores` (n,), about `tokens` of the prompt, a
    share, are all that the model reads, each at its own place; the last chunk is among them. The draft's FLOPs come on
    top."""
    states, positions, cache = begin(model, ids)
    count = ids.shape[1]
    means = pad(scores, (0, -count % 32)).view(-1, 32).mean(1)
    means[-1] = float("inf")
    kept = torch.zeros_like(means, dtype=torch.bool)
    kept[best(means, -(-round(tokens * count) // 32))] = True
    chosen = kept.repeat_interleave(32)[:count].nonzero()[:, 0]
    states = through(model, model.model.layers, states[:, chosen], positions[:, chosen], cache)
    return head(model, states[:, -1:]), cache, count, work(model.config, [len(chosen)] * len(model.model.layers))


def pressed(model: Any, ids: torch.Tensor, press: Any) -> Prefilled:
    """A stock prefill whose cache a kvpress press shortens layer by layer. kvpress 0.5 misses one thing in today's
    transformers, `cache_position`, which it is handed."""

    def hand_over(module: Any, args: Any, kwargs: dict) -> tuple[Any, dict]:
        return args, {**kwargs, "cache_position": torch.arange(ids.shape[1], device=ids.device)}

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        stack.enter_context(press(model))
        return plain(model, ids)


def solve(
    speedup: Callable[[float], float], target: float, low: float = 0.0, high: float = 1.0, steps: int = 20
) -> float:
    """The largest knob at which the speed-up, which falls with it, is at least the target; `low` if there is none."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if speedup(middle) >= target else (low, middle)
    return low
