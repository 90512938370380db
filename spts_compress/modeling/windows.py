"""Layers whose attention sees a window: it is measured in original positions, however many tokens in it are skipped."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask

from .cache import SkippedCacheLayer
from .decoding import Pass
from .layer_plan import LayerPlan
from .skipping import SkippingDecoderLayer, SkippingModel

WINDOW_PIECE = 256  # tokens, or half a window if that is more


def outside(places: torch.Tensor, asking: int, window: int | None) -> torch.Tensor | None:
    """Which tokens at `places` (B, T) are before the windows of the last `asking` ones, (B, asking, T)."""
    return None if window is None else places[:, -asking:, None] - places[:, None] >= window


def windowed(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    window: int,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention (B, M, H, d) of tokens at rising `places` (B, M), each of which sees those less than `window`
    before it: piece by piece, with the few keys that a piece can see, where a mask of all pairs would take more time
    and memory than the attention that it leaves."""
    made, size = [], max(WINDOW_PIECE, window // 2)
    for first in range(0, places.shape[1], size):
        seen = slice(max(0, first - window + 1), first + size)  # tokens are no nearer to each other than their numbers
        distance = places[:, first : first + size, None] - places[:, None, seen]
        unseen = (distance < 0) | (distance >= window)
        if valid is not None:
            unseen |= ~valid[:, None, seen]
        mask = torch.zeros_like(unseen, dtype=query.dtype).masked_fill_(unseen, torch.finfo(query.dtype).min)
        part = query[:, :, first : first + size], key[:, :, seen], value[:, :, seen], mask[:, None]
        made.append(attend(*part)[0])
    return torch.cat(made, dim=1)


class WindowCacheLayer(SkippedCacheLayer):
    """The same of a layer whose attention has a `window`: it holds no more tokens than that window, or one that begins
    `protected` tokens before, still sees; all of them while the past is recorded, as assisted decoding asks for."""

    def __init__(self, window: int, *counts: Any):
        super().__init__(*counts)
        self.window: int = window
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        full = super().update(key_states, value_states, *args, **kwargs)
        spare = self.get_seq_length() - (self.window - 1 + self.protected)
        if spare > 0 and not self.record_past:
            self.keys, self.values = (states[:, :, spare:].contiguous() for states in full)
            gone = min(spare, self.kept)
            self.kept -= gone
            self.valid = None if self.valid is None else self.valid[:, gone:]
        return full

    def crop(self, tokens_to_remove: int) -> None:
        held, was = self.get_seq_length(), self.cached + self.generated
        if held < was and held - abs(tokens_to_remove) < self.window - 1:
            raise ValueError(
                f"cannot crop {abs(tokens_to_remove)} tokens: the window before them is gone. Call the cache's "
                "activate_past_recording() before the prompt, or run the prompt again."
            )
        super().crop(tokens_to_remove)

    def places(self, states: torch.Tensor) -> torch.Tensor:
        new, held = states.shape[1], self.get_seq_length() - self.kept
        generated = torch.arange(self.generated - held, self.generated + new, device=states.device)
        places = (0 if self.ends is None else self.ends.to(states.device)) + generated.expand(states.shape[0], -1)
        if self.positions is not None and self.kept:  # none after a reset
            places = torch.cat([self.positions[:, -self.kept :].to(states.device), places], dim=1)
        return places

    def window_masks(
        self, attention_mask: torch.Tensor | None, states: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor] | None]:
        """As `attention_mask`, of what the first of the new `states` (B, new, D) sees through the window; and for
        `create_causal_mask`, if there are more, that the others see less."""
        new, places = states.shape[1], self.places(states)
        inside = places > places[:, places.shape[1] - new, None] - self.window
        seen = self.attention_mask(attention_mask, states)
        seen = inside if seen is None else seen & inside
        if new == 1:
            return seen, None
        return seen, lambda row, head, query, key: places[row, query] - places[row, key] < self.window


class WindowedDecoderLayer(SkippingDecoderLayer):
    """A skipping layer of a family with windows."""

    def unseen(self, slots: torch.Tensor, count: int, plan: LayerPlan) -> torch.Tensor | None:
        return plan.unseen(count) if plan.window is None else outside(slots, count, plan.window)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, slots: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        if plan.window is None:
            return super().attend(query, key, value, mask, slots, plan)
        function = self.attention_function(**plan.options)
        return windowed(function, query, key, value, slots, plan.window, plan.active.valid)


class WindowedModel(SkippingModel):
    """A decoder of a family with windows."""

    def _plans(self, schedule: Any, lengths: list[int], run: Pass) -> list[LayerPlan]:
        plans = super()._plans(schedule, lengths, run)
        if any(plan.window for plan in plans):
            self._check_attention()
        return plans

    def cache_layer(self, old: Any, window: int | None, *counts: Any) -> SkippedCacheLayer:
        if window is None:
            return super().cache_layer(old, window, *counts)
        made = WindowCacheLayer(window, *counts)
        if getattr(old, "record_past", False):
            made.activate_past_recording()
        return made

    def end_pass(self, cache: Any) -> None:
        for held in cache.layers:
            if isinstance(held, DynamicSlidingWindowLayer) and held.record_past:
                held.crop(0)  # as `generate` does after every pass: what is recorded is of one pass

    def later_mask(self, run: Pass, layer: int, states: torch.Tensor, kind: str, total: int, masks: dict) -> Any:
        held = run.cache.layers[layer]
        if not isinstance(held, WindowCacheLayer) or held.window >= total:
            return super().later_mask(run, layer, states, kind, total, masks)
        self._check_attention(alone=states.shape[1] == 1)
        # Such layers each hold other tokens, so none shares its mask.
        seen, less = held.window_masks(run.mask, states)
        return create_causal_mask(self.config, states, seen, run.cache, and_mask_function=less, layer_idx=layer)

    def _check_attention(self, alone: bool = False) -> None:
        """Raises ValueError if attention can't measure windows in original positions; a new token `alone` needs no
        more than a mask of padding."""
        if self.config._attn_implementation not in ("sdpa", "eager") and not alone:
            raise ValueError("skipping in layers with windows needs attn_implementation='sdpa' (or 'eager')")
