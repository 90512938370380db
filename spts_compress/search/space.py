"""Schedule parameters, drawn and varied by a seeded generator, and the schedules they make at a given cost."""

import random
from dataclasses import dataclass, replace
from typing import Any

from ..cost import predicted
from ..modeling.configuration_spts import Amount, Probe, Proxy, Schedule, Stage, Update
from ..modeling.stock_layer import layer_windows
from ..recipe import ScheduleParams
from ..timing.latency_table import LatencyTable
from ..utils.errors import UserError

Choices = dict[str, tuple]  # what each parameter is drawn from
Heads = dict[tuple[int, int], float]  # what (layer, head) finds, over what the best one finds
Target = tuple[str, float]  # "speedup" or "kv_share", and what it is to be

STEPS = 24  # halvings of the scale
DEFAULT_SPEEDUPS = (1.5, 1.4, 1.3, 1.2, 1.1)
PAPER: dict[str, Any] = {"decay": 0.2, "margin": 1.25, "sink_tokens": 0, "recent_tokens": 1, "ffn_selection": "proxy"}
PLAIN: dict[str, Any] = {**PAPER, "margin": 1.3}  # what a winner's parameters are judged against
# Did well wherever it was tried.
QUERIES_32: dict[str, Any] = {"window_size": 32, "heads": "max", "score_carry": 1.0, "kernel_size": 31}
FOR_NEEDLES: dict[str, Any] = {  # what searches for needles alone found
    "stages": 5, "bend": 0.7, "margin": 1.0, "ffn_selection": "attention", "window_size": 64,
    "score_carry": 0.5, "kernel_size": 63,
}  # fmt: skip
UPDATED: dict[str, Any] = {  # did well with updates
    "decay": 0.35, "margin": 0.0, "ffn_selection": "attention", "window_size": 16, "score_carry": 0.5,
    "kernel_size": 31, "kv": 0.5,
}  # fmt: skip
FILTER: dict[str, Any] = {  # FastKV's, which came nearest to a small model's free answers at 2x
    "filters": True, "stages": 1, "margin": 1.0, "ffn_selection": "attention", "window_size": 8, "kernel_size": 7,
}  # fmt: skip
BY_RETRIEVAL_HEADS: dict[str, Any] = {**FOR_NEEDLES, "heads": 0.9, "score_carry": 1.0, "kernel_size": 95}


def seeds(starts: list[int], with_heads: bool, updated: bool, given: dict[str, list]) -> list[ScheduleParams]:
    """What is tried in any case: the paper's settings, and from several starts on its probe, ones of more queries,
    where they are known those of retrieval heads, and those for updates; with one of the `given` values where they have
    another."""
    others = [QUERIES_32, FOR_NEEDLES, FILTER]
    others += [BY_RETRIEVAL_HEADS] * with_heads + [UPDATED] * updated
    probes = [ScheduleParams(start, **probe) for probe in others for start in starts[::2]]
    tried = [ScheduleParams(starts[0], **PAPER), *(ScheduleParams(start) for start in starts[::3]), *probes]
    changes = ({n: values[0] for n, values in given.items() if getattr(seed, n) not in values} for seed in tried)
    return [replace(seed, **own) for seed, own in zip(tried, changes, strict=True)]


def draw(rng: random.Random, choices: Choices) -> ScheduleParams:
    return ScheduleParams(**{name: rng.choice(values) for name, values in choices.items()})


def vary(rng: random.Random, params: ScheduleParams, choices: Choices, other: ScheduleParams) -> ScheduleParams:
    """Parameters near `params`: every value may come from `other`, and one or two are drawn anew."""
    names = list(choices)
    values = {name: getattr(other if rng.random() < 0.2 else params, name) for name in names}
    for name in rng.sample(names, rng.choice((1, 2))):
        allowed = choices[name]
        here = allowed.index(values[name]) if values[name] in allowed else 0
        if any(isinstance(value, str) for value in allowed):
            values[name] = rng.choice(allowed)
        else:  # numbers move to a neighbour more often than anywhere
            near = [allowed[i] for i in (here - 1, here + 1) if 0 <= i < len(allowed)]
            values[name] = rng.choice(near if near and rng.random() < 0.7 else allowed)
    return ScheduleParams(**values)


def scoring_heads(params: ScheduleParams, heads: Heads) -> str | tuple[tuple[int, int], ...]:
    """`Probe.heads`: where `params` has a share, one head at least in the first skipping layer or before."""
    if isinstance(params.heads, str):
        return params.heads
    first = max((pair for pair in heads if pair[0] <= params.start), key=lambda pair: heads[pair])
    chosen = sorted({first, *(pair for pair, worth in heads.items() if worth >= params.heads)})
    if not params.score_carry:  # then scores before the last ones up to the start are of no use
        begin = max(layer for layer, _ in chosen if layer <= params.start)
        chosen = [pair for pair in chosen if pair[0] >= begin]
    return tuple(chosen)


