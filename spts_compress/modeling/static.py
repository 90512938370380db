"""Static caches: what a skipped prefill leaves, in buffers that keep their size and place, as compiled decoding needs
them. A pass of several tokens runs on dynamic layers, the single tokens after it on static ones. No part of the method.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from .cache import SkippedCacheLayer

STEP = 256  # slots: layers are as long as so many steps, so that decoding is not compiled anew for every prompt


class StaticKeptLayer(StaticLayer):
    """What a dynamic layer, the `source`, holds after a pass, and room for tokens that come one by one.

    What differs between prompts is in tensors, which a compiled step reads; a plain number would become a part of it.
    `valid`: which slots are not padding, (B, slots). `missing`: how many tokens of the text are not held. `group`:
    layers of a group hold equally many tokens of each row, so they share a mask. `window`, and `places`, where in the
    text the tokens of all slots are or will be, (B or 1, slots): None where attention reaches over the whole text.
    """

    keys: Any
    values: Any

    def __init__(self, source: Any, room: int, mask: torch.Tensor | None, group: int):
        """`mask` (B, tokens so far): which are not padding, None if all are."""
        self.source, self.held, self.group = source, source.keys.shape[-2], group
        self.window: Any = window_of(source)
        super().__init__(max_cache_len=-(-(self.held + room) // STEP) * STEP)
        rows, device = source.keys.shape[0], source.keys.device
        later = source.keys.new_empty(rows, self.max_cache_len - self.held, 0)  # stands for the tokens to come
        if isinstance(source, SkippedCacheLayer):
            valid = source.attention_mask(mask, later[:, :0])
            self.places = source.places(later)
            missing = source.tokens_seen() - self.held
        else:
            valid = None if mask is None else mask[:, mask.shape[1] - self.held :].to(device, torch.bool)
            self.places = None if self.window is None else torch.arange(self.max_cache_len, device=device)[None]
            missing = source.get_seq_length() - self.held
        # Made on the device: a number sent there would wait for the prefill, if that still runs.
        self.missing = torch.full((), missing, device=device)
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=device)
        self.valid = torch.ones(rows, self.max_cache_len, dtype=torch.bool, device=device)
        if valid is not None:
            self.valid[:, : self.held] = valid
        self.update(source.keys, source.values)
        source.keys = source.values = later[:, None, :0]
        for fixed in filter(torch.is_tensor, (self.valid, self.missing, self.places)):
            torch._dynamo.mark_static_address(fixed)  # or each step of a CUDA graph copies it

    def get_seq_length(self) -> Any:
        """Tokens of the text so far, a tensor."""
        return self.cumulative_length + self.missing

    def take_step(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Note in `valid` whether the next token is padding, as `mask` (B, tokens so far) may say, and tell which slots
        it sees, (B, slots)."""
        slot = self.cumulative_length[None]
        if mask is not None:
            self.valid.index_copy_(1, slot, mask[:, -1:].to(self.valid.device, torch.bool))
        seen = self.valid & (torch.arange(self.max_cache_len, device=slot.device) <= slot)
        if self.places is None:
            return seen
        return seen & (self.places > self.places.index_select(1, slot) - self.window)

    def released(self) -> Any:
        """The source, with what is held now."""
        source, count = self.source, int(self.cumulative_length)
        first = 0
        if isinstance(source, SkippedCacheLayer):
            source.generated += count - self.held
        elif isinstance(source, DynamicSlidingWindowLayer):
            source.cumulative_length += count - self.held
            first = max(0, count - source.sliding_window + 1)
        source.keys, source.values = self.keys[:, :, first:count], self.values[:, :, first:count]
        return source

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.source.reorder_cache(beam_idx)
        rows = beam_idx.to(self.valid.device)
        self.valid = self.valid.index_select(0, rows)
        if self.places is not None:
            self.places = self.places.expand(len(self.valid), -1).index_select(0, rows)

    def reset(self) -> None:
        raise ValueError("a static cache can't be reset after a skipped prefill: make a new one for the next prompt")


def window_of(held: Any) -> int | None:
    """How many tokens back attention to a dynamic layer reaches, the own one counted; None: over the whole text."""
    return getattr(held, "window", getattr(held, "sliding_window", None))


def is_static(cache: Any) -> bool:
    """Whether a cache's layers are such static ones."""
    return any(isinstance(held, StaticKeptLayer) for held in getattr(cache, "layers", ()))


def made_for(cache: Any, config: Any) -> int | None:
    """How many tokens a static cache of stock layers was made for; None if it does not tell, since layers that are all
    as short as their window hold any number."""
    longest = cache.get_max_length()
    windowed = all(isinstance(held, StaticSlidingWindowLayer) for held in cache.layers)
    return None if windowed and longest >= config.sliding_window else longest


@torch.compiler.disable
def check_room(cache: Any, config: Any, new: int) -> None:
    """Raises ValueError if a static cache of stock layers has no room for the `new` tokens of a later pass and those
    that `generate` says are to come: stock would fail among them or, where all layers have windows, forget others."""
    room, to_come = made_for(cache, config), vars(cache).get("to_come", 0)
    needed = int(cache.get_seq_length()) + new + max(0, to_come - 1)  # the last one does not run
    if room is not None and needed > room:
        raise ValueError(
            f"the static cache was made for {room} tokens, and this turn may need {needed}: make it with a larger "
            "max_cache_len, or leave the cache out"
        )


@torch.compiler.disable  # where someone compiles the prefill, too
def to_dynamic(cache: Any, config: Any, new: int = 0) -> None:
    """Give dynamic layers to a static cache that is empty, or that skipped. It will have room for as many tokens as
    `generate` says are to come after the `new` ones, or else as it was made for.

    Raises:
        ValueError: if it is offloaded, or made for too few tokens, or does not tell for how many.
    """
    seen, kept = int(cache.get_seq_length()) + new, is_static(cache)
    empty = isinstance(cache.layers[0], StaticLayer) and not kept
    if empty and cache.offloading:
        raise ValueError(
            "an offloaded static cache can't hold what skipping leaves; use cache_implementation='static' or "
            "'offloaded', or pass spts=False"
        )
    if (to_come := vars(cache).get("to_come")) is not None:
        cache.capacity = seen + to_come
    elif empty:
        cache.capacity = made_for(cache, config)
    if cache.capacity is None:
        raise ValueError(
            "all layers have windows, so the static cache does not tell how many tokens it was made for; make it with "
            "a max_cache_len below the window, or leave the loop to generate(past_key_values=...)"
        )
    if cache.capacity < seen:
        raise ValueError(
            f"the static cache was made for {cache.capacity} tokens and {seen} have come: make it with a larger "
            "max_cache_len, or leave it to generate(cache_implementation='static')"
        )
    if kept:
        cache.layers = [held.released() for held in cache.layers]
    elif empty:
        cache.layers = DynamicCache(config=config).layers


@torch.compiler.disable
def to_static(cache: Any, mask: torch.Tensor | None) -> None:
    """Put what the dynamic layers of a static cache hold into static ones, with room for as many tokens as it is to
    have. `mask` as in `StaticKeptLayer`."""
    seen = cache.get_seq_length()
    groups: dict[Any, int] = {}
    for index, held in enumerate(cache.layers):
        tokens = (getattr(held, "stage", None), held.keys.shape[-2]) if window_of(held) is None else index
        group = groups.setdefault(tokens, index)
        cache.layers[index] = StaticKeptLayer(held, cache.capacity - seen, mask, group)
