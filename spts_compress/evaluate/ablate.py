"""The method's parts one after another on one checkpoint: time, KV cache and scores of each, beside dense."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..cost import predicted
from ..modeling.configuration_spts import Amount, Schedule, Stage
from ..tasks.recovery import score_rows, summary
from ..tasks.runner import encode, run
from ..timing.pairs import Way, compare
from ..utils import tables
from ..utils.errors import UserError
from ..utils.store import fingerprint
from .columns import ablation_table
from .suites import EvalConfig, FolderKeys, all_examples, begun, fitted_note, of_texts, require_context

FILES = ("answers.jsonl", *tables.files("ablation"))  # in the output


def variants(schedule: Schedule, num_layers: int, length: int) -> dict[str, Schedule]:
    """Schedules that add the parts one by one, and two that replace a part: the feed-forward network's tokens chosen by
    attention alone, where they are not anyway, and one budget for all layers that keeps as many tokens active in total,
    in attention and in the feed-forward network, in a prompt of `length` tokens."""
    unpruned = tuple(replace(stage, prune_to=None) for stage in schedule.stages)
    counts = [schedule.counts(layer, length) for layer in range(schedule.start, num_layers)]
    active = Amount(floor=round(fmean(count.active for count in counts)))
    ffn = Amount(floor=round(fmean(count.ffn_tokens for count in counts)))
    even = Stage(num_layers - 1, active, ffn_budget=ffn if any(stage.ffn_budget for stage in schedule.stages) else None)
    chosen = {"attention": "+FFN by attention", "all": ""}.get(schedule.ffn_selection, "+LTP")
    found = {
        "+PAP": replace(schedule, stages=unpruned, ffn_selection="all"),
        f"+PAP{chosen}": replace(schedule, stages=unpruned),
        f"+PAP{chosen}+MSDP": schedule,
        "attention chooses FFN tokens": replace(schedule, ffn_selection="attention"),
        "uniform budgets": replace(schedule, stages=(even,)),
    }
    if schedule.ffn_selection == "attention":
        del found["attention chooses FFN tokens"]
    return found


def argument(schedule: Schedule) -> dict[str, Any]:
    """A schedule as the model's `spts` argument."""
    return {k: v for k, v in schedule.to_dict().items() if k not in ("start", "proxy")}


def ablate(
    model: Any,
    tokenizer: Any,
    folder_keys: FolderKeys,
    config: EvalConfig,
    output: Path,
    pairs: int,
    new_tokens: tuple[int, ...],
) -> dict[str, Any]:
    """Measure every variant on a prompt of the configuration's first length and on its tasks.

    Args:
        folder_keys: of the checkpoint when it was loaded.
        pairs: rounds in which all variants are timed in turn, after a warm-up.
        new_tokens: end-to-end times are taken with these.

    Returns:
        the `setting`, and `rows`: for each variant its times (see `compare`), `flop_speedup` and `scores` by task.

    Raises:
        UserError: if the prompt and the new tokens are more than the model's context, or the tasks have no prompt.
    """
    if not (examples := all_examples(config, tokenizer)):
        raise UserError(f"{config.longbench}: no prompt of {', '.join(config.tasks)} there; name a task that has some")
    ids = encode(tokenizer, [examples[0].text], model.device)["input_ids"]
    require_context(model.config, ids.shape[1] + max(new_tokens), "--length and --new-tokens")
    tried = variants(model.config.schedule(), model.config.num_hidden_layers, ids.shape[1])
    own, done, setting = begun(model, folder_keys, config, output)
    ways: dict[str, Way] = {"dense": (model, {"spts": False})}
    keys = {"dense": own["dense"]}
    for name, schedule in tried.items():
        ways[name] = model, {"spts": argument(schedule)}
        keys[name] = fingerprint(own["spts"], argument(schedule))
    scored = score_rows(list(run(ways, tokenizer, examples, keys, done, config.batch)))
    with tqdm(total=pairs + 1, desc="timing", unit="round") as progress:
        times = compare(ways, ids, pairs, (1, *new_tokens), progress.update)
    rows = []
    for name in ways:
        flops = 1.0 if name == "dense" else predicted(model.config, tried[name], ids.shape[1])["speedup"]
        other = "+PAP" if name == "dense" else name  # a summary compares dense with another
        scores = {row["task"]: row[name] for row in summary(scored, other)}
        rows.append({"variant": name, **times[name], "flop_speedup": flops, "scores": scores})
    counts = {name: sum(not schedule.skips(e.tokens) for e in examples) for name, schedule in tried.items()}
    unskipped = {name: count for name, count in counts.items() if count}
    setting |= of_texts(tokenizer, folder_keys, config)
    setting |= {"tokens": ids.shape[1], "pairs": pairs, "items": config.items, "length": config.lengths[0]}
    return {"setting": {**setting, "new_tokens": [*new_tokens], "unskipped": unskipped}, "rows": rows}


def save(result: dict[str, Any], output: Path) -> str:
    """Write `ablation.json` and `ablation.md` into `output`, and return the table; an earlier one stays."""
    tables.keep_earlier(output, tables.files("ablation"))
    shown = "\n\n".join([*fitted_note(result["setting"]), ablation_table(result), *result["setting"]["notes"]])
    return tables.save(result, shown, output, "ablation")
