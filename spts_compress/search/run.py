"""From a recipe's target to a schedule: prompts, dense work, search at each cost, confirmation on other prompts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..cost import predicted
from ..errors import UserError
from ..evaluation.items import Item
from ..evaluation.recovery import interval
from ..evaluation.runner import Answers
from ..modeling.configuration_spts import Proxy, Schedule
from ..recipe import SearchSection
from ..store import Store, fingerprint
from . import halving, prompts, shared, space
from .halving import Candidate, Rows


@dataclass
class Bench:
    """Evaluates schedules on prompts whose dense work is done; every figure is kept at once.

    `whole`: the skipping model, with proxies in all layers from the earliest start on.
    """

    whole: Any
    kept: Answers
    key: str
    progress: Any
    evaluated: int = 0

    def __post_init__(self) -> None:
        self.tails: dict[int, Any] = {}

    def rows(self, schedule: Schedule, tried: list[shared.Dense]) -> Rows:
        return [self._row(schedule, prompt) for prompt in tried]

    def _row(self, schedule: Schedule, prompt: shared.Dense) -> dict[str, Any]:
        key = fingerprint(self.key, schedule.to_dict(), prompt.key)
        if key not in self.kept.rows:
            first = schedule.start - 1
            if first not in self.tails:
                self.tails[first] = shared.tail(self.whole, first)
            item = prompt.item
            named = {"key": key, "kind": prompts.kind_of(item), "task": item.task, "length": item.limit}
            self.kept.add({**named, **shared.compare(self.tails[first], schedule, prompt)})
            self.evaluated += 1
        self.progress.update()
        return self.kept.rows[key]


def starts_of(section: SearchSection, config: Any) -> list[int]:
    """First skipping layers to try, checked against the model.

    Raises:
        UserError: for a layer that the model does not have, and for prompts longer than its context.
    """
    num_layers, context = config.num_hidden_layers, config.max_position_embeddings
    if max(section.lengths) > context:
        raise UserError(f"search.lengths: {max(section.lengths)} is more than the model's context of {context}")
    starts = section.start_layers(num_layers)
    for start in starts:
        if not 1 <= start < num_layers:
            raise UserError(f"search.starts: {start} is out of range; it must be 1 to {num_layers - 1}")
    return starts


def widest(starts: list[int], num_layers: int, proxy: Proxy) -> Schedule:
    """A schedule that skips from the earliest start on; the proxies are fitted for it."""
    stage = {"end": num_layers - 1, "budget": {"fraction": 0.2}}
    block = {"start": starts[0], "stages": [stage], "proxy": {"channels": proxy.channels, "rank": proxy.rank}}
    return Schedule.from_dict({**block, "feed_forward": "relative"}, num_layers)


def items(section: SearchSection, tokenizer: Any, prose: str) -> tuple[list[Item], list[Item]]:
    """The prompts to search on and those that confirm, lengths and kinds in turn.

    Raises:
        UserError: if a task does not fit into a length.
    """

    def of(seed: int) -> list[Item]:
        columns = [
            prompts.make(section.kinds, tokenizer, prose, n, section.prompts, section.answer_tokens, seed)
            for n in section.lengths
        ]
        return [item for row in zip(*columns, strict=True) for item in row]

    return of(section.seed), of(section.seed + 1)


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


def _scaling(
    name: str, target: float, config: Any, length: int, sizes: dict[int, Proxy]
) -> Callable[[space.Shape], Candidate | None]:
    """Gives a shape the budgets with which its counted `name` is `target`; None where there are none."""
    sign = 1 if name == "speedup" else -1  # a smaller KV share costs less

    def value(schedule: Schedule) -> float:
        return sign * predicted(config, schedule, length)[name]

    def scaled(shape: space.Shape) -> Candidate | None:
        made = space.at_cost(shape, value, sign * target, config.num_hidden_layers, sizes)
        return None if made is None else Candidate(shape, made, predicted(config, made, length), [])

    return scaled


def _point(
    found: list[Candidate],
    scaled: Callable[[space.Shape], Candidate | None],
    bench: Bench,
    tune: list[shared.Dense],
    others: list[shared.Dense],
    lengths: list[int],
) -> dict[str, Any]:
    """The best candidate on prompts that nothing was chosen on, and what each of its values brings."""
    best, held = found[0], bench.rows(found[0].schedule, others)
    worth, low_high = quality(held)
    plain = space.Shape(best.shape.start, keep_first=0, keep_last=1, feed_forward="proxy", margin=1.3)
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
        "signs": signs(best, held, lengths),
        "tried": [{k: v for k, v in c.plain().items() if k != "schedule"} for c in found],
    }


def run(
    model: Any,
    whole: Any,
    tokenizer: Any,
    texts: tuple[list[Item], list[Item]],
    section: SearchSection,
    store: Store,
    key: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The best schedule at each cost that the target asks for, confirmed on prompts that nothing was chosen on.

    Args:
        model, whole: the stock and the skipping model, on the same parameters.
        texts: see `items`.
        key: what every figure depends on beside schedule and prompt.

    Returns:
        `points`, one for each cost: `cost` (counted), `winner`, `held_out` and `quality` with its interval on the
        prompts that confirm, what the loss becomes `without` each found value, `signs` of what is lost, and all that
        was `tried`. `chosen`: the number of the point that meets the target, None if none does. And the numbers of
        `candidates` and `evaluations`, and `seconds`.
    """
    begin, config = time.monotonic(), model.config
    layers, longest = config.num_hidden_layers, max(section.lengths)
    starts = starts_of(section, config)
    fitted = whole.config.schedule()
    sizes = {layer: fitted.proxy_of(layer) for layer in range(fitted.start, layers)}
    progress = tqdm([item for part in texts for item in part], desc="dense answers", unit="prompt")
    done = [shared.dense(model, tokenizer, item, [s - 1 for s in starts], store, key) for item in progress]
    tune, others = done[: len(texts[0])], done[len(texts[0]) :]
    shared_seconds = time.monotonic() - begin

    points: list[dict[str, Any]] = []
    with tqdm(desc="searching", unit="evaluation") as bar:
        bench = Bench(whole, Answers(store.path("search", key, ".jsonl")), key, bar)
        seeds = space.seeds(starts)
        for name, target in section.targets():
            scaled = _scaling(name, target, config, longest, sizes)
            found = halving.search(
                scaled,
                lambda schedule, count: bench.rows(schedule, tune[:count]),
                len(tune),
                starts,
                seeds,
                section.candidates,
                section.rounds,
                section.seed,
            )
            if not found:
                say(f"no schedule has a {name} of {target:g}")
                break
            points.append({"target": [name, target], **_point(found, scaled, bench, tune, others, section.lengths)})
            seeds = [c.shape for c in found[: halving.ELITE]]
            worth = points[-1]["quality"]
            bar.set_postfix_str(f"{name} {target:g}: agreement {worth:.3f}, loss {found[0].loss:.3f}")
            if section.quality is not None and worth < section.quality:
                break  # what costs even less is worse
    meets = [i for i, p in enumerate(points) if section.quality is None or p["quality"] >= section.quality]
    return {
        "points": points,
        "chosen": meets[-1] if meets and section.decides else None,
        "evaluations": bench.evaluated,
        "candidates": sum(len(p["tried"]) for p in points),
        "seconds": {"dense": shared_seconds, "all": time.monotonic() - begin},
    }
