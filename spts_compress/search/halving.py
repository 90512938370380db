"""The search itself: successive halving over drawn candidates of equal cost, then over variations of the best."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..modeling.configuration_spts import Schedule
from .space import ScheduleParams, draw, vary

KEEP = 3  # one candidate in so many goes on
ELITE = 4  # and these at least

Rows = list[dict[str, Any]]
Evaluate = Callable[[Schedule, int], Rows]  # rows of the first so many prompts


@dataclass(frozen=True)
class Candidate:
    """A shape scaled to the wanted cost, what it costs, and its rows on the prompts it was tried on."""

    shape: ScheduleParams
    schedule: Schedule
    cost: dict[str, float]
    rows: Rows

    @property
    def loss(self) -> float:
        return loss(self.rows)

    def plain(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "schedule": self.schedule.to_dict(),
            "cost": self.cost,
            "loss": self.loss,
            "prompts": len(self.rows),
            "kinds": by_kind(self.rows),
        }


def by_kind(rows: Rows) -> dict[str, dict[str, float]]:
    """Means of each measure for each kind of prompt."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return {
        kind: {name: sum(row[name] for row in group) / len(group) for name in ("kl", "top1", "same")}
        for kind, group in groups.items()
    }


def loss(rows: Rows) -> float:
    """Mean over the kinds of their mean KL, and the worst kind's, in equal parts: nats."""
    kl = [kind["kl"] for kind in by_kind(rows).values()]
    return (sum(kl) / len(kl) + max(kl)) / 2


def rungs(prompts: int, turn: int) -> list[int]:
    """Prompts that candidates are tried on, one number a round of halving: about a quarter, half, and all, in whole
    turns of `turn` prompts, so that every kind and length is there from the first on."""
    turns = prompts // turn
    return [turn * n for n in sorted({-(-turns // 4), -(-turns // 2), turns})]


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The first of those that did the same on every prompt: what they differ in made no difference."""
    found: dict[tuple[float, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(tuple(round(row["kl"], 6) for row in candidate.rows), candidate)
    return list(found.values())


def halve(candidates: list[Candidate], prompts: int, turn: int, evaluate: Evaluate) -> list[Candidate]:
    """All candidates: those that stayed to be tried on all prompts, best first, then those that fell out."""
    out: list[Candidate] = []
    sizes = rungs(prompts, turn)
    for number, size in enumerate(sizes):
        tried = [Candidate(c.shape, c.schedule, c.cost, evaluate(c.schedule, size)) for c in candidates]
        tried.sort(key=lambda c: c.loss)
        keep = len(tried) if number + 1 == len(sizes) else max(ELITE, len(tried) // KEEP)
        candidates = distinct(tried)[:keep]
        out = [c for c in tried if c not in candidates] + out
    return candidates + out


def _child(rng: random.Random, parents: list[ScheduleParams], choices: dict[str, tuple]) -> ScheduleParams:
    return vary(rng, rng.choice(parents), choices, rng.choice(parents))


def search(
    scaled: Callable[[ScheduleParams], Candidate | None],
    evaluate: Evaluate,
    prompts: int,
    turn: int,
    choices: dict[str, tuple],
    seeds: list[ScheduleParams],
    count: int,
    rounds: int,
    seed: int,
) -> list[Candidate]:
    """All candidates, those tried on all prompts first, best first.

    Args:
        scaled: a shape at the wanted cost without rows; None if it can't be had.
        turn: so many prompts after one another are one of each kind and length.
        choices: what each value of a shape is drawn from.
        seeds: shapes that are tried in any case.
        count: candidates drawn at first; each of the `rounds` of variation has half as many.
    """
    rng = random.Random(seed)
    seen: dict[Schedule, Candidate] = {}

    def new(shape: ScheduleParams) -> Candidate | None:
        made = scaled(shape)
        if made is None or made.schedule in seen:
            return None
        seen[made.schedule] = made
        return made

    def drawn(wanted: int, make: Callable[[], ScheduleParams]) -> list[Candidate]:
        found: list[Candidate] = []
        for _ in range(50 * wanted):
            if len(found) < wanted and (made := new(make())) is not None:
                found.append(made)
        return found

    pool = [made for shape in seeds if (made := new(shape)) is not None]
    pool = halve(pool + drawn(count, lambda: draw(rng, choices)), prompts, turn, evaluate)
    for _ in range(rounds):
        best = distinct([c for c in pool if len(c.rows) == prompts])[:ELITE]
        if not best:
            break
        parents = [c.shape for c in best]
        children = drawn(count // 2, partial(_child, rng, parents, choices))
        tried = halve([*best, *children], prompts, turn, evaluate)
        there = {c.schedule for c in tried}
        pool = sorted([*tried, *(c for c in pool if c.schedule not in there)], key=lambda c: (-len(c.rows), c.loss))
    return pool
