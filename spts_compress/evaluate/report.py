"""What the finished checkpoint is like: dense and SPTS, same weights, same prompts, in one process."""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..cost import predicted
from ..fit import metrics
from ..recipe import ReportSection
from ..tasks import agreement, ruler
from ..tasks.example import Item
from ..tasks.runner import answers, encode
from ..tasks.scorers import score
from ..timing import pairs
from ..utils.errors import UserError
from ..utils.tables import size, table

NEEDLE_TOKENS = 32
TRIED = 2048  # what fits into so many tokens fits into more


def hardware(device: str) -> dict[str, Any]:
    """The machine and the versions a measurement was made with."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "spts_compress": __version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plain(section: ReportSection, tokenizer: Any, prose: str, length: int) -> list[Item]:
    return agreement.items(tokenizer, prose, length, 1, 1)


def _needles(section: ReportSection, tokenizer: Any, prose: str, length: int) -> list[Item]:
    asked = ruler.Needles(keys=section.keys)
    return ruler.items("needles", tokenizer, prose, length, section.needles, section.seed, NEEDLE_TOKENS, asked)


def _free(section: ReportSection, tokenizer: Any, prose: str, length: int) -> list[Item]:
    return agreement.items(tokenizer, prose, length, section.answers, section.answer_tokens)


def check_prompts(section: ReportSection, tokenizer: Any, prose: str) -> None:
    """Make the report's prompts, the long ones no longer than it takes to see that they fit.

    Raises:
        UserError: if one does not fit into its length, or `prose` has nothing to make them of.
    """
    asked = [("lengths", _plain, length) for length in section.lengths]
    asked += [("quality_length", make, section.longest) for make in (_needles, _free)]
    for name, make, length in asked:
        if length > TRIED:
            with suppress(UserError):
                make(section, tokenizer, prose, TRIED)
                continue
        try:
            make(section, tokenizer, prose, length)
        except UserError as error:
            raise UserError(f"report.{name}: {error}") from None


def measure_all(
    dense: Any,
    spts: Any,
    tokenizer: Any,
    prose: str,
    section: ReportSection,
    keep: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Everything the report holds.

    Args:
        prose: text that nothing was fitted on.
        keep: `keep(name, make)` returns a finished measurement of that name, or makes and keeps it.
    """
    schedule, quality = spts.config.schedule(), section.longest
    steps = len(section.lengths) * (section.pairs + 1) + section.needles + section.answers
    with tqdm(total=steps, desc="measuring", unit="step") as progress:

        def speed(length: int) -> dict:
            [item] = _plain(section, tokenizer, prose, length)
            inputs = encode(tokenizer, [item.text], dense.device)
            ids, models = inputs["input_ids"], {"dense": dense, "spts": spts}
            kept = {name: pairs.memory(model, ids)["kv_bytes"] for name, model in models.items()}
            progress.update()
            runs = {name: partial(pairs.seconds, model, ids, (1,)) for name, model in models.items()}
            times = pairs.in_turn(runs, section.pairs, progress.update)
            found = pairs.ratio(times, "spts", 1)
            return {
                "length": length,
                "tokens": ids.shape[1],
                "ttft": {name: taken[1] for name, taken in times.items()},
                "dense_s": median(times["dense"][1]),
                "spts_s": median(times["spts"][1]),
                "speedup": found["median"],
                "speedup_range": found["range"],
                "kv_bytes": kept,
                "predicted": predicted(spts.config, schedule, ids.shape[1]),
            }

        def needle(number: int) -> dict:
            item = items[number]
            got = {name: _answered(model, tokenizer, item) for name, model in (("dense", dense), ("spts", spts))}
            progress.update()
            return {"outputs": item.outputs, "tokens": item.tokens, **got}

        def agree(number: int) -> dict:
            inputs = encode(tokenizer, [prompts[number].text], dense.device)
            start = inputs["input_ids"].shape[1]
            own = dense.generate(**inputs, **agreement.GREEDY, max_new_tokens=section.answer_tokens)
            logs = [agreement.log_probabilities(m, own[:, :-1], own.shape[1] - start, None) for m in (dense, spts)]
            progress.update()
            return {"prompt_tokens": start, "tokens": own.shape[1] - start, **agreement.agreement(*logs)}

        def states() -> dict:
            if schedule.ffn_selection not in ("proxy", "relative"):
                return {}
            [item] = _plain(section, tokenizer, prose, quality)
            relative = schedule.ffn_selection == "relative"
            found = metrics.on_skipped_states(spts, encode(tokenizer, [item.text], spts.device), relative)
            return {str(layer): ranking for layer, ranking in found.items()}

        rows = [keep(f"speed-{length}", partial(speed, length)) for length in section.lengths]
        items = _needles(section, tokenizer, prose, quality)
        found = [keep(f"needle-{i}", partial(needle, i)) for i in range(section.needles)]
        prompts = _free(section, tokenizer, prose, quality)
        agreed = [keep(f"agreement-{i}", partial(agree, i)) for i in range(section.answers)]
        skipped = keep("skipped-states", states)
    return {
        "hardware": hardware(str(dense.device)),
        "dtype": str(spts.dtype).removeprefix("torch."),
        "quality_length": quality,
        "speed": rows,
        "needles": {"keys": section.keys, "items": found},
        "agreement": {"items": agreed},
        "skipped_states": skipped,
    }


