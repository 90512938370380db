"""Scores of two modes on the same items, and how much of the dense score is recovered."""

import warnings
from collections import defaultdict
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
    mean is 0 or there are fewer than 2 items."""
    if len(dense) < 2 or not any(dense):
        return None

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        bottom = np.mean(a, axis=axis)
        return np.where(bottom > 0, np.mean(b, axis=axis) / np.where(bottom > 0, bottom, 1), np.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # equal items have an interval of one point
        made = bootstrap(
            (np.array(dense), np.array(other)),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    drawn = made.bootstrap_distribution[np.isfinite(made.bootstrap_distribution)]
    return (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))) if len(drawn) else None


def summary(rows: list[dict], mode: str = "spts") -> list[dict[str, Any]]:
    """Per task and length: number of items, mean scores of dense and `mode`, recovery with its interval."""
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["task"], row["limit"]][row["mode"]][row["index"]] = row["score"]
    made = []
    for (task, limit), modes in found.items():
        both = sorted(set(modes["dense"]) & set(modes[mode]))
        if not both:
            continue
        dense, other = ([modes[name][i] for i in both] for name in ("dense", mode))
        top = sum(dense) / len(dense)
        made.append(
            {
                "task": task,
                "length": limit,
                "items": len(both),
                "dense": top,
                mode: sum(other) / len(other),
                "recovery": sum(other) / sum(dense) if top else None,
                "interval": interval(dense, other),
            }
        )
    return made
