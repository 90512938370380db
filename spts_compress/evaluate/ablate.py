"""The method's parts one after another on one checkpoint: time, KV cache and scores of each, beside dense."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from ..cost import predicted
from ..modeling.configuration_spts import Amount, Schedule, Stage
from ..tasks.recovery import score_rows, summary
from ..tasks.runner import Answers, encode, run
from ..timing.pairs import in_turn, memory, ratio, seconds
from ..utils.store import fingerprint
from ..utils.tables import table
from .report import hardware
from .suites import Request, all_items, computed_how, mode_keys

FILES = ("answers.jsonl", "ablation.json", "ablation.md")  # in the output


def variants(schedule: Schedule, num_layers: int, length: int) -> dict[str, Schedule]:
    """Schedules that add the parts one by one, and two that replace a part: the feed-forward network's tokens chosen by
    attention alone, and one budget for all layers that keeps as many tokens active in total."""
    unpruned = tuple(replace(stage, prune_to=None) for stage in schedule.stages)
    active = [schedule.counts(layer, length)[1] for layer in range(schedule.start, num_layers)]
    even = (Stage(num_layers - 1, Amount(floor=round(sum(active) / len(active)))),)
    return {
        "+PAP": replace(schedule, stages=unpruned, ffn_selection="all"),
        "+PAP+LTP": replace(schedule, stages=unpruned),
        "+PAP+LTP+MSDP": schedule,
        "attention chooses FFN tokens": replace(schedule, ffn_selection="attention"),
        "uniform budgets": replace(schedule, stages=even),
    }


def argument(schedule: Schedule) -> dict[str, Any]:
    """A schedule as the model's `spts` argument."""
    return {k: v for k, v in schedule.to_dict().items() if k not in ("start", "proxy")}


def ablate(
    model: Any, tokenizer: Any, folder: Path, request: Request, output: Path, pairs: int, new_tokens: tuple[int, ...]
) -> dict[str, Any]:
    """Measure every variant on a prompt of the request's first length and on its tasks.

    Args:
        pairs: rounds in which all variants are timed in turn, after a warm-up.
        new_tokens: end-to-end times are taken with these.
    """
    length = request.lengths[0]
    schedule = model.config.schedule()
    tried = variants(schedule, model.config.num_hidden_layers, length)
    modes: dict[str, Any] = {"dense": False, **{name: argument(s) for name, s in tried.items()}}
    items = all_items(request, tokenizer)
    how = computed_how(model)
    own = mode_keys(folder, how)  # which reads all of the weights
    keys = {"dense": own["dense"], **{name: fingerprint(own["spts"], argument(s)) for name, s in tried.items()}}
    kept = Answers(output / "answers.jsonl")
    scored = score_rows(list(run(model, tokenizer, items, keys, kept, request.batch, modes)))
    ids = encode(tokenizer, [items[0].text], model.device)["input_ids"]
    runs = {name: partial(seconds, model, ids, (1, *new_tokens), spts=spts) for name, spts in modes.items()}
    with tqdm(total=pairs + 1, desc="timing", unit="round") as progress:
        kv = {name: memory(model, ids, spts=spts)["kv_bytes"] for name, spts in modes.items()}
        progress.update()
        times = in_turn(runs, pairs, progress.update)
    rows = []
    for name in modes:
        counted = 1.0 if name == "dense" else predicted(model.config, tried[name], ids.shape[1])["speedup"]
        ratios = {str(n): ratio(times, name, n)["median"] for n in times[name]}
        other = "+PAP" if name == "dense" else name  # a summary compares dense with another
        tasks = {row["task"]: row[name] for row in summary(scored, other)}
        rows.append(
            {
                "variant": name,
                "seconds": {str(n): median(v) for n, v in times[name].items()},
                "speedup": ratios,
                "counted": counted,
                "kv_bytes": kv[name],
                "scores": tasks,
            }
        )
    setting = {"hardware": hardware(str(model.device)), "how": how, "tokens": ids.shape[1], "pairs": pairs}
    return {"setting": {**setting, "items": request.items, "length": length}, "rows": rows}


def as_table(result: dict[str, Any]) -> str:
    """The ablation as a Markdown table."""
    rows, dense = [], result["rows"][0]
    numbers = list(dense["seconds"])
    for row in result["rows"]:
        times = [f"{row['speedup'][n]:.2f}x" for n in numbers]
        scores = [f"{100 * row['scores'][task]:.1f}" for task in dense["scores"]]
        kv = row["kv_bytes"] / dense["kv_bytes"]
        rows.append([row["variant"], *times, f"{row['counted']:.2f}x", f"{kv:.0%}", *scores])
    names = ["TTFT", *(f"{n} tokens" for n in numbers[1:])]
    return table([f"{result['setting']['tokens']} tokens", *names, "counted", "KV cache", *dense["scores"]], rows)


def save(result: dict[str, Any], output: Path) -> str:
    """Write `ablation.json` and `ablation.md` into `output`, and return the table."""
    made = as_table(result)
    (output / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "ablation.md").write_text(made + "\n")
    return made
