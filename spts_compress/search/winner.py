"""The best candidate at one cost: how good it is on prompts that it was not chosen on, and what makes it so."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..modeling.configuration_spts import Amount, Schedule
from .dense_reference import References
from .evaluator import Evaluator, Rows, by_kind, loss, quality
from .halving import Candidate
from .space import Costs, Target, reverted

FACTORS = (0.7, 1.4)  # of one stage's budget, to see what it is worth


def examine(
    tried: list[Candidate], target: Target, costs: Costs, evaluator: Evaluator, tune: References, held_out: References
) -> dict[str, Any]:
    """One point of the front, see `run`: of all candidates `tried` at a cost the first, which was chosen on the prompts
    `tune`, on those `held_out`, and what each of its values and budgets brings."""
    best = tried[0]
    [rows] = evaluator.rows([best.schedule], held_out)
    agreement, interval = quality(rows)
    scaled = {name: costs.scale_to_cost(params, target) for name, params in reverted(best.params).items()}
    without = {name: schedule for name, schedule in scaled.items() if schedule is not None}
    budgets = list(with_other_budgets(best.schedule))
    tried_too = [*without.values(), *(schedule for *_, schedule in budgets)]
    losses = [loss(each) for each in evaluator.rows(tried_too, tune)]
    return {
        "target": target,
        "cost": best.cost,
        "winner": best.plain(),
        "held_out": {"loss": loss(rows), "kinds": by_kind(rows), "prompts": len(rows)},
        "quality": agreement,
        "interval": interval,
        "without": dict(zip(without, losses[: len(without)], strict=True)),
        "budgets": [
            {"stage": stage, "factor": factor, "speedup": costs.of(schedule)["speedup"], "loss": worth}
            for (stage, factor, schedule), worth in zip(budgets, losses[len(without) :], strict=True)
        ],
        "diagnosis": diagnose(best, rows),
        "tried": [{k: v for k, v in c.plain().items() if k != "schedule"} for c in tried],
    }


def with_other_budgets(schedule: Schedule) -> Iterator[tuple[int, float, Schedule]]:
    """The schedule with one stage's tokens (and what may come into it) made fewer and more: stage from 0 and factor."""

    def times(amount: Amount, factor: float) -> Amount:
        return replace(amount, fraction=min(1.0, amount.fraction * factor), floor=round(amount.floor * factor))

    for number, stage in enumerate(schedule.stages):
        for factor in FACTORS:
            stages, ffn = list(schedule.stages), stage.ffn_budget
            ffn_budget = None if ffn is None else times(ffn, factor)
            stages[number] = replace(stage, budget=times(stage.budget, factor), ffn_budget=ffn_budget)
            if number and (prune_to := stages[number - 1].prune_to) is not None:
                stages[number - 1] = replace(stages[number - 1], prune_to=times(prune_to, max(1.0, factor)))
            changed = replace(schedule, stages=tuple(stages))
            if changed != schedule and not any(changed.faults(stages[-1].end + 1)):
                yield number, factor, changed


def diagnose(best: Candidate, held_out: Rows) -> list[str]:
    """What a loss looks like, in words; empty if nothing stands out."""
    rows = best.rows + held_out
    agreement = {kind: means["top1"] for kind, means in by_kind(rows).items()}
    worst, *others = sorted(agreement, key=lambda kind: agreement[kind])
    chosen_on, confirmed, probing = best.loss, loss(held_out), best.cost["probing_share"]
    kl = {length: [row["kl"] for row in rows if row["length"] == length] for length in {row["length"] for row in rows}}
    short, long = (sum(kl[length]) / len(kl[length]) for length in (min(kl), max(kl)))
    signs = {
        f"{worst} prompts lose most: the budgets are too low for them, or the probe misses their tokens": (
            bool(others) and agreement[worst] < agreement[others[0]] - 0.1
        ),
        "the figures differ much between the prompts searched on and the others: use more prompts": (
            max(chosen_on, confirmed) > 2 * min(chosen_on, confirmed) + 0.02
        ),
        f"probing takes {probing:.0%} of the FLOPs: a smaller probe window or smaller proxies": probing > 0.1,
        "longer prompts lose more: later or fewer stages, or a larger pruning margin": long > 2 * short + 0.02,
        "shorter prompts lose more: a floor under the budgets, or min_length": short > 2 * long + 0.02,
    }
    return [sign for sign, there in signs.items() if there]
