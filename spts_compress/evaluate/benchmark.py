"""Benchmarking a checkpoint: dense and SPTS on the same weights, in turn, at several prompt lengths and batches."""

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from tqdm import tqdm

from ..calibrate import data
from ..cost import predicted
from ..timing import latency_table
from ..timing.breakdown import parts
from ..timing.pairs import Way, compare, stock_twin
from ..utils import tables
from ..utils.devices import hardware
from ..utils.errors import UserError
from ..utils.tables import COLOURS, LABELS, PALETTE, plot_interval
from .columns import bench_tables
from .suites import load

FILES = tables.files("bench")  # in the output


def run(
    folder: Path,
    lengths: list[int],
    batches: list[int],
    new_tokens: int,
    pairs: int,
    device: str,
    dtype: str,
    output: Path,
    command: str,
) -> dict[str, Any]:
    """Measure the checkpoint `folder`; every finished row is in `output`/bench.json at once.

    Returns:
        `rows`, one for each length and batch: what `compare` gives, whether SPTS `skips` any token, `flops` (counted:
        the ratio they allow), `calibrated` (the ratio that this machine's speed allows), and the `breakdown` of the
        SPTS prefill in seconds;
        `break_even`, see `crossing`; and `growth`.

    Raises:
        UserError: for bad lengths or a folder that holds no checkpoint.
    """
    if min([*lengths, *batches, new_tokens, pairs]) < 1 or new_tokens < 2:
        raise UserError("--lengths, --batch and --pairs must be at least 1, --new-tokens at least 2")
    longest = max(lengths) + new_tokens
    spts, tokenizer, _ = load(folder, device, dtype, longest, "--lengths and --new-tokens")
    dense, schedule = stock_twin(spts), spts.config.schedule()
    text = tokenizer("\n\n".join(data.python_docs()), verbose=False)["input_ids"]
    text *= 1 + max(lengths) // len(text)
    result: dict[str, Any] = {
        "command": command,
        "hardware": hardware(device),
        "dtype": dtype,
        "spts": schedule.to_dict(),
        "rows": [],
    }
    with tqdm(total=len(lengths) * len(batches) * (pairs + 1), desc="timing", unit="round") as progress:
        for batch in batches:
            for length in lengths:
                starts = [i * 997 % (len(text) - length) for i in range(batch)]
                ids = torch.tensor([text[s : s + length] for s in starts], device=spts.device)
                ways: dict[str, Way] = {"dense": (dense, {}), "spts": (spts, {})}
                row = compare(ways, ids, pairs, (1, new_tokens), progress.update)
                row["skips"] = schedule.skips(length)
                row["flops"] = predicted(spts.config, schedule, length)
                row["calibrated"] = latency_table.calibrated(dense, schedule, ids)
                row["breakdown"] = parts(spts, ids) if row["skips"] else {}
                result["rows"].append(row)
                result |= {"break_even": crossing(result["rows"]), "growth": growth(result["rows"])}
                if len(result["rows"]) == 1:
                    tables.keep_earlier(output, FILES)
                tables.save_data(result, output, "bench")
                gc.collect()
    return result


def crossing(rows: list[dict[str, Any]]) -> int | None:
    """Prompt length from which on the TTFT ratio stays above 1, on a line between the lengths measured; None if it does
    at all of them or not at the longest. Only of rows that skip tokens, batch 1."""
    some = [row for row in rows if row["batch"] == 1 and row["skips"]]
    ratios = sorted((row["tokens"], row["spts"]["speedup"][0]["median"]) for row in some)
    for (shorter, low), (longer, high) in reversed([*pairwise(ratios)]):
        if high < 1:
            return None
        if low < 1:
            return round(shorter + (longer - shorter) * (1 - low) / (high - low))
    return None


def growth(rows: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """TTFT of dense and SPTS as a n + b n^2, n in thousands of tokens: [a, b] in seconds, neither negative, by least
    squares of the relative errors. Only of rows that skip tokens, batch 1; None for fewer than three lengths."""
    single = [row for row in rows if row["batch"] == 1 and row["skips"]]
    if len({row["tokens"] for row in single}) < 3:
        return None
    n = np.array([row["tokens"] / 1000 for row in single])
    times = {name: np.array([row[name]["seconds"][0] for row in single]) for name in LABELS}
    return {name: nnls(np.stack([n / t, n * n / t], 1), np.ones_like(n))[0].tolist() for name, t in times.items()}


def save(result: dict[str, Any], output: Path) -> str:
    """Write `bench.json`, `bench.md` and `bench.png` into `output`; return the tables."""
    shown = f"`{result['command']}`\n\n{bench_tables(result)}"
    return tables.save(result, shown, output, "bench", lambda figure: draw(result, figure))


def draw(result: dict[str, Any], figure: Any) -> None:
    """TTFT against length, and the speed-up against length beside what is possible; ranges over all rounds."""
    times, ratios = figure.subplots(1, 2)
    batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
    for marker, batch in zip("os^vDP*X" * len(batches), batches, strict=False):
        rows = sorted((row for row in result["rows"] if row["batch"] == batch), key=lambda row: row["tokens"])
        x, suffix = [row["tokens"] for row in rows], f", batch {batch}" if len(batches) > 1 else ""
        for name, style in (("dense", "--"), ("spts", "-")):
            taken = [row[name]["rounds"][0] for row in rows]
            looks = {"color": COLOURS[name], "linestyle": style, "label": LABELS[name] + suffix, "marker": marker}
            ends = [(min(values), max(values)) for values in taken]
            plot_interval(times, x, [row[name]["seconds"][0] for row in rows], ends, **looks)
        measured = [row["spts"]["speedup"][0] for row in rows]
        looks = {"color": COLOURS["spts"], "label": f"measured{suffix}", "marker": marker}
        plot_interval(ratios, x, [m["median"] for m in measured], [m["range"] for m in measured], **looks)
        bound = [row["calibrated"] for row in rows]
        ratios.plot(x, bound, f"{marker}:", color=PALETTE[2], label=f"this machine's speed allows{suffix}")
    flops = sorted({(row["tokens"], row["flops"]["speedup"]) for row in result["rows"]})
    ratios.plot(*zip(*flops, strict=True), "--", color=PALETTE[1], label="FLOPs allow")
    ratios.axhline(1, color="#BBBBBB", linewidth=0.8)
    times.set(title="Time to first token", ylabel="TTFT, s", xscale="log", yscale="log")
    ratios.set(title="Speed-up", ylabel="TTFT, dense / SPTS", xscale="log")
    ticks = sorted({row["tokens"] for row in result["rows"]})
    for axis in (times, ratios):
        axis.set_xlabel("prompt tokens")
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.legend()
