"""What a prefill costs, counted: floating-point operations and cached tokens, layer by layer.

A multiply-add counts as 2 operations; causal attention counts half of the score matrix. Norms, activations and the
language-model head (one position) are left out.
"""

from dataclasses import dataclass
from typing import Any

from .modeling.configuration_spts import Proxy, Schedule
from .modeling.spts import layer_windows


def has_experts(config: Any) -> bool:
    """Whether feed-forward networks are mixtures of experts."""
    return getattr(config, "num_experts_per_tok", None) is not None


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer: D, D_ff (of the experts that work on one token, together), H, G and d."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "LayerShape":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = config.intermediate_size
        if has_experts(config):
            width = config.num_experts_per_tok * (getattr(config, "moe_intermediate_size", None) or width)
        return cls(config.hidden_size, width, config.num_attention_heads, kv_heads, head_dim)

    def project(self, tokens: int, heads: int) -> float:
        """Operations of a projection between the hidden size and `heads` heads."""
        return 2.0 * tokens * self.hidden * heads * self.head_dim

    def attention(self, tokens: int, window: int | None = None) -> float:
        """Operations of causal attention among `tokens` tokens, each of which sees at most `window` of them: scores and
        weighted values."""
        reach = tokens if window is None else min(tokens, window)
        return 4.0 * self.heads * self.head_dim * (tokens - reach / 2) * reach

    def feed_forward(self, tokens: int) -> float:
        return 6.0 * tokens * self.hidden * self.intermediate

    def proxy(self, size: Proxy) -> float:
        """Operations of a proxy, a token."""
        return 4.0 * size.rank * (self.hidden + size.channels) + 5.0 * self.hidden

    def dense(self, tokens: int, window: int | None = None) -> float:
        """Operations of one stock layer."""
        projections = 2 * self.project(tokens, self.heads) + 2 * self.project(tokens, self.kv_heads)
        return projections + self.attention(tokens, window) + self.feed_forward(tokens)


def proxy_share(hidden: int, intermediate: int, size: Proxy) -> float:
    """Operations of a proxy as a share of the dense feed-forward network's."""
    shape = LayerShape(hidden, intermediate, 0, 0, 0)
    return shape.proxy(size) / shape.feed_forward(1)


@dataclass(frozen=True)
class LayerCost:
    """One layer of one prefill: tokens (see `Counts`; `cached` of the active ones) and operations by part. Where there
    is a window, active tokens are counted as if all inside one were neighbours: the most operations there can be."""

    entering: int
    active: int
    changed: int
    leaving: int
    cached: int
    probing: float
    attention: float
    feed_forward: float

    @property
    def total(self) -> float:
        return self.probing + self.attention + self.feed_forward


def layer_costs(config: Any, schedule: Schedule, length: int) -> list[LayerCost]:
    """Costs of all layers for a prompt of `length` tokens."""
    shape = LayerShape.of(config)
    costs = []
    for layer, window in enumerate(layer_windows(config)):
        entering, active, changed, leaving = schedule.counts(layer, length)
        probing = 0.0
        carries = schedule.probe.carry > 0 and layer >= schedule.start and schedule.skips(length)
        if min(active, changed, leaving) < entering or carries:
            probing += 2.0 * schedule.probe.queries * entering * shape.heads * shape.head_dim
        if changed < entering and schedule.feed_forward in ("proxy", "relative"):
            probing += entering * shape.proxy(schedule.proxy_of(layer))
        attention = (
            shape.project(entering, shape.kv_heads)
            + shape.project(active, shape.kv_heads)
            + 2 * shape.project(active, shape.heads)
            + shape.attention(active, window)
        )
        spare = schedule.always_last if layer >= schedule.start and schedule.skips(length) else 0
        cached = active if window is None else min(active, window - 1 + spare)
        tokens = entering, active, changed, leaving, cached
        costs.append(LayerCost(*tokens, probing, attention, shape.feed_forward(changed)))
    return costs


def predicted(config: Any, schedule: Schedule, length: int) -> dict[str, float]:
    """Dense over SPTS operations, share of the KV cache kept, and share of probing in the SPTS prefill."""
    costs = layer_costs(config, schedule, length)
    windows = layer_windows(config)
    dense = sum(LayerShape.of(config).dense(length, window) for window in windows)
    cached = sum(length if window is None else min(length, window - 1) for window in windows)
    total = sum(cost.total for cost in costs)
    return {
        "speedup": dense / total,
        "kv_share": sum(cost.cached for cost in costs) / cached,
        "probing_share": sum(cost.probing for cost in costs) / total,
    }
