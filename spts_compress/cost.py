"""What a prefill costs by the FLOP count, and the tokens it caches, layer by layer.

A multiply-add counts as 2 FLOPs; causal attention counts half of the score matrix. Norms, activations and the
language-model head (one position) are left out.
"""

from dataclasses import dataclass
from typing import Any

from .modeling.configuration_spts import Proxy, Schedule
from .modeling.stock_layer import known, layer_windows


def has_experts(config: Any, layer: int | None = None) -> bool:
    """Whether the feed-forward network of a layer is a mixture of experts; the last layer's if none is named."""
    if known(config, "num_experts_per_tok") is None:
        return False
    layer = config.num_hidden_layers - 1 if layer is None else layer
    plain = getattr(config, "mlp_only_layers", None) or ()
    if layer < getattr(config, "first_k_dense_replace", 0) or layer in plain:
        return False
    return (layer + 1) % getattr(config, "decoder_sparse_step", 1) == 0


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    `hidden`: D. `intermediate`: D_ff, of all experts that work on one token together; `stored`: of all there are.
    `key`, `value`, `query`, `output`: weights of these projections. Of latent attention, `key` makes the latents and
    `expand` keys and values out of them. `pair`: multiply-adds of all heads for one query and one key, of scores and
    weighted values. `probed`: those for a probe's query and a candidate.
    """

    hidden: int
    intermediate: int
    stored: int = 0
    key: int = 0
    value: int = 0
    expand: int = 0
    query: int = 0
    output: int = 0
    pair: int = 0
    probed: int = 0

    @classmethod
    def of(cls, config: Any, layer: int | None = None) -> "LayerShape":
        """Of a layer, the last one if none is named."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = stored = config.intermediate_size
        if has_experts(config, layer):
            one = getattr(config, "moe_intermediate_size", None) or width
            shared = getattr(config, "n_shared_experts", 0)
            experts = getattr(config, "num_local_experts", None) or config.num_experts
            width, stored = one * (config.num_experts_per_tok + shared), one * (experts + shared)
        if latent := getattr(config, "kv_lora_rank", None):
            queries, size, rank = heads * config.qk_head_dim, config.v_head_dim, config.q_lora_rank
            cached = latent + config.qk_rope_head_dim
            return cls(
                hidden,
                width,
                stored,
                key=hidden * cached,
                expand=latent * heads * (config.qk_nope_head_dim + size),
                query=hidden * queries if rank is None else (hidden + queries) * rank,
                output=heads * size * hidden,
                pair=queries + heads * size,
                probed=heads * cached,
            )
        size = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        keys, queries = hidden * kv_heads * size, hidden * heads * size
        pair, probed = 2 * heads * size, heads * size
        return cls(hidden, width, stored, keys, keys, query=queries, output=queries, pair=pair, probed=probed)

    @property
    def weights(self) -> int:
        """All weights, but for a router's."""
        return self.key + self.value + self.expand + self.query + self.output + 3 * self.hidden * self.stored

    def attention(self, tokens: int, window: int | None = None) -> float:
        """FLOPs of causal attention among `tokens` tokens, each of which sees at most `window` of them: scores and
        weighted values."""
        reach = tokens if window is None else min(tokens, window)
        return 2.0 * self.pair * (tokens - reach / 2) * reach

    def feed_forward(self, tokens: int) -> float:
        return 6.0 * tokens * self.hidden * self.intermediate

    def proxy(self, size: Proxy) -> float:
        """FLOPs of a proxy for one token."""
        return 4.0 * size.rank * (self.hidden + size.channels) + 7.0 * self.hidden

    def update(self, rank: int) -> float:
        """FLOPs of an update for one token."""
        return 4.0 * rank * self.hidden

    def dense(self, tokens: int, window: int | None = None) -> float:
        """FLOPs of one stock layer."""
        projections = 2.0 * tokens * (self.key + self.value + self.expand + self.query + self.output)
        return projections + self.attention(tokens, window) + self.feed_forward(tokens)


def proxy_flop_fraction(hidden: int, intermediate: int, size: Proxy) -> float:
    """FLOPs of a proxy over those of the dense feed-forward network."""
    shape = LayerShape(hidden, intermediate)
    return shape.proxy(size) / shape.feed_forward(1)