def _answered(model: Any, tokenizer: Any, item: Item) -> dict[str, Any]:
    [text] = answers(model, tokenizer, [item], None)
    return {"answer": text, "score": score(item.scorer, text, item.outputs, item.classes)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def speed_table(report: dict) -> str:
    rows = []
    for row in report["speed"]:
        kv = row["kv_bytes"]
        low, high = row["speedup_range"]
        rows.append(
            [
                row["tokens"],
                f"{row['dense_s']:.2f} s",
                f"{row['spts_s']:.2f} s",
                f"{row['speedup']:.2f}x ({low:.2f}-{high:.2f})",
                f"{row['predicted']['speedup']:.2f}x",
                size(kv["dense"]),
                f"{size(kv['spts'])} ({kv['spts'] / kv['dense']:.0%})",
            ]
        )
    return table(["prompt tokens", "TTFT dense", "TTFT SPTS", "dense / SPTS", "counted", "KV dense", "KV SPTS"], rows)


def quality_table(report: dict) -> str:
    items, agreed = report["needles"]["items"], report["agreement"]["items"]
    keys = report["needles"]["keys"]
    rows = []
    if items:
        found = [f"{sum(i[name]['score'] for i in items):g} of {len(items)}" for name in ("dense", "spts")]
        rows.append([f"number hidden in the text found ({keys} key{'s' if keys > 1 else ''})", *found])
    if agreed:
        rows.append(
            [
                "next tokens agreeing with dense, along dense's own answers",
                "100%",
                f"{mean([a['top1'] for a in agreed]):.0%}",
            ]
        )
        rows.append(["KL(dense, SPTS) of the next token, nats", "0", f"{mean([a['kl'] for a in agreed]):.3f}"])
    return table([f"prompts of {report['quality_length']} tokens", "dense", "SPTS"], rows) if rows else ""


def fidelity_table(fits: list[dict]) -> str:
    rows = []
    for f in fits:
        chosen = f["candidates"][f["chosen"]]
        size_ = f"{chosen['channels']} channels, rank {chosen['rank']}" if chosen["rank"] else "regression"
        numbers = [f"{f[who][what]:.2f}" for what in ("spearman", "recall") for who in ("proxy", "input_norm")]
        skipped = [f"{f['skipped'][what]:.2f}" for what in ("spearman", "recall")] if "skipped" in f else ["", ""]
        budget = f"{f['share']:.0%}"
        rows.append([f["layer"], size_, f"{chosen['cost']:.2%}", budget, *numbers, *skipped, f["reason"]])
    names = ["layer", "proxy", "of dense FLOPs", "budget", "Spearman", "(input norm)", "recall", "(input norm)"]
    return table([*names, "Spearman, skipped states", "recall, skipped states", "why this size"], rows)
