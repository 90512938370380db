"""What a stock layer's parts cost in seconds on the machine at hand: attention and the feed-forward network do not cost
the same per FLOP, nor the same at every number of tokens."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibrate.capture import layer_arguments
from ..cost import LayerShape, layer_costs
from ..modeling.configuration_spts import Schedule
from ..modeling.stock_layer import layer_kinds
from .pairs import synchronize


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of the parts of one layer at each of the numbers of `tokens` (rising): each kind of attention by its
    name, "feed_forward" and "keys"."""

    tokens: list[int]
    seconds: dict[str, list[float]]

    def of(self, part: str, tokens: int) -> float:
        """Seconds at `tokens`, on a power law between the numbers measured, in proportion below the least."""
        if tokens <= self.tokens[0]:
            return self.seconds[part][0] * tokens / self.tokens[0]
        return float(np.exp(np.interp(np.log(tokens), np.log(self.tokens), np.log(self.seconds[part]))))

    def speedup(self, config: Any, schedule: Schedule, length: int) -> float:
        """The TTFT ratio, dense over SPTS, that these times allow a prompt of `length` tokens. Probing is taken at the
        feed-forward network's time per FLOP, attention with a window at the stock layer's, though skipping layers
        run it faster, in pieces."""
        last, kinds = LayerShape.of(config), layer_kinds(config)
        pace = self.of("feed_forward", length) / last.feed_forward(length)
        dense = total = 0.0
        for layer, cost in enumerate(layer_costs(config, schedule, length)):
            width = LayerShape.of(config, layer).intermediate / last.intermediate
            dense += self.of(kinds[layer], length) + width * self.of("feed_forward", length)
            total += (
                self.of(kinds[layer], cost.active)
                + self.of("keys", cost.candidates_in - cost.active)
                + self.of("keys", max(0, cost.cached - cost.active))  # values cost as much
                + width * self.of("feed_forward", cost.ffn_tokens)
                + (cost.probing + cost.update) * pace
            )
        return dense / total


@torch.no_grad()
def measure(stock: Any, ids: torch.Tensor, tokens: Iterable[int], repeats: int = 3) -> LatencyTable:
    """Time the parts of the last layer of a `stock` model, and of the last of each kind of attention, on the first so
    many tokens of `ids` (B, n); medians of `repeats` after a warm-up."""
    layers, norm, kinds = stock.model.layers, stock.model.norm, layer_kinds(stock.config)
    embedded = stock.model.embed_tokens(ids)
    last = dict(zip(kinds, layers, strict=True))
    shape = LayerShape.of(stock.config)
    keys = embedded.new_ones(shape.key // shape.hidden, shape.hidden)  # time depends on no values
    counts = sorted(set(tokens))
    seconds: dict[str, list[float]] = {part: [] for part in (*last, "feed_forward", "keys")}
    for count in counts:
        states, options = embedded[:, :count], dict(zip(kinds, layer_arguments(stock, count), strict=True))
        for kind, layer in last.items():
            seconds[kind].append(_time(ids.device, repeats, _normed, layer.self_attn, norm, states, **options[kind]))
        seconds["feed_forward"].append(_time(ids.device, repeats, _normed, layers[-1].mlp, norm, states))
        seconds["keys"].append(_time(ids.device, repeats, nn.functional.linear, states, keys))
    return LatencyTable(counts, seconds)


def _normed(part: Any, norm: Any, states: torch.Tensor, **options: Any) -> Any:
    return part(norm(states), **options)


def _time(device: torch.device, repeats: int, function: Callable, *arguments: Any, **options: Any) -> float:
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        function(*arguments, **options)
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def calibrated(stock: Any, schedule: Schedule, ids: torch.Tensor) -> float:
    """The TTFT ratio that the machine's own speed allows on prompts `ids` (B, n), with every number of tokens that the
    schedule has timed."""
    costs = layer_costs(stock.config, schedule, ids.shape[1])
    counts = {n for cost in costs for n in (cost.active, cost.candidates_in - cost.active, cost.ffn_tokens)}
    return measure(stock, ids, (counts | {ids.shape[1]}) - {0}).speedup(stock.config, schedule, ids.shape[1])


def grid(length: int, points: int = 10) -> list[int]:
    """Numbers of tokens up to `length`, each the same factor above the one before, from 64 on."""
    return sorted({round(n) for n in np.geomspace(min(64, length), length, points)})