def suitable_proxy(shape: LayerShape, max_fraction: float, channels: int | None, rank: int | None) -> Proxy:
    """The largest proxy that a layer needs, where `channels` or `rank` are not given: an eighth of the network's
    channels, at most 512; and up to 3/8 of that as its rank, as far as `max_fraction` of the dense FLOPs allows."""
    if channels is None:
        quarter = max(1, shape.intermediate // 4)
        channels = min(512, quarter, max(64, shape.intermediate // 8 // 64 * 64))
    if rank is None:
        one, free = shape.proxy(Proxy(channels, 1)), shape.proxy(Proxy(channels, 0))
        affordable = int((max_fraction * shape.feed_forward(1) - free) / (one - free))
        rank = max(0, min(affordable, 3 * channels // 8, shape.hidden))
        rank = rank // 16 * 16 or rank
    return Proxy(channels, rank)


def suitable_rank(shape: LayerShape) -> int:
    """The rank of an update that costs about a hundredth of a layer's dense feed-forward network."""
    rank = int(0.01 * shape.feed_forward(1) / shape.update(1))
    return max(1, rank // 16 * 16 or rank)


@dataclass(frozen=True)
class LayerCost:
    """One layer of one prefill: tokens (see `Counts`; `cached` are those that stay) and FLOPs by part. Where there is a
    window, active tokens are counted as if all inside one were neighbours: the most FLOPs there can be."""

    candidates_in: int
    active: int
    ffn_tokens: int
    candidates_out: int
    cached: int
    probing: float
    attention: float
    feed_forward: float
    update: float

    @property
    def total(self) -> float:
        return self.probing + self.attention + self.feed_forward + self.update


def layer_costs(config: Any, schedule: Schedule, length: int) -> list[LayerCost]:
    """Costs of all layers for a prompt of `length` tokens."""
    costs = []
    for layer, window in enumerate(layer_windows(config)):
        shape = LayerShape.of(config, layer)
        candidates_in, active, ffn_tokens, candidates_out, cached = schedule.counts(layer, length)
        probing = 0.0
        carries = schedule.probe.carries and layer >= schedule.start and schedule.skips(length)
        heads = schedule.probe.heads_of(layer)
        if heads and (min(active, ffn_tokens, candidates_out) < candidates_in or carries):
            share = 1.0 if isinstance(heads, str) else len(heads) / config.num_attention_heads
            probing += 2.0 * schedule.probe.window_size * candidates_in * shape.probed * share
            probing += schedule.probe.window_size * shape.update(schedule.probe.rank)
        if ffn_tokens < candidates_in and schedule.uses_proxies:
            probing += candidates_in * shape.proxy(schedule.proxy_of(layer))
        update = 0.0
        if schedule.update and layer >= schedule.start:
            ranks = schedule.update_of(layer)
            update += candidates_in * shape.update(ranks.attention_rank) if active < candidates_in else 0.0
            update += candidates_in * shape.update(ranks.ffn_rank) if ffn_tokens < candidates_in else 0.0
        projections = candidates_in * shape.key + cached * shape.value
        projections += active * (shape.expand + shape.query + shape.output)
        attention = 2.0 * projections + shape.attention(active, window)
        spare = schedule.always_last if layer >= schedule.start and schedule.skips(length) else 0
        cached = cached if window is None else min(cached, window - 1 + spare)
        tokens = candidates_in, active, ffn_tokens, candidates_out, cached
        costs.append(LayerCost(*tokens, probing, attention, shape.feed_forward(ffn_tokens), update))
    return costs


def predicted(config: Any, schedule: Schedule, length: int) -> dict[str, float]:
    """Dense over SPTS FLOPs, share of the KV cache kept, and share of probing in the SPTS prefill."""
    costs = layer_costs(config, schedule, length)
    windows = layer_windows(config)
    dense = sum(LayerShape.of(config, layer).dense(length, window) for layer, window in enumerate(windows))
    cached = sum(length if window is None else min(length, window - 1) for window in windows)
    total = sum(cost.total for cost in costs)
    return {
        "speedup": dense / total,
        "kv_share": sum(cost.cached for cost in costs) / cached,
        "probing_share": sum(cost.probing for cost in costs) / total,
    }
