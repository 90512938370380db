"""A stock decoder layer taken apart, so that it can run on some of the tokens: here is where families differ."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import SkippedCacheLayer
from .selection import FeedForwardProxy
from .static import StaticKeptLayer
from .update import QUERIES, UPDATES, LowRankUpdate

if TYPE_CHECKING:
    Stock = Any  # what is mixed into a stock class uses what is there
else:
    Stock = object

NORM_PIECE = 512  # tokens
FFN_PIECE = 2**22  # numbers between a feed-forward network's matrices
FULL, SLIDING = "full_attention", "sliding_attention"
MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def known(config: Any, name: str) -> Any:
    """A value of a config; None where it says what its family does not know, and ignores."""
    return getattr(config, name) if hasattr(type(config), name) else None


def layer_kinds(config: Any) -> list[str]:
    """Each layer's kind of attention, by the name that transformers has for it."""
    if kinds := known(config, "layer_types"):
        return kinds
    return [FULL if known(config, "sliding_window") is None else SLIDING] * config.num_hidden_layers


def layer_windows(config: Any) -> list[int | None]:
    """How many tokens back each layer's attention reaches, the own one counted; None: over the whole text."""
    return [config.sliding_window if kind == SLIDING else None for kind in layer_kinds(config)]


def position_tables(rotary: nn.Module, config: Any, states: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
    """Cosines and sines (B or 1, T, d) for each kind of attention, some of which have rotary positions of their own."""
    kinds = set(layer_kinds(config))
    if kinds <= set(config.rope_parameters):
        return {kind: rotary(states, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, rotary(states, position_ids))


def cos_sin_of(rotary: Any) -> tuple[torch.Tensor, ...]:
    """What a rotary embedding gives, (B or 1, T, ...) each, as a tuple: mostly cosines and sines."""
    return rotary if isinstance(rotary, tuple) else (rotary,)


@dataclass(frozen=True)
class Norms:
    """Names of a decoder layer's norms, by where they stand; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None


def split_heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    """(B, T, heads * d) as (B, heads, T, d), for heads of d = `size`."""
    return projected.view(*projected.shape[:2], -1, size).transpose(1, 2)


def watched(module: nn.Module) -> bool:
    """Whether calls of a module are seen by a hook, or do something else than its class says, as accelerate's, which
    bring its weights from where they are offloaded."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def modules_in(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, shared ones as often as they are there, in a fifth of the time of `module.modules()`."""
    left = [module]
    while left:
        yield (found := left.pop())
        left += filter(None, found._modules.values())


def is_plain(module: nn.Module) -> bool:
    """Whether a linear module is no more than its matrix: not quantised, offloaded, hooked, sharded or adapted."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not watched(module)


def in_pieces(module: Any, states: torch.Tensor, size: int) -> torch.Tensor:
    """`module(states)`, of a module that treats states (B, T, D) token by token: on a CPU `size` tokens at a time, so
    that what it makes on the way stays in the cache, with the same result up to rounding."""
    if states.shape[1] <= size or states.device.type != "cpu":
        return module(states)
    return torch.cat([module(piece) for piece in states.split(size, dim=1)], dim=1)


def rms_norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    """`norm(states)` for an RMS norm, which the stock module computes in many passes over memory: in one kernel on a
    GPU, and on a CPU in pieces."""
    if watched(norm):  # an offloaded weight, or a hook, which is to see all tokens
        return norm(states)
    # An adapter or mixed types need the module's own call.
    plain = hasattr(norm, "variance_epsilon") and type(norm).__module__.startswith("transformers.")
    plain = plain and (norm.weight.device, norm.weight.dtype) == (states.device, states.dtype)
    if plain and states.device.type != "cpu":
        return nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return in_pieces(norm, states, NORM_PIECE)


def activation_of(config: Any) -> str:
    """Name of the feed-forward network's activation function."""
    return getattr(config, "hidden_act", None) or config.hidden_activation


class StockLayer(Stock):
    """Mixed into a family's decoder layer: its steps one by one.

    `rotate_half` and `eager_attention` are the family's own functions, `norms` says which norms there are, `project`
    how queries, keys and values are made, and `rotate` how they get their positions; a family whose attention does so
    in another way overrides it. One that caches something else than keys and values overrides `keys`, `probes`,
    `queries`, `cached` and `keys_values`. `tables` says how many rotary tables there are. `by_heads` names a projection
    whose rows tensor parallelism may share among devices, head by head.
    """

    norms = Norms()
    tables = 2
    by_heads = "k_proj"
    rotate_half: Any
    eager_attention: Any

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries ("q"), keys ("k") or values ("v") of normed states (B, T, D), not rotated yet: (B, heads, T, d);
        normed head by head where attention has such a norm."""
        heads = split_heads(getattr(self.self_attn, f"{name}_proj")(states), self.self_attn.head_dim)
        norm = getattr(self.self_attn, f"{name}_norm", None)
        return heads if norm is None else norm(heads)

    def rotate(self, states: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Rotary positions for queries or keys (B, heads, T, d); cosines and sines (B or 1, T, d, or less than d: the
        rest of each head keeps its place)."""
        cos, sin = (table.unsqueeze(1) for table in cos_sin)
        turned, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
        turned = (turned * cos + type(self).rotate_half(turned) * sin).to(states.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def keys(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """What candidates are scored by, (B, G, T, d), from normed states (B, T, D) and their rotary tables."""
        return self.rotate(self.project("k", normed), *cos_sin)

    def probes(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, w, d) that score such keys."""
        return self.queries(normed, *cos_sin)

    def queries(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, M, d) from normed states (B, M, D) and their rotary tables."""
        return self.rotate(self.project("q", normed), *cos_sin)

    def cached(self, normed: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of tokens, mostly keys and values (B, G, K, d), from their normed states (B, K, D) and
        their `keys`."""
        return key, self.project("v", normed)

    def keys_values(self, *cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, M, .) that attention reads, from what the cache holds of the same tokens."""
        key, value = cached
        return key, value

    def head_groups(self) -> list[Any]:
        """Process groups among whose devices tensor parallelism shares the heads, the innermost first."""
        # A fused projection gives every device all heads.
        weight: Any = getattr(getattr(self.self_attn, self.by_heads, None), "weight", None)
        placements = reversed(list(enumerate(getattr(weight, "placements", ()))))
        return [weight.device_mesh.get_group(place) for place, placement in placements if placement.is_shard()]

    def shares_heads(self) -> bool:
        """Whether a device has some of the heads only."""
        return bool(self.head_groups())

    def all_heads(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, T) of all heads, of which a device may have some: all devices must choose the same tokens."""
        for group in self.head_groups():
            parts = [torch.empty_like(scores) for _ in range(group.size())]
            torch.distributed.all_gather(parts, scores.contiguous(), group=group)
            scores = torch.cat(parts, dim=1)
        return scores

    def attention_function(self, **options: Any) -> Any:
        """(queries, keys, values, mask) -> (outputs, ...), of the implementation set, with a caller's options."""
        attention, eager = self.self_attn, type(self).eager_attention
        function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        return partial(function, attention, dropout=0.0, scaling=attention.scaling, **options)

    def normed(self, place: str, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) after the norm at a place, see `Norms`; as they are if there is none."""
        name = getattr(self.norms, place)
        return states if name is None else rms_norm(getattr(self, name), states)

    def forward(self, hidden_states: torch.Tensor, *args: Any, in_steps: bool = False, **kwargs: Any) -> Any:
        """As stock; `in_steps`: see `whole`."""
        return (self.whole if in_steps else super().forward)(hidden_states, *args, **kwargs)

    def whole(self, states: torch.Tensor, **given: Any) -> torch.Tensor:
        """States (B, T, D) after the stock layer, step by step: its norms then are single kernels, see `rms_norm`."""
        attended = self.attended(self.normed("before_attention", states), **given)
        states = states + self.normed("after_attention", attended)
        del attended  # as large as the states, and done with
        return states + self.feed_forward(states)

    def attended(
        self, normed: torch.Tensor, attention_mask: Any, position_embeddings: Any, past_key_values: Any, **options: Any
    ) -> torch.Tensor:
        """What attention among all tokens makes of normed states (B, T, D)."""
        cos_sin = cos_sin_of(position_embeddings)
        held: tuple[torch.Tensor, ...] = self.cached(normed, self.keys(normed, *cos_sin))
        if past_key_values is not None:
            held = past_key_values.update(*held, self.self_attn.layer_idx)
        qkv = self.queries(normed, *cos_sin), *self.keys_values(*held)
        output = self.attention_function(**options)(*qkv, attention_mask)[0]
        return self.self_attn.o_proj(output.reshape(*output.shape[:2], -1))

    def feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        """What the feed-forward network adds to residual states (B, T, D)."""
        return self.transformed(self.normed("before_feed_forward", states))

    def transformed(self, normed: torch.Tensor) -> torch.Tensor:
        """The same from states (B, T, D) that are normed already."""
        size = normed.shape[1] if normed.is_cuda else self.ffn_piece()
        return self.normed("after_feed_forward", in_pieces(self.mlp, normed, size))

    def ffn_piece(self) -> int:
        """How many tokens a CPU's cache has room for within the feed-forward network; no bound for one that is more
        than its matrices, as of experts, or whose calls are seen."""
        parts = [part for name, part in self.mlp.named_children() if name.endswith("_proj")]
        if not parts or any(map(watched, self.mlp.modules())) or not all(map(is_plain, parts)):
            return sys.maxsize
        return max(1, FFN_PIECE // self.mlp.down_proj.in_features)


def add_fitted(layers: Any, config: Any, schedule: Any) -> None:
    """Gives the skipping ones of a decoder's `layers` what a schedule says was fitted for them, without its values."""
    for index, layer in enumerate(layers):
        if index >= schedule.start and schedule.proxy:
            size = schedule.proxy_of(index)
            shape = config.hidden_size, size.channels, size.rank
            layer.proxy = FeedForwardProxy(*shape, activation_of(config), config.rms_norm_eps)
        if index >= schedule.start and schedule.update:
            ranks = schedule.update_of(index)
            for name, rank in zip(UPDATES, (ranks.attention_rank, ranks.ffn_rank), strict=True):
                setattr(layer, name, LowRankUpdate(config.hidden_size, rank))
        if index >= schedule.start and schedule.probe.rank:
            setattr(layer, QUERIES, LowRankUpdate(config.hidden_size, schedule.probe.rank))


def layers_held(cache: Any) -> list[dict[str, Any]]:
    """What a prefill did, read from its cache, by layer: `candidates`, `active` (tokens of the prompt that attention
    ran on; of all the text where no layer skipped), `cached` (those held now, of which a window sees no more, and the
    tokens since), `bytes` of keys and values (of a static cache with its empty slots), and `positions` of the tokens
    that were cached if the call asked for them with `spts={"positions": True}`. In a padded batch the counts are the
    longest row's."""
    rows = []
    sources = [held.source if isinstance(held, StaticKeptLayer) else held for held in cache.layers]
    ours = [source if isinstance(source, SkippedCacheLayer) else None for source in sources]
    prompts = [own.prompt_length for own in ours if own and own.prompt_length]  # none after a reset
    for held, own in zip(cache.layers, ours, strict=True):
        skipped = own if own and own.prompt_length else None
        dense = min([own.tokens_seen() if own else int(held.get_seq_length()), *prompts])
        tensors = (held.keys, held.values) if held.is_initialized else ()
        slots = held.keys.shape[-2] if tensors else 0
        rows.append(
            {
                "candidates": skipped.candidates if skipped else dense,
                "active": skipped.active if skipped else dense,
                "cached": int(held.cumulative_length) if isinstance(held, StaticLayer) else slots,
                "bytes": sum(t.numel() * t.element_size() for t in tensors),
                "positions": skipped.positions if skipped else None,
            }
        )
    return rows


class SkippingPreTrainedModel(Stock):
    """Mixed into both model classes of a family: how what skipping adds is initialised where it has no weights."""

    skipped = staticmethod(layers_held)

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, FeedForwardProxy | LowRankUpdate):
            for parameter in module.parameters():
                init.normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the stock class; transformers reads it from a class's own file, and this family's experts are stock."""
        stock: Any = next(kind for kind in cls.__mro__ if kind.__module__.startswith("transformers.models."))
        return stock._can_set_experts_implementation()
