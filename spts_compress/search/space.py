"""Candidates: what a schedule may look like, drawn and varied by a seeded generator, and scaled to a given cost."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..cost import predicted
from ..modeling.configuration_spts import Amount, Probe, Proxy, Schedule, Stage
from ..modeling.stock_layer import layer_windows
from ..utils.errors import UserError

STEPS = 24  # halvings of the scale
DEFAULT_SPEEDUPS = (1.5, 1.4, 1.3, 1.2, 1.1)


@dataclass(frozen=True)
class ScheduleParams:
    """A schedule but for the size of its budgets.

    start: first skipping layer. stages: their number. bend: their lengths, 1 for equal ones, more for short first
    ones. decay: the last stage's budget over the first one's. margin: candidates a stage leaves, over the next one's
    budget (0: all). ffn: the feed-forward network's budget over the attention's. floor: tokens no budget goes under.
    heads: as in `Probe`, or a share: only heads that find so much of what the best one finds score, also in layers
    before the start. The rest as in `Schedule` and `Probe`.
    """

    start: int
    stages: int = 4
    bend: float = 1.0
    decay: float = 0.2
    margin: float = 1.6
    ffn: float = 1.0
    floor: int = 0
    ffn_selection: str = "relative"
    window_size: int = 1
    heads: str | float = "mean"
    score_carry: float = 0.0
    kernel_size: int = 1
    sink_tokens: int = 4
    recent_tokens: int = 32


CHOICES: dict[str, tuple] = {
    "stages": (1, 2, 3, 4, 5),
    "bend": (0.5, 0.7, 1.0, 1.5),
    "decay": (1.0, 0.6, 0.35, 0.2, 0.1),
    "margin": (0.0, 1.0, 1.3, 1.8, 2.5),
    "ffn": (0.5, 0.75, 1.0, 1.4, 2.0),
    "floor": (0, 128, 256),
    "ffn_selection": ("relative", "proxy", "attention"),
    "window_size": (1, 8, 32, 64, 96, 128),
    "heads": ("mean", "max", 0.8, 0.9),
    "score_carry": (0.0, 0.25, 0.5, 1.0),
    "kernel_size": (1, 7, 15, 31, 63, 95, 127),
    "sink_tokens": (0, 4, 16),
    "recent_tokens": (1, 32, 64),
}


PAPER: dict[str, Any] = {"decay": 0.2, "margin": 1.25, "sink_tokens": 0, "recent_tokens": 1, "ffn_selection": "proxy"}
WINDOWED: dict[str, Any] = {
    "window_size": 32,
    "heads": "max",
    "score_carry": 1.0,
    "kernel_size": 31,
}  # did well wherever it was tried
NEEDLES: dict[str, Any] = {  # what searches for needles alone found
    "stages": 5, "bend": 0.7, "margin": 1.0, "ffn_selection": "attention", "window_size": 64,
    "score_carry": 0.5, "kernel_size": 63,
}  # fmt: skip
HEADS: dict[str, Any] = {**NEEDLES, "heads": 0.9, "score_carry": 1.0, "kernel_size": 95}


def seeds(starts: list[int], with_heads: bool) -> list[ScheduleParams]:
    """What is tried in any case: the paper's settings, and its probe and windowed ones from several starts on, and
    where they are known those of retrieval heads."""
    windowed = [WINDOWED, NEEDLES, *([HEADS] if with_heads else [])]
    probes = [ScheduleParams(start, **probe) for probe in windowed for start in starts[::2]]
    return [ScheduleParams(starts[0], **PAPER), *(ScheduleParams(start) for start in starts[::3]), *probes]


def draw(rng: random.Random, choices: dict[str, tuple]) -> ScheduleParams:
    """Any shape, of the values that there are to choose from."""
    return ScheduleParams(**{name: rng.choice(values) for name, values in choices.items()})


def vary(rng: random.Random, shape: ScheduleParams, choices: dict[str, tuple], other: ScheduleParams) -> ScheduleParams:
    """A shape near `shape`: every value may come from `other`, and one or two are drawn anew."""
    names = [f.name for f in fields(ScheduleParams)]
    values = {n: getattr(other if rng.random() < 0.2 else shape, n) for n in names}
    for name in rng.sample(names, rng.choice((1, 2))):
        allowed = choices[name]
        here = allowed.index(values[name]) if values[name] in allowed else 0
        if any(isinstance(value, str) for value in allowed):
            values[name] = rng.choice(allowed)
        else:  # numbers move to a neighbour more often than anywhere
            near = [allowed[i] for i in (here - 1, here + 1) if 0 <= i < len(allowed)]
            values[name] = rng.choice(near if near and rng.random() < 0.7 else allowed)
    return ScheduleParams(**values)


Heads = dict[tuple[int, int], float]  # what (layer, head) finds, over what the best one finds


def scoring(shape: ScheduleParams, heads: Heads) -> str | tuple[tuple[int, int], ...]:
    """`Probe.heads` of a shape: with a share, one head at least in the first skipping layer or before."""
    if isinstance(shape.heads, str):
        return shape.heads
    first = max((pair for pair in heads if pair[0] <= shape.start), key=lambda pair: heads[pair])
    chosen = sorted({first, *(pair for pair, worth in heads.items() if worth >= shape.heads)})
    if not shape.score_carry:  # then scores before the last ones up to the start are of no use
        begin = max(layer for layer, _ in chosen if layer <= shape.start)
        chosen = [pair for pair in chosen if pair[0] >= begin]
    return tuple(chosen)


def schedule(
    shape: ScheduleParams,
    scale: float,
    num_layers: int,
    proxies: dict[int, Proxy],
    heads: Heads | None = None,
) -> Schedule:
    """The schedule whose first stage keeps the fraction `scale` of the prompt (all of it if that is more than 1). Where
    heads score before it starts, it has a stage in front that keeps all.

    Args:
        proxies: size of every layer's proxy.
        heads: those that may score, for a shape that says how good they must be.
    """
    depth, parts = num_layers - shape.start, range(1, shape.stages + 1)
    ends = sorted({shape.start - 1 + max(1, round(depth * (i / shape.stages) ** shape.bend)) for i in parts})
    count = len(ends)
    budgets = []
    for i in range(count):
        fraction = scale * shape.decay ** (i / max(1, count - 1))
        budgets.append(tuple(Amount(round(min(1.0, fraction * x), 4), shape.floor) for x in (1.0, shape.ffn)))
    stages = []
    for i, (end, (budget, ffn)) in enumerate(zip(ends, budgets, strict=True)):
        prune = None
        if shape.margin and i + 1 < count:
            need = max(amount.fraction for amount in budgets[i + 1])
            prune = Amount(round(min(1.0, need * shape.margin), 4), shape.floor)
        stages.append(Stage(end, budget, prune, None if ffn == budget else ffn))
    chosen, start = scoring(shape, heads or {}), shape.start
    if not isinstance(chosen, str) and chosen[0][0] < start:
        stages, start = [Stage(start - 1, Amount(1.0)), *stages], chosen[0][0]
    probe = Probe(shape.window_size, chosen, shape.score_carry, shape.kernel_size)
    sizes = tuple(proxies[layer] for layer in range(start, num_layers))
    return Schedule(
        start,
        tuple(stages),
        sizes,
        probe,
        sink_tokens=shape.sink_tokens,
        recent_tokens=shape.recent_tokens,
        ffn_selection=shape.ffn_selection,
    )


def at_cost(
    shape: ScheduleParams,
    value: Callable[[Schedule], float],
    target: float,
    num_layers: int,
    proxies: dict[int, Proxy],
    heads: Heads | None = None,
) -> Schedule | None:
    """The largest schedule of `shape` whose `value` (a speed-up, say: less for larger budgets) is at least `target`;
    None if no budgets are small enough."""
    low, high = 0.005, 1 / (shape.decay * min(1.0, shape.ffn))  # where every budget is the whole prompt

    def at(scale: float) -> Schedule:
        return schedule(shape, scale, num_layers, proxies, heads)

    if value(at(low)) < target:
        return None
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        if value(at(middle)) >= target:
            low = middle
        else:
            high = middle
    return at(low)


def default_schedule(config: Any, proxies: dict[int, Proxy], length: int) -> Schedule:
    """The schedule of a recipe that gives none: the default parameters from two fifths of the depth on, with 1.5 times
    fewer FLOPs for a prompt of `length` tokens, or as many times fewer as there can be.

    Raises:
        UserError: if no budgets save FLOPs.
    """
    layers, start = config.num_hidden_layers, max(1, round(0.4 * config.num_hidden_layers))
    windowed = any(window is not None for window in layer_windows(config))  # such a layer alone prunes what is far back
    params = ScheduleParams(start, score_carry=1.0 if windowed else 0.0)
    for speedup in DEFAULT_SPEEDUPS if start < layers else ():
        scaled = at_cost(params, lambda s: predicted(config, s, length)["speedup"], speedup, layers, proxies)
        if scaled is not None:
            return scaled
    raise UserError(
        f"no default schedule saves FLOPs in {layers} layers on prompts of {length} tokens: give a schedule, or longer "
        "report.lengths"
    )


def reverted(shape: ScheduleParams, plain: ScheduleParams) -> dict[str, ScheduleParams]:
    """For each value in which `shape` differs from `plain`, the shape without that difference."""
    names = [f.name for f in fields(ScheduleParams) if getattr(shape, f.name) != getattr(plain, f.name)]
    return {name: replace(shape, **{name: getattr(plain, name)}) for name in names}
