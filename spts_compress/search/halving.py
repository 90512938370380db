"""The search itself: successive halving over drawn candidates of equal cost, then over variations of the best."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..modeling.configuration_spts import Schedule
from ..recipe import ScheduleParams, SearchSection
from .candidate import Candidate
from .evaluator import Rows
from .space import Choices, draw, vary

KEEP = 3  # one candidate in so many goes on
ELITE = 4  # and these at least


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


def halve(
    candidates: list[Candidate], prompts: int, turn: int, evaluate: Callable[[Schedule, int], Rows]
) -> list[Candidate]:
    """All candidates: those that stayed to be tried on all prompts, best first, then those that fell out.

    Args:
        evaluate: rows of a schedule on the first so many prompts.
    """
    fallen: list[Candidate] = []
    for size in rungs(prompts, turn):
        tried = [replace(c, rows=evaluate(c.schedule, size)) for c in candidates]
        tried.sort(key=lambda c: c.loss)
        keep = len(tried) if size == prompts else max(ELITE, len(tried) // KEEP)
        candidates = distinct(tried)[:keep]
        fallen = [c for c in tried if c not in candidates] + fallen
    return candidates + fallen


def search(
    scaled: Callable[[ScheduleParams], Candidate | None],
    evaluate: Callable[[Schedule, int], Rows],
    section: SearchSection,
    choices: Choices,
    seeds: list[ScheduleParams],
) -> list[Candidate]:
    """All candidates, those tried on all prompts first, best first.

    Args:
        scaled: parameters at the wanted cost without rows; None if it can't be had.
        evaluate: rows of a schedule on the first so many prompts.
        seeds: parameters that are tried in any case.
    """
    rng, prompts, turn = random.Random(section.seed), section.num_prompts, section.turn
    seen: set[Schedule] = set()

    def fresh(stream: Iterable[ScheduleParams], wanted: int | None = None) -> list[Candidate]:
        """The first `wanted` candidates (all) whose schedules were not met before."""
        candidates: list[Candidate] = []
        for params in stream:
            candidate = scaled(params)
            if candidate is not None and candidate.schedule not in seen:
                seen.add(candidate.schedule)
                candidates.append(candidate)
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
        schedules = {c.schedule for c in tried}
        pool = sorted([*tried, *(c for c in pool if c.schedule not in schedules)], key=lambda c: (-len(c.rows), c.loss))
    return pool
