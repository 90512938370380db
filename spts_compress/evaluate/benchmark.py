"""Benchmarking a checkpoint: dense and SPTS on the same weights, in turn, at several prompt lengths and batches."""

import gc
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from tqdm import tqdm

from ..calibrate import data
from ..timing import latency_table
from ..timing.breakdown import parts
from ..timing.pairs import compare, stock_twin
from ..utils.errors import UserError
from ..utils.store import writing
from ..utils.tables import size, table
from .report import hardware
from .suites import load


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
        `rows`, one for each length and batch, with times, ratios, the ratio that operations allow (`counted`) and that
        this machine's speed allows (`calibrated`), memory, and the `parts` of the SPTS prefill; `break_even`, the
        prompt length from which skipping pays, None if it does at every length measured or at none; and `growth`.

    Raises:
        UserError: for bad lengths or a folder that holds no checkpoint.
    """
    if min([*lengths, *batches, new_tokens, pairs]) < 1 or new_tokens < 2:
        raise UserError("--lengths, --batch and --pairs must be at least 1, --new-tokens at least 2")
    spts, tokenizer = load(folder, device, dtype)
    limit = spts.config.max_position_embeddings
    if max(lengths) + new_tokens > limit:
        raise UserError(f"--lengths: {max(lengths)} and {new_tokens} new tokens are more than the context of {limit}")
    dense = stock_twin(spts)
    prose = tokenizer("\n\n".join(data.python_docs()), verbose=False)["input_ids"]
    schedule = spts.config.schedule()
    result: dict[str, Any] = {
        "command": command,
        "hardware": hardware(device),
        "dtype": dtype,
        "spts": schedule.to_dict(),
        "rows": [],
        "break_even": None,
        "growth": None,
    }
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(lengths) * len(batches) * (pairs + 1), desc="timing", unit="round") as progress:
        for batch in batches:
            for length in lengths:
                starts = [i * 997 % max(1, len(prose) - length) for i in range(batch)]
                rows = [(prose[s:] + prose)[:length] for s in starts]
                ids = torch.tensor(rows, device=spts.device)
                row = compare(dense, spts, ids, pairs, new_tokens, progress.update)
                row["calibrated"] = latency_table.calibrated(dense, schedule, ids)
                row["parts"] = parts(spts, ids) if schedule.skips(length) else {}
                result["rows"].append(row)
                result["break_even"], result["growth"] = break_even(result["rows"]), growth(result["rows"])
                with writing(output / "bench.json") as partial:
                    partial.write_text(json.dumps(result, indent=1) + "\n")
                gc.collect()
    return result


def break_even(rows: list[dict[str, Any]]) -> int | None:
    """Prompt length at which the TTFT ratio passes 1, on a line between the lengths measured; batch 1 only."""
    known = sorted((row["tokens"], row["ttft_ratio"]["median"]) for row in rows if row["batch"] == 1)
    for (shorter, low), (longer, high) in pairwise(known):
        if low < 1 <= high:
            return round(shorter + (longer - shorter) * (1 - low) / (high - low))
    return None


def growth(rows: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """TTFT of dense and SPTS as a n + b n^2, n in thousands of tokens: [a, b] in seconds, neither negative, by least
    squares of the relative errors; batch 1 only, None for fewer than three lengths."""
    single = [row for row in rows if row["batch"] == 1]
    if len({row["tokens"] for row in single}) < 3:
        return None
    n = np.array([row["tokens"] / 1000 for row in single])
    times = {name: np.array([row[name]["ttft"] for row in single]) for name in ("dense", "spts")}
    return {name: nnls(np.stack([n / t, n * n / t], 1), np.ones_like(n))[0].tolist() for name, t in times.items()}


def as_tables(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    rows, shares = [], []
    for row in result["rows"]:
        found, (low, high) = row["ttft_ratio"]["median"], row["ttft_ratio"]["range"]
        dense, spts = row["dense"], row["spts"]
        rows.append(
            [
                row["tokens"],
                row["batch"],
                f"{dense['ttft']:.2f} s",
                f"{spts['ttft']:.2f} s",
                f"{found:.2f}x ({low:.2f}-{high:.2f})",
                f"{row['counted']['speedup']:.2f}x, {found / row['counted']['speedup']:.0%}",
                f"{row['calibrated']:.2f}x, {found / row['calibrated']:.0%}",
                f"{row['end_to_end_ratio']['median']:.2f}x",
                f"{1 / dense['per_decoded_token']:.1f} / {1 / spts['per_decoded_token']:.1f}, "
                f"{row['decode_ratio']['median']:.2f}x",
                f"{size(spts['kv_bytes'])} ({spts['kv_bytes'] / dense['kv_bytes']:.0%})",
                f"{size(spts['peak_bytes'])} ({spts['peak_bytes'] / max(1, dense['peak_bytes']):.0%})",
            ]
        )
        whole = sum(row["parts"].values())
        shares.append([row["tokens"], row["batch"], *(f"{row['parts'].get(p, 0) / (whole or 1):.1%}" for p in PARTS)])
    names = ["tokens", "batch", "TTFT dense", "SPTS", "dense / SPTS", "counted, share", "calibrated, share"]
    more = [
        f"{result['rows'][0]['new_tokens']} tokens, end to end",
        "tokens/s dense / SPTS, ratio",
        "KV SPTS",
        "peak SPTS",
    ]
    made = [table([*names, *more], rows), table(["tokens", "batch", *PARTS], shares)]
    if result["break_even"]:
        made.append(f"Skipping pays from {result['break_even']} tokens on.")
    if result["growth"]:
        terms = {name: f"{a:.3g} s n + {b:.3g} s n^2" for name, (a, b) in result["growth"].items()}
        made.append(f"TTFT for n thousand tokens, fitted: dense {terms['dense']}; SPTS {terms['spts']}.")
    return "\n\n".join(made)


PARTS = (
    "dense layers", "probing", "selecting", "gathers", "attention", "feed-forward", "rest",
)  # fmt: skip


def save(result: dict[str, Any], output: Path) -> str:
    """Write `bench.md` and, where matplotlib is there, `bench.png` beside `bench.json`; return the tables."""
    made = as_tables(result)
    (output / "bench.md").write_text(f"`{result['command']}`\n\n{made}\n")
    if importlib.util.find_spec("matplotlib"):
        draw(result, output / "bench.png")
    return made


def draw(result: dict[str, Any], target: Path) -> None:
    """TTFT against length, and the speed-up against length beside what is possible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for batch in dict.fromkeys(row["batch"] for row in result["rows"]):
        rows = sorted((row for row in result["rows"] if row["batch"] == batch), key=lambda row: row["tokens"])
        x = [row["tokens"] for row in rows]
        for name, style in (("dense", "o--"), ("spts", "o-")):
            times.plot(x, [row[name]["ttft"] for row in rows], style, label=f"{name}, batch {batch}")
        ratios.plot(x, [row["ttft_ratio"]["median"] for row in rows], "o-", label=f"measured, batch {batch}")
        ratios.plot(x, [row["calibrated"] for row in rows], "^:", label=f"calibrated, batch {batch}")
    counted = sorted({(row["tokens"], row["counted"]["speedup"]) for row in result["rows"]})
    ratios.plot(*zip(*counted, strict=True), "k--", label="counted")
    ratios.axhline(1, color="grey", linewidth=0.8)
    times.set(title="Time to first token", xlabel="prompt tokens", ylabel="seconds", xscale="log", yscale="log")
    ratios.set(title="Dense over SPTS", xlabel="prompt tokens", xscale="log")
    for axis in (times, ratios):
        axis.legend(fontsize=7)
    figure.savefig(target, dpi=110)
