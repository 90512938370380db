"""The columns of every table about a checkpoint, each with how a row is shown: add one here."""

from typing import Any

from ..utils.tables import Show, columns_table, size

SPEED: dict[str, Show] = {
    "prompt tokens": lambda row: f"{row['tokens']}" if row.get("skips", True) else f"{row['tokens']} (not skipped)",
    "TTFT dense": "{dense[seconds][0]:.2f} s",
    "TTFT SPTS": "{spts[seconds][0]:.2f} s",
    "dense / SPTS (range)": lambda row: "{:.2f}x ({:.2f}-{:.2f})".format(
        row["spts"]["speedup"][0]["median"],
        *row["spts"]["speedup"][0]["range"],
    ),
    "FLOPs, dense / SPTS": "{flops[speedup]:.2f}x",
    "KV dense": lambda row: size(row["dense"]["kv_bytes"]),
    "KV SPTS": lambda row: share_of_dense(row, "kv_bytes"),
}


MANY = 30  # prompts, from which on a bootstrap interval of a mean holds about what it says
UNSKIPPED = (
    "**Not skipped**: these prompts are shorter than the schedule's `min_length` or its budgets, so SPTS ran dense on "
    "them, and their figures say nothing of skipping."
)


OVERLAPPING = (
    "**Overlapping**: the text for free answers is shorter than their prompts together, so that prompts share parts of "
    "it, and the interval is narrower than that of as many different texts."
)


FEW = f"Intervals of fewer than {MANY} prompts are too narrow, most of all where all have the same score."
ON_NEEDLES = (
    "Probing queries were corrected on needles of RULER's kind, in other text: scores of such tasks are of what was "
    "fitted on."
)


def on_needles(report: dict[str, Any]) -> bool:
    """Whether a checkpoint's probing queries were corrected on needles, and it brought something."""
    brought = report.get("queries")
    if not isinstance(brought, dict) or brought.get("before") == brought.get("after"):
        return False
    return "needles" in brought.get("kinds", ["needles"])  # reports did not tell, once


def share_of_dense(row: dict[str, Any], what: str) -> str:
    """Bytes of SPTS, and what part of dense's they are."""
    dense, spts = (row[mode][what] for mode in ("dense", "spts"))
    return f"{size(spts)} ({spts / dense:.0%})" if dense else size(spts)


def prompts(row: dict[str, Any]) -> str:
    """The number of prompts, and of those that SPTS read as dense does, since they have no token to skip."""
    unskipped = row.get("unskipped")
    return f"{row['items']} ({unskipped} not skipped)" if unskipped else f"{row['items']}"


def lengths(row: dict[str, Any]) -> str:
    """What prompts were cut to, and how long they are on average if that is much less, as of short documents."""
    short = row.get("tokens", row["length"]) < 0.9 * row["length"]
    return f"{row['length']}" + (f" at most, mean {row['tokens']}" if short else "")


def _interval(row: dict, spec: str) -> str:
    return " ({:{spec}}-{:{spec}})".format(*row["interval"], spec=spec) if row["interval"] else ""


def _if_measured(part: str, name: str, spec: str) -> Show:
    """A value of a row's part; blank where it is not there."""
    return lambda row: format(row[part][name], spec) if name in (row.get(part) or ()) else ""


TASK_COLUMNS: dict[str, Show] = {
    "task": "{task}",
    "tokens": lengths,
    "prompts": lambda row: prompts(row),
    "dense": lambda row: f"{100 * row['dense']:.1f}",
    "SPTS": lambda row: f"{100 * row['spts']:.1f}",
    "recovery (95% interval)": lambda row: (
        "" if row["recovery"] is None else f"{row['recovery']:.2f}{_interval(row, '.2f')}"
    ),
}
FIDELITY_COLUMNS: dict[str, Show] = {
    "free answers about": "{prompts}",
    "tokens": lengths,
    "prompts": lambda row: prompts(row),
    "next token as dense (95% interval)": lambda row: f"{row['top1']:.1%}{_interval(row, '.1%')}",
    "KL, nats": "{kl:.3f}",
    "repeating, dense": _if_measured("repeats", "dense", ""),
    "repeating, SPTS": _if_measured("repeats", "spts", ""),
    "perplexity of following text, dense": _if_measured("perplexity", "dense", ".2f"),
    "perplexity of following text, SPTS": _if_measured("perplexity", "spts", ".2f"),
}


def _proxy_size(fit: dict) -> str:
    chosen = fit["candidates"][fit["chosen"]]
    return f"{chosen['channels']} channels, rank {chosen['rank']}" if chosen["rank"] else "regression"


PROXIES: dict[str, Show] = {
    "proxy": _proxy_size,
    "of dense FLOPs": lambda fit: f"{fit['candidates'][fit['chosen']]['cost']:.2%}",
    "budget": "{share:.0%}",
    "Spearman": "{proxy[spearman]:.2f}",
    "Spearman of input norm": "{input_norm[spearman]:.2f}",
    "recall": "{proxy[recall]:.2f}",
    "recall of input norm": "{input_norm[recall]:.2f}",
    "Spearman, skipped states": _if_measured("skipped", "spearman", ".2f"),
    "recall, skipped states": _if_measured("skipped", "recall", ".2f"),
    "why this size": "{reason}",
}
UPDATES: dict[str, Show] = {
    "R^2 of the update, attention": _if_measured("update", "attention", ".2f"),
    "R^2 of the update, feed-forward": _if_measured("update", "ffn", ".2f"),
}
BENCH: dict[str, Show] = {
    **{name: SPEED[name] for name in ("prompt tokens", "TTFT dense", "TTFT SPTS", "dense / SPTS (range)")},
    "batch": "{batch}",
    "FLOPs allow (reached)": lambda row: _bound(row, row["flops"]["speedup"]),
    "this machine allows (reached)": lambda row: _bound(row, row["calibrated"]),
    "new tokens": lambda row: row["new_tokens"][-1],
    "end to end, dense / SPTS": "{spts[speedup][1][median]:.2f}x",
    "tokens/s dense / SPTS, ratio": lambda row: (
        f"{_rate(row, 'dense'):.1f} / {_rate(row, 'spts'):.1f}, {row['spts']['decode']['speedup']['median']:.2f}x"
    ),
    "KV SPTS": SPEED["KV SPTS"],
    "peak SPTS": lambda row: share_of_dense(row, "peak_bytes"),
}
PARTS = ("dense layers", "probing", "selecting", "gathers", "attention", "updates", "feed-forward", "rest")


