"""From a recipe's target to a schedule: prompts, dense work, search at each cost, confirmation on other prompts."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint.families import context_of
from ..cost import predicted
from ..modeling.configuration_spts import Amount, Proxy, Schedule
from ..recipe import SearchSection
from ..schedule import faults
from ..tasks.example import Example
from ..tasks.recovery import interval
from ..tasks.runner import Answers
from ..timing.latency_table import LatencyTable, grid, measure
from ..utils.devices import hardware
from ..utils.distributed import SINGLE_PROCESS, Ranks
from ..utils.errors import UserError
from ..utils.store import Store, fingerprint
from . import dense_reference, halving, prompts, space
from .halving import Candidate, Rows
from .retrieval_heads import reliability, retrieval_heads

RELIABILITY_PROMPTS = 4
HEAD_PROMPTS = 8  # to find heads with
ATTEMPTS = 8  # at a prompt that the dense model answers rightly
FACTORS = (0.7, 1.4)  # of one stage's budget, to see what it is worth


@dataclass
class Bench:
    """Evaluates schedules on prompts whose dense work is done; every figure is kept at once.

    `whole`: the skipping model, with proxies in all layers from the earliest start on.
    """

    whole: Any
    kept: Answers
    key: str
    progress: Any
    kinds: Sequence[str]
    ranks: Ranks = SINGLE_PROCESS
    evaluated: int = 0

    def __post_init__(self) -> None:
        self.ranks.barrier()  # for all to have read what was kept, before anyone adds to it

    def rows(self, schedule: Schedule, tried: list[dense_reference.Dense]) -> Rows:
        keys = [fingerprint(self.key, schedule.to_dict(), prompt.key) for prompt in tried]
        missing = {key: p for key, p in zip(keys, tried, strict=True) if key not in self.kept.rows}
        made = [self._add(key, schedule, missing[key]) for key in self.ranks.shard(list(missing))]
        self.kept.rows.update({row["key"]: row for row in self.ranks.all_gather(made)})
        self.evaluated += len(missing)
        return [self.kept.rows[key] for key in keys]

    def _add(self, key: str, schedule: Schedule, prompt: dense_reference.Dense) -> dict[str, Any]:
        item = prompt.item
        named = {"key": key, "kind": prompts.kind_of(item, self.kinds), "task": item.task, "length": item.limit}
        row = {**named, **dense_reference.compare(self.whole, schedule, prompt)}
        self.kept.add(row)
        self.progress.update()
        return row


def starts_of(section: SearchSection, config: Any) -> list[int]:
    """First skipping layers to try, checked against the model.

    Raises:
        UserError: for a layer that the model does not have, and for prompts longer than its context.
    """
    num_layers, context = config.num_hidden_layers, context_of(config)
    if max(section.lengths) > context:
        raise UserError(f"search.lengths: {max(section.lengths)} is more than the model's context of {context}")
    starts = section.start_layers(num_layers)
    for start in starts:
        if not 1 <= start < num_layers:
            raise UserError(f"search.starts: {start} is out of range; it must be 1 to {num_layers - 1}")
    if section.heads_from is not None and section.heads_from > starts[0]:
        raise UserError(f"search.heads_from: {section.heads_from} is behind the first start; at most {starts[0]}")
    return starts


def widest(section: SearchSection, config: Any) -> Schedule:
    """A schedule that skips from the earliest layer on that a candidate may; the proxies are fitted for it, whatever
    their sizes.

    Raises:
        UserError: see `starts_of`.
    """
    num_layers, starts = config.num_hidden_layers, starts_of(section, config)
    stage = {"end": num_layers - 1, "budget": {"fraction": 0.2}}
    block = {"start": section.heads_from or starts[0], "stages": [stage], "proxy": {"channels": 1, "rank": 0}}
    return Schedule.from_dict({**block, "ffn_selection": "relative"}, num_layers)


@dataclass(frozen=True)
class Asked:
    """The prompts of a search, lengths and kinds in turn: half of them to search on, half to confirm."""

    section: SearchSection
    tokenizer: Any
    prose: str
    items: tuple[Example, ...] = ()

    @property
    def slots(self) -> list[tuple[int, int, str, int]]:
        """Seed, index, kind and length of every prompt."""
        section = self.section
        seeds = section.seed, section.seed + 1
        return list(product(seeds, range(section.prompts), section.kinds, section.lengths))

    def make(self, number: int, attempt: int = 0) -> Example:
        """The prompt `number`; each `attempt` gives another one of the same task and length.

        Raises:
            UserError: if its task does not fit into its length.
        """
        seed, index, kind, length = self.slots[number]
        tokens = self.section.answer_tokens
        return prompts.one(kind, index, self.tokenizer, self.prose, length, tokens, seed, attempt)

    def another(self, number: int, attempt: int) -> Example:
        """As `make`; where a later attempt does not fit, which is a matter of a few tokens, the first prompt again."""
        with suppress(UserError):
            return self.make(number, attempt)
        return self.items[number]

    def first(self, ranks: Ranks) -> "Asked":
        """With the `items` that are tried first, which all of `ranks` make together."""
        mine = tqdm(ranks.shard(range(len(self.slots))), desc="prompts", unit="prompt")
        return replace(self, items=tuple(ranks.all_gather([self.make(number) for number in mine])))


def quality(rows: Rows) -> tuple[float, tuple[float, float]]:
    """Mean top-1 agreement with dense, and its 95% interval (percentile bootstrap over prompts, 2000 resamples)."""
    found = [row["top1"] for row in rows]
    mean = sum(found) / len(found)
    return mean, interval([1.0] * len(found), found) or (mean, mean)


def signs(best: Candidate, held: Rows, lengths: list[int]) -> list[str]:
    """What a loss looks like, in words; empty if nothing stands out."""
    found, kinds = [], halving.by_kind(best.rows + held)
    worst = min(kinds, key=lambda kind: kinds[kind]["top1"])
    rest = [kinds[kind]["top1"] for kind in kinds if kind != worst]
    if rest and kinds[worst]["top1"] < min(rest) - 0.1:
        found.append(f"{worst} prompts lose most: the budgets are too low for them, or the probe misses their tokens")
    mine, others = best.loss, halving.loss(held)
    if max(mine, others) > 2 * min(mine, others) + 0.02:
        found.append("the figures differ much between the prompts searched on and the others: use more prompts")
    if best.cost["probing_share"] > 0.1:
        found.append(
            f"probing takes {best.cost['probing_share']:.0%} of the operations: fewer queries or smaller proxies"
        )
    by_length = [[row["kl"] for row in best.rows + held if row["length"] == n] for n in (min(lengths), max(lengths))]
    short, long = (sum(values) / max(1, len(values)) for values in by_length)
    if len(lengths) > 1 and long > 2 * short + 0.02:
        found.append("longer prompts lose more: later or fewer stages, or a larger pruning margin")
    if len(lengths) > 1 and short > 2 * long + 0.02:
        found.append("shorter prompts lose more: a floor under the budgets, or min_length")
    return found


def _cost(config: Any, length: int, table: LatencyTable | None) -> Callable[[Schedule], dict[str, float]]:
    """What a schedule costs: counted, with the speed-up that measured prices allow in its place if there are any."""

    def cost(schedule: Schedule) -> dict[str, float]:
        counted = predicted(config, schedule, length)
        if table is None:
            return counted
        return {**counted, "speedup": table.speedup(config, schedule, length), "counted": counted["speedup"]}

    return cost


def _scaling(
    name: str,
    target: float,
    cost: Callable[[Schedule], dict[str, float]],
    num_layers: int,
    sizes: dict[int, Proxy],
    heads: space.Heads | None,
) -> Callable[[space.ScheduleParams], Candidate | None]:
    """Gives a shape the budgets with which its `name` is `target`; None where there are none."""
    sign = 1 if name == "speedup" else -1  # a smaller KV share costs less

    def scaled(shape: space.ScheduleParams) -> Candidate | None:
        made = space.at_cost(shape, lambda s: sign * cost(s)[name], sign * target, num_layers, sizes, heads)
        return None if made is None else Candidate(shape, made, cost(made), [])

    return scaled


def _prices(model: Any, length: int) -> LatencyTable:
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return measure(model, ids.to(model.device), grid(length))


def _varied(best: Candidate, cost: Callable[[Schedule], dict[str, float]]) -> list[tuple[dict[str, float], Schedule]]:
    """The winner with one stage's tokens (and what may come into it) made fewer and more: `stage` from 0, `factor`
    and `speedup`, and the schedule."""
    stages, made = best.schedule.stages, []
    for number, stage in enumerate(stages):
        for factor in FACTORS:
            changed = list(stages)
            changed[number] = replace(
                stage,
                budget=_times(stage.budget, factor),
                ffn_budget=None if stage.ffn_budget is None else _times(stage.ffn_budget, factor),
            )
            if number and (before := stages[number - 1]).prune_to is not None:
                changed[number - 1] = replace(before, prune_to=_times(before.prune_to, max(1.0, factor)))
            schedule = replace(best.schedule, stages=tuple(changed))
            if schedule != best.schedule and not faults(schedule, schedule.stages[-1].end + 1):
                made.append(({"stage": number, "factor": factor, "speedup": cost(schedule)["speedup"]}, schedule))
    return made


def _times(amount: Amount, factor: float) -> Amount:
    return replace(amount, fraction=min(1.0, amount.fraction * factor), floor=round(amount.floor * factor))


def _point(
    found: list[Candidate],
    scaled: Callable[[space.ScheduleParams], Candidate | None],
    cost: Callable[[Schedule], dict[str, float]],
    bench: Bench,
    tune: list[dense_reference.Dense],
    others: list[dense_reference.Dense],
    lengths: list[int],
) -> dict[str, Any]:
    """The best candidate on prompts that nothing was chosen on, and what each of its values brings."""
    best, held = found[0], bench.rows(found[0].schedule, others)
    worth, low_high = quality(held)
    plain = space.ScheduleParams(best.shape.start, sink_tokens=0, recent_tokens=1, ffn_selection="proxy", margin=1.3)
    without = {
        what: halving.loss(bench.rows(made.schedule, tune))
        for what, shape in space.reverted(best.shape, plain).items()
        if (made := scaled(shape)) is not None
    }
    return {
        "cost": best.cost,
        "winner": best.plain(),
        "held_out": {"loss": halving.loss(held), "kinds": halving.by_kind(held), "prompts": len(held)},
        "quality": worth,
        "interval": low_high,
        "without": without,
        "budgets": [{**row, "loss": halving.loss(bench.rows(schedule, tune))} for row, schedule in _varied(best, cost)],
        "signs": signs(best, held, lengths),
        "tried": [{k: v for k, v in c.plain().items() if k != "schedule"} for c in found],
    }


def _answered(
    model: Any,
    asked: Asked,
    layers: list[int],
    store: Store,
    key: str,
    say: Callable[[str], None],
    ranks: Ranks,
) -> list[dense_reference.Dense]:
    """The dense work for every prompt; with `require_dense_correct`, others in place of those answered wrongly."""
    done: dict[int, dense_reference.Dense] = {}
    items, missing, picky = asked.items, list(range(len(asked.items))), asked.section.require_dense_correct
    for attempt in range(ATTEMPTS if picky else 1):
        mine = [
            (number, asked.another(number, attempt) if attempt else items[number]) for number in ranks.shard(missing)
        ]
        for _, item in tqdm(mine, desc="dense answers", unit="prompt"):
            dense_reference.dense(model, asked.tokenizer, item, layers, store, key)
        for number, item in ranks.all_gather(mine):
            done[number] = dense_reference.dense(model, asked.tokenizer, item, layers, store, key)
        missing = [number for number in missing if picky and not done[number].right(asked.tokenizer)]
        if not missing:
            break
    if missing:
        kinds = sorted({done[number].item.task for number in missing})
        say(f"{len(missing)} of {len(items)} prompts ({', '.join(kinds)}) were never answered rightly; they count too")
    return [done[number] for number in range(len(items))]


def _mean(
    name: str,
    of: list[dense_reference.Dense],
    make: Callable[[dense_reference.Dense], Any],
    store: Store,
    key: str,
    ranks: Ranks,
) -> torch.Tensor:
    """The mean over prompts of what is made of each, which is kept."""
    mine = tqdm(ranks.shard(of), desc=name, unit="prompt")
    made = [store.json(name, fingerprint(key, prompt.key), partial(make, prompt)) for prompt in mine]
    return torch.tensor(ranks.all_gather(made)).mean(dim=0)


def _heads(worth: torch.Tensor, first: int) -> space.Heads:
    """What the heads of layers from `first` on find, over what the best one of them does; `worth` (layers, heads)."""
    share = worth / worth[first:].max().clamp_min(1e-9)
    return {
        (layer, head): float(share[layer, head]) for layer in range(first, len(share)) for head in range(share.shape[1])
    }


def run(
    model: Any,
    whole: Any,
    asked: Asked,
    store: Store,
    key: str,
    say: Callable[[str], None],
    ranks: Ranks,
) -> dict[str, Any]:
    """The best schedule at each cost that the target asks for, confirmed on prompts that nothing was chosen on.

    Args:
        model, whole: the stock and the skipping model, on the same parameters.
        key: what every figure depends on beside schedule and prompt.

    Returns:
        `points`, one for each cost: `cost` (counted), `winner`, `held_out` and `quality` with its interval on the
        prompts that confirm, what the loss becomes `without` each found value and with other `budgets` in one stage,
        `signs` of what is lost, and all that was `tried`. `chosen`: the number of the point that meets the target, None
        if none does. `reliability` of every layer's ranking by the last winner's probe. `heads`: layer, head and what
        it finds over what the best one does, best first; None if no candidate could choose some. `prices`: the table of
        measured costs, None if they are counted. And the numbers of `candidates` and `evaluations`, and `seconds`.
    """
    begin, config, section = time.monotonic(), model.config, asked.section
    layers, longest = config.num_hidden_layers, max(section.lengths)
    starts = starts_of(section, config)
    fitted = whole.config.schedule()
    sizes = {layer: fitted.proxy_of(layer) for layer in range(fitted.start, layers)}
    kept = sorted({fitted.start - 1, *(start - 1 for start in starts)})
    done = _answered(model, asked, kept, store, key, say, ranks)
    tune, others = done[: len(done) // 2], done[len(done) // 2 :]
    longer = [prompt for prompt in tune if prompt.item.limit == longest]
    choices = {"start": tuple(starts), **space.CHOICES, **section.choices.given()}
    heads = None
    if not all(isinstance(value, str) for value in choices["heads"]):
        find = partial(retrieval_heads, whole, asked.tokenizer)
        some = longer[: max(HEAD_PROMPTS, len(section.kinds))]  # in turn, so all kinds are there
        heads = _heads(_mean("heads", some, find, store, key, ranks), fitted.start)
    shared_seconds = time.monotonic() - begin
    table = None
    if section.cost == "measured":
        with ranks.main_first():
            machine = fingerprint(key, hardware(str(model.device)), longest)
            table = LatencyTable(**store.json("prices", machine, lambda: asdict(_prices(model, longest))))
    cost = _cost(config, longest, table)

    points: list[dict[str, Any]] = []
    with tqdm(desc="searching", unit="evaluation") as bar:
        rows = Answers(store.path("search", key, ".jsonl"), ranks.rank)
        bench = Bench(whole, rows, key, bar, section.kinds, ranks)
        seeds = space.seeds(starts, heads is not None)
        for name, target in section.targets():
            scaled = _scaling(name, target, cost, layers, sizes, heads)
            found = halving.search(
                scaled,
                lambda schedule, count: bench.rows(schedule, tune[:count]),
                len(tune),
                len(tune) // section.prompts,
                choices,
                seeds,
                section.candidates,
                section.rounds,
                section.seed,
            )
            if not found:
                say(f"no schedule has a {name} of {target:g}")
                break
            points.append(
                {"target": [name, target], **_point(found, scaled, cost, bench, tune, others, section.lengths)}
            )
            seeds = [c.shape for c in found[: halving.ELITE]]
            worth = points[-1]["quality"]
            bar.set_postfix_str(f"{name} {target:g}: agreement {worth:.3f}, loss {found[0].loss:.3f}")
            if section.quality is not None and worth < section.quality:
                break  # what costs even less is worse
    rankings = None
    if points:
        probe = Schedule.from_dict(points[-1]["winner"]["schedule"], layers).probe
        rank = partial(reliability, whole, asked.tokenizer, probe=probe)
        probed = fingerprint(key, asdict(probe))
        rankings = _mean("reliability", longer[:RELIABILITY_PROMPTS], rank, store, probed, ranks).tolist()
    meets = [i for i, p in enumerate(points) if section.quality is None or p["quality"] >= section.quality]
    return {
        "points": points,
        "chosen": meets[-1] if meets and section.decides else None,
        "reliability": rankings,
        "heads": heads and sorted(([*pair, worth] for pair, worth in heads.items()), key=lambda row: -row[2]),
        "prices": None if table is None else asdict(table),
        "evaluations": bench.evaluated,
        "candidates": sum(len(p["tried"]) for p in points),
        "seconds": {"dense": shared_seconds, "all": time.monotonic() - begin},
    }
