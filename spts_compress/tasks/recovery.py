"""Scores of two modes on the same examples, and how much of the dense score is recovered."""

import math
import warnings
from collections import defaultdict
from statistics import fmean as mean
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

from .longbench import judged_part
from .scorers import score


def score_rows(rows: list[dict]) -> list[dict]:
    """Rows with their `score`, always made anew from the answers."""
    return [
        {**row, "score": score(row["scorer"], judged_part(row["task"], row["answer"]), row["outputs"], row["classes"])}
        for row in rows
    ]


def interval(dense: list[float], other: list[float], seed: int = 0) -> tuple[float, float] | None:
    """95% bootstrap interval (percentile, paired, 2000 resamples) of mean(other) / mean(dense); None where the dense
    mean is 0, or is in more resamples than the interval may leave out, or there are fewer than 2 examples."""
    if len(dense) < 2 or not any(dense):
        return None

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        bottom = np.mean(a, axis=axis)
        return np.where(bottom > 0, np.mean(b, axis=axis) / np.where(bottom > 0, bottom, 1), np.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # equal scores have an interval of one point
        drawn = bootstrap(
            (np.array(dense), np.array(other)), ratio, paired=True, vectorized=True, n_resamples=2000,
            method="percentile", rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    known = drawn[np.isfinite(drawn)]
    if (share := len(known) / len(drawn)) < 0.975:
        return None
    low, high = np.quantile(known, (0.025 / share, 0.975 / share))  # the others count as larger
    return float(low), float(high)


def summary(rows: list[dict], mode: str = "spts") -> list[dict[str, Any]]:
    """Per task and length: number of examples, and of those `unskipped` of which SPTS skips no token (by the rows'
    `skips`), their mean `tokens`, mean scores of dense and `mode`, recovery with its interval."""
    scores: dict[tuple[str, int], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    unskipped = {(row["task"], row["limit"], row["index"]) for row in rows if row.get("skips") is False}
    for row in rows:
        scores[row["task"], row["limit"]][row["mode"]][row["index"]] = row["score"]
    result = []
    for (task, limit), modes in scores.items():
        if not (both := sorted(set(modes["dense"]) & set(modes[mode]))):
            continue
        dense, other = ([modes[name][i] for i in both] for name in ("dense", mode))
        result.append(
            {
                "task": task,
                "length": limit,
                "items": len(both),
                "unskipped": sum((task, limit, i) in unskipped for i in both),
                "tokens": mean_tokens([row for row in rows if (row["task"], row["limit"]) == (task, limit)]),
                "dense": sum(dense) / len(dense),
                mode: sum(other) / len(other),
                "recovery": sum(other) / sum(dense) if any(dense) else None,
                "interval": interval(dense, other),
            }
        )
    return result


def mean_tokens(rows: list[dict]) -> int:
    """Tokens of the prompts, answers included, on average: fewer than what they were cut to where text is short."""
    return round(mean([row["tokens"] + row["answer_tokens"] for row in rows]))


def fidelity_summary(rows: list[dict]) -> dict[str, Any]:
    """Means over the rows of free answers, see `agreement.measure`; what was not measured is None."""
    modes, losses = ("dense", "spts"), [row["loss"] for row in rows if row.get("loss")]
    top1: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        top1[row["task"]].append(row["top1"])
    return {
        "items": len(rows),
        "unskipped": sum(row.get("skips") is False for row in rows),
        "tokens": mean_tokens(rows),
        "kl": mean([row["kl"] for row in rows]),
        "top1": mean([row["top1"] for row in rows]),
        "interval": interval([1.0] * len(rows), [row["top1"] for row in rows]),
        "tasks": {task: mean(values) for task, values in top1.items()},
        "repeats": {m: sum(row["repeats"][m] for row in rows) for m in modes} if "repeats" in rows[0] else None,
        "perplexity": {m: math.exp(mean([loss[m] for loss in losses])) for m in modes} if losses else None,
    }