def _bound(row: dict, speedup: float) -> str:
    return f"{speedup:.2f}x ({row['spts']['speedup'][0]['median'] / speedup:.0%})"


def _rate(row: dict, mode: str) -> float:
    """Tokens a second after the first ones, of all rows of the batch together."""
    return row["batch"] / row[mode]["decode"]["seconds"]


def _share_of_time(part: str) -> Show:
    return lambda row: f"{row['breakdown'].get(part, 0) / (sum(row['breakdown'].values()) or 1):.1%}"


BREAKDOWN: dict[str, Show] = {
    "prompt tokens": "{tokens}",
    "batch": "{batch}",
    **{part: _share_of_time(part) for part in PARTS},
}


def speed_table(report: dict) -> str:
    return columns_table(SPEED, report["speed"])


def score_tables(result: dict) -> str:
    """Scores of `tasks` and `fidelity` of free answers, of a report or an evaluation, with `notes` on their text;
    empty if none was measured."""
    both = ((TASK_COLUMNS, result["tasks"]), (FIDELITY_COLUMNS, result["fidelity"]))
    parts = [columns_table(columns, rows) for columns, rows in both if rows]
    if any(row.get("unskipped") for _, rows in both for row in rows):
        parts.append(UNSKIPPED)
    if any(row.get("overlap") for row in result["fidelity"]):
        parts.append(OVERLAPPING)
    if any(row["items"] < MANY and row["interval"] for _, rows in both for row in rows):
        parts.append(FEW)
    parts += result.get("notes", [])
    return "\n\n".join(parts)


BROUGHT = {  # by the part of the report: what is said if nothing was better, and what if something was
    "queries": (
        "Corrections of the probing queries brought nothing, and were taken back.",
        "Corrections of the probing queries take what tokens are ranked by nearer to what an answer attends to: KL "
        "{before:.3f} -> {after:.3f} nats on held-out text, by which the best steps were chosen.",
    ),
    "distilled": (
        "Gradient steps toward the dense model's next tokens brought the updates nothing, and were taken back.",
        "Gradient steps then took the updates nearer to the dense model's next tokens (KL {before:.3f} -> {after:.3f} "
        "nats on held-out text after a prompt, by which the best steps were chosen); R^2 is of the updates before.",
    ),
}


def fitted(report: dict[str, Any]) -> list[str]:
    """The table of what was fitted, and in words what gradient steps brought; nothing where nothing was."""
    words = [BROUGHT[name][e["before"] != e["after"]].format(**e) for name in BROUGHT if (e := report.get(name))]
    return [*filter(None, [fit_table(report["proxies"])]), *words, *([ON_NEEDLES] if on_needles(report) else [])]


def fit_table(fits: list[dict]) -> str:
    """Every layer's proxy: its size, and how well it ranks tokens; and R^2 of its updates; empty if there are none."""
    parts = {"proxy": PROXIES, "update": UPDATES}
    shown = {name: show for part, columns in parts.items() if part in fits[0] for name, show in columns.items()}
    return columns_table({"layer": "{layer}", **shown}, fits) if shown else ""


def ablation_table(result: dict) -> str:
    """A row for each variant of the method; times are dense over the variant."""
    setting, dense = result["setting"], result["rows"][0]
    columns: dict[str, Show] = {f"{setting['tokens']} tokens": "{variant}"}
    for place, name in enumerate(["TTFT", *(f"{n} tokens, end to end" for n in setting["new_tokens"])]):
        columns[name] = f"{{speedup[{place}][median]:.2f}}x"
    columns["FLOPs"] = "{flop_speedup:.2f}x"
    columns["KV cache"] = lambda row: f"{row['kv_bytes'] / dense['kv_bytes']:.0%}"
    for task in dense["scores"]:
        columns[task] = f"{{scores[{task}]:.1%}}"
    table = columns_table(columns, result["rows"])
    if unskipped := setting.get("unskipped"):
        table += f"\n\n{UNSKIPPED} Prompts by variant: {', '.join(f'{n} ({c})' for n, c in unskipped.items())}."
    return table


def bench_tables(result: dict) -> str:
    """Times, memory and what bounds them by length and batch; the parts of the SPTS prefill; and what follows."""
    rows = result["rows"]
    parts = [columns_table(BENCH, rows), columns_table(BREAKDOWN, rows)]
    if not all(row["skips"] for row in rows):
        parts.append(UNSKIPPED)
    if result["break_even"]:
        parts.append(f"Skipping pays from {result['break_even']} tokens on.")
    if result["growth"]:
        terms = {name: f"{a:.3g} s n + {b:.3g} s n^2" for name, (a, b) in result["growth"].items()}
        parts.append(f"TTFT for n thousand tokens, fitted: dense {terms['dense']}; SPTS {terms['spts']}.")
    return "\n\n".join(parts)
