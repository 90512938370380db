"""The search itself: successive halving over drawn candidates of equal cost, then over variations of the best."""

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..modeling.configuration_spts import Schedule
from ..recipe import ScheduleParams, SearchSection
from .evaluator import Rows, by_kind, loss
from .space import Costs, Target, draw, vary

Evaluate = Callable[[list[Schedule], int], list[Rows]]  # of each schedule, the rows of the first so many prompts
KEEP = 3  # one candidate in so many goes on
ELITE = 4  # and these at least


@dataclass(frozen=True)
class Candidate:
    """Parameters scaled to the wanted cost, what that costs, and the rows of the prompts it was tried on."""

    params: ScheduleParams
    schedule: Schedule
    cost: dict[str, float]
    rows: Rows

    @property
    def loss(self) -> float:
        return loss(self.rows)

    def plain(self) -> dict[str, Any]:
        return {
            "params": asdict(self.params),
            "schedule": self.schedule.to_dict(),
            "cost": self.cost,
            "loss": self.loss,
            "prompts": len(self.rows),
            "kinds": by_kind(self.rows),
        }


def rungs(prompts: int, turn: int) -> list[int]:
    """Prompts that candidates are tried on, one number a round of halving: about a quarter, half, and all, in whole
    turns of `turn` prompts, so that every kind and length is there from the first on."""
    turns = prompts // turn
    return [turn * n for n in sorted({-(-turns // 4), -(-turns // 2), turns})]


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The first of those that did the same on every prompt: what they differ in made no difference."""
    firsts: dict[tuple[float, ...], Candidate] = {}
    for candidate in candidates:
        firsts.setdefault(tuple(round(row["kl"], 6) for row in candidate.rows), candidate)
    return list(firsts.values())


def halve(candidates: list[Candidate], prompts: int, turn: int, evaluate: Evaluate) -> list[Candidate]:
    """All candidates: those that stayed to be tried on all prompts, best first, then those that fell out."""
    fallen: list[Candidate] = []
    for size in rungs(prompts, turn):
        found = evaluate([c.schedule for c in candidates], size)
        tried = [replace(c, rows=rows) for c, rows in zip(candidates, found, strict=True)]
        tried.sort(key=lambda c: c.loss)
        keep = len(tried) if size == prompts else max(ELITE, len(tried) // KEEP)
        candidates = distinct(tried)[:keep]
        fallen = [c for c in tried if c not in candidates] + fallen
    return candidates + fallen


def search(
    costs: Costs, target: Target, evaluate: Evaluate, section: SearchSection, seeds: list[ScheduleParams]
) -> list[Candidate]:
    """All candidates, those tried on all prompts first, best first; `seeds` are tried in any case."""
    rng, prompts, turn = random.Random(section.seed), section.num_prompts, section.turn
    choices = section.drawn_from(costs.config.num_hidden_layers)
    seen: set[Schedule] = set()

    def fresh(stream: Iterable[ScheduleParams], wanted: int | None = None) -> list[Candidate]:
        """The first `wanted` candidates (all) whose schedules were not met before."""
        candidates: list[Candidate] = []
        for params in stream:
            schedule = costs.scale_to_cost(params, target)
            if schedule is not None and schedule not in seen:
                seen.add(schedule)
                candidates.append(Candidate(params, schedule, costs.of(schedule), []))
                if len(candidates) == wanted:
                    break
        return candidates

    count = section.candidates
    pool = [*fresh(seeds), *fresh((draw(rng, choices) for _ in range(50 * count)), count)]
    pool = halve(pool, prompts, turn, evaluate)
    for _ in range(section.rounds):
        best = distinct([c for c in pool if len(c.rows) == prompts])[:ELITE]
        if not best:
            break
        parents, count = [c.params for c in best], section.candidates // 2
        varied = (vary(rng, rng.choice(parents), choices, rng.choice(parents)) for _ in range(50 * count))
        tried = halve([*best, *fresh(varied, count)], prompts, turn, evaluate)
        most = {c.schedule: c for c in sorted([*pool, *tried], key=lambda c: len(c.rows))}  # tried again, on fewer
        pool = sorted(most.values(), key=lambda c: (-len(c.rows), c.loss))
    return pool
