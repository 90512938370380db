"""Bookkeeping of a prefill: a schedule's counts as slots of the rows of a batch, and the caches that hold as many."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache import SkippedCacheLayer, fill_layers
from .configuration_spts import Counts
from .decoding import Pass, StockRuns
from .profiling import part
from .selection import ranked, select
from .stock_layer import layer_windows


@dataclass(frozen=True, eq=False)
class Count:
    """How many tokens of each row: `width` slots, and where rows differ `rows` (B, 1) and which slots are used."""

    width: int
    rows: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @classmethod
    def of(cls, counts: tuple[int, ...], device: torch.device) -> "Count":
        width = max(counts)
        if min(counts) == width:
            return cls(width)
        rows = torch.tensor(counts, device=device)[:, None]
        return cls(width, rows, torch.arange(width, device=device) >= width - rows)

    def to(self, device: Any) -> "Count":
        if self.rows is None or self.valid is None:
            return self
        return Count(self.width, self.rows.to(device), self.valid.to(device))


@dataclass(frozen=True)
class LayerPlan:
    """What one skipping layer does: its counts of tokens, as in the schedule's `Counts`; equal ones are one object.
    `heads`: how the layer's are reduced, or the numbers of those that score (H'), or None if none does. `window`: of
    attention, where it is shorter than the longest prompt. `options`: what the caller gave for attention."""

    candidates_in: Count
    active: Count
    ffn_tokens: Count
    candidates_out: Count
    cached: Count
    schedule: Any
    heads: Any
    window: int | None
    options: dict[str, Any]

    def counts(self) -> dict[str, Count]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Count)}

    @property
    def ranks(self) -> bool:
        """Whether candidates are scored: for a choice here, or (in every row of a batch alike) for later layers."""
        chooses = any(count is not self.candidates_in for count in self.counts().values())
        return self.schedule.probe.carries or chooses

    def to(self, device: Any, **_: Any) -> "LayerPlan":
        """The plan on a device; accelerate calls this where layers are on several."""
        moved = {id(count): count.to(device) for count in self.counts().values()}  # equal ones stay one object
        changes: dict[str, Any] = {name: moved[id(count)] for name, count in self.counts().items()}
        given = {"heads": self.heads, **self.options}
        given = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in given.items()}
        changes |= dict(heads=given.pop("heads"), options=given)
        return replace(self, **changes)

    @property
    def weighs(self) -> bool:
        """Whether the feed-forward network's tokens are chosen by a score of their own."""
        return self.schedule.uses_proxies and self.ffn_tokens is not self.candidates_in

    def last(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Those of the last `count` candidates, of (B or 1, T, ...)."""
        return states[:, -count:]

    def unseen(self, count: int) -> torch.Tensor | None:
        """Which candidates the last `count` ones do not see, (1, count, T); None: only later ones among themselves."""
        return None

    def order(self, score: torch.Tensor | None, tie: torch.Tensor | None, *counts: Count) -> torch.Tensor | None:
        """The candidates (B, T) from the lowest score to the highest, those with equal ones by `tie`, the always active
        ones last; None if none of the `counts` is a choice."""
        if score is None or tie is None or all(count is self.candidates_in for count in counts):
            return None
        with part("selecting"):
            return self.ranked(score, tie)

    def ranked(self, score: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
        """The order where there is a choice."""
        always = self.schedule.sink_tokens, self.schedule.always_last
        return ranked(score, tie, *always, self.candidates_in.rows, self.candidates_in.valid)

    def choose(self, count: Count, order: torch.Tensor | None) -> torch.Tensor | None:
        """Indices (B, `count`) of the last candidates of an `order`; None: all of them."""
        if count is self.candidates_in or order is None:
            return None
        with part("selecting"):
            return self.selected(count, order)

    def selected(self, count: Count, order: torch.Tensor) -> torch.Tensor:
        """The indices where they are not all."""
        return select(order, count.width, count.rows)


def heads_of(probe: Any, layers: range, device: torch.device) -> list[Any]:
    """`LayerPlan.heads` of some layers, their numbers copied to the device at once."""
    if isinstance(probe.heads, str):
        return [probe.heads] * len(layers)
    each = [probe.heads_of(layer) for layer in layers]
    numbers = torch.tensor([head for heads in each for head in heads], device=device).split([*map(len, each)])
    return [part if heads else None for part, heads in zip(numbers, each, strict=True)]


class PlannedRuns(StockRuns):
    """Mixed into a family's decoder: plans a prefill, and has the cache's layers know what they hold."""

    def _plans(self, schedule: Any, lengths: list[int], run: Pass) -> list[LayerPlan]:
        """Plans of the skipping layers, for rows of `lengths` tokens."""
        device = run.states.device
        known: dict[tuple[int, ...], Count] = {}
        plans, windows = [], layer_windows(self.config)
        layers = range(schedule.start, len(self.layers))
        for layer, heads in zip(layers, heads_of(schedule.probe, layers, device), strict=True):
            columns = zip(*(schedule.counts(layer, length) for length in lengths), strict=True)
            counts: dict[str, Any] = {}
            for name, column in zip(Counts._fields, columns, strict=True):
                counts[name] = known.get(column) or known.setdefault(column, Count.of(column, device))
            window = windows[layer]
            window = window if window is not None and window < max(lengths) else None
            plans.append(LayerPlan(**counts, schedule=schedule, heads=heads, window=window, options=run.options))
        return plans

    def _prepare_cache(self, run: Pass, plans: list[LayerPlan], lengths: list[int], notes: bool) -> None:
        """Replace the skipping layers' caches, for rows of `lengths` tokens. Those of layers with windows note the
        positions of their tokens, and if `notes` is set all do.

        Raises:
            ValueError: if the cache is of a kind that can't hold layers of unequal length.
        """
        cache, slots, windows = run.cache, run.states.shape[1], layer_windows(self.config)
        fill_layers(cache, len(self.layers))
        for layer, plan in enumerate(plans, len(self.layers) - len(plans)):
            old, window = cache.layers[layer], windows[layer]
            if not isinstance(old, SkippedCacheLayer) and type(old) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"skipping needs a dynamic or a static cache, this one has {type(old).__name__}; "
                    "leave cache_implementation unset, or pass spts=False"
                )
            widths = plan.candidates_in.width, plan.active.width, plan.cached.width
            protected, stage = min(plan.schedule.always_last, plan.active.width), plan.schedule.stage_of(layer)
            cache.layers[layer] = self.cache_layer(old, window, slots, *widths, plan.cached.valid, protected, stage)
        skipping = range(len(self.layers) - len(plans), len(self.layers))
        if min(lengths) < slots:
            cache.layers[skipping.start].mask = run.mask.ne(0)  # a copy
        if noting := [layer for layer in skipping if notes or windows[layer] is not None]:
            ends = torch.tensor(lengths, device=run.states.device)[:, None]  # sent once
            for layer in noting:
                cache.layers[layer].ends = ends

    def cache_layer(self, old: Any, window: int | None, *counts: Any) -> SkippedCacheLayer:
        """What a layer's `old` cache is replaced by; windows.py has another for a layer with a `window`."""
        return SkippedCacheLayer(*counts)