@dataclass(frozen=True)
class Costs:
    """What schedules cost for a prompt of `length` tokens: counted, with the speed-up by the measured `latencies` if
    there are any. `proxies`: size of every layer's, up to the last layer. `heads`: those that may score, for parameters
    that say how good they must be. `update`: as in `Schedule`, one pair of ranks."""

    config: Any
    length: int
    proxies: dict[int, Proxy]
    heads: Heads | None = None
    latencies: LatencyTable | None = None
    update: tuple[Update, ...] = ()

    def schedule(self, params: ScheduleParams, scale: float) -> Schedule:
        """The schedule whose first stage keeps the fraction `scale` of the prompt (all of it if that is more than 1).
        Where heads score before it starts, or it `filters`, it has a first stage that keeps all."""

        def amount(fraction: float) -> Amount:
            return Amount(round(min(1.0, fraction), 4), params.floor)

        start, last = params.start, max(self.proxies)
        begin = min(start + params.filters, last)
        shares = [(i / params.stages) ** params.bend for i in range(1, params.stages + 1)]
        ends = sorted({begin - 1 + max(1, round((last + 1 - begin) * share)) for share in shares})
        fractions = [scale * params.decay ** (i / max(1, len(ends) - 1)) for i in range(len(ends))]
        budgets = [(amount(fraction), amount(fraction * params.ffn)) for fraction in fractions]
        needs = [max(budget.fraction for budget in both) for both in budgets]
        prunes = [amount(need * params.margin) if params.margin else None for need in needs[1:]]
        stages = [
            Stage(end, budget, prune, None if ffn == budget else ffn)
            for end, (budget, ffn), prune in zip(ends, budgets, [*prunes, None], strict=True)
        ]
        if begin > start:
            stages.insert(0, Stage(start, Amount(1.0), amount(needs[0] * max(1.0, params.margin))))
        scoring = scoring_heads(params, self.heads or {})
        if not isinstance(scoring, str) and scoring[0][0] < start:
            stages, start = [Stage(start - 1, Amount(1.0)), *stages], scoring[0][0]
        probe = Probe(params.window_size, scoring, params.score_carry, params.kernel_size)
        sizes = tuple(self.proxies[layer] for layer in range(start, last + 1))
        always = params.sink_tokens, params.recent_tokens
        return Schedule(start, tuple(stages), sizes, probe, *always, params.ffn_selection, self.update, params.kv)

    def of(self, schedule: Schedule) -> dict[str, float]:
        """See `predicted`; where latencies are measured, `flop_speedup` is the counted one."""
        cost = predicted(self.config, schedule, self.length)
        if self.latencies is None:
            return cost
        measured = self.latencies.speedup(self.config, schedule, self.length)
        return {**cost, "speedup": measured, "flop_speedup": cost["speedup"]}

    def scale_to_cost(self, params: ScheduleParams, target: Target) -> Schedule | None:
        """The largest schedule of `params` whose speedup is at least the target's, or whose kv_share is at most that;
        None if no budgets are small enough."""
        name, wanted = target
        sign = 1 if name == "speedup" else -1

        def met_by(scale: float) -> bool:
            return sign * self.of(self.schedule(params, scale))[name] >= sign * wanted

        low, high = 0.005, 1 / (params.decay * min(1.0, params.ffn))  # where every budget is the whole prompt
        if not met_by(low):
            return None
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if met_by(middle) else (low, middle)
        return self.schedule(params, low)


def default_schedule(config: Any, proxies: dict[int, Proxy], length: int) -> Schedule:
    """The schedule of a recipe that gives none: the default parameters from two fifths of the depth on, with 1.5 times
    fewer FLOPs for a prompt of `length` tokens, or as many times fewer as there can be.

    Raises:
        UserError: if no budgets save FLOPs.
    """
    layers, start = config.num_hidden_layers, max(1, round(0.4 * config.num_hidden_layers))
    windowed = any(window is not None for window in layer_windows(config))  # such a layer alone prunes what is far back
    costs = Costs(config, length, proxies)
    params = ScheduleParams(start, score_carry=1.0 if windowed else 0.0)
    for speedup in DEFAULT_SPEEDUPS if start < layers else ():
        scaled = costs.scale_to_cost(params, ("speedup", speedup))
        if scaled is not None:
            return scaled
    raise UserError(
        f"no default schedule saves FLOPs in {layers} layers on prompts of {length} tokens: give a schedule, or longer "
        "report.lengths"
    )


def reverted(params: ScheduleParams) -> dict[str, ScheduleParams]:
    """For each value in which `params` differs from the plain one, the same parameters without that difference."""
    plain = vars(ScheduleParams(params.start, **PLAIN))
    return {name: replace(params, **{name: value}) for name, value in plain.items() if getattr(params, name) != value}
