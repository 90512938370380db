"""Evaluating a checkpoint: suites of tasks, dense beside SPTS, with tables, pictures and a certificate."""

import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..calibrate import data
from ..calibrate.base_checks import setting_faults
from ..checkpoint.keys import environment, folder_key
from ..export.card import with_results
from ..tasks import agreement, longbench, recovery, ruler, synthetic
from ..tasks.example import Item, sentences
from ..tasks.runner import MODES, Answers, answer_key, run
from ..utils.distributed import SINGLE_PROCESS, Ranks
from ..utils.errors import UserError
from ..utils.store import fingerprint, writing
from ..utils.tables import table
from .inspect import read_config
from .report import hardware, mean

FILES = ("answers.jsonl", "setting.json", "evaluation.json", "evaluation.md", "evaluation.png")  # in the output
SUITES = ("ruler", "longbench", "diversity", "fidelity")
CERTIFICATE = "spts_evaluation.json"
MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")
FREE_TOKENS = 64


@dataclass(frozen=True)
class Request:
    """What to run. `tasks`: only these (none: all of the suites). `lengths` in tokens, answers included. `items` a task
    and length. `haystack`: a file or folder of text (none: CPython's language reference). `longbench`:
    LongBench's folder. `batch`: prompts at a time; rows equal their own runs."""

    suites: tuple[str, ...] = ("ruler", "diversity", "fidelity")
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    items: int = 8
    seed: int = 1
    haystack: str | None = None
    longbench: str | None = None
    batch: int = 1

    def checked(self) -> "Request":
        """Raises UserError for unknown or contradictory values."""
        for suite in self.suites:
            if suite not in SUITES:
                raise UserError(f"--suite {suite}: unknown; there are {', '.join(SUITES)}")
        known = [*ruler.TASKS, *synthetic.TASKS, *longbench.TASKS]
        for task in self.tasks:
            if task not in known:
                raise UserError(f"--task {task}: unknown; there are {', '.join(known)}")
        if "longbench" in self.suites and self.longbench is None:
            raise UserError("--suite longbench needs --longbench FOLDER, where LongBench's files are")
        if min(self.lengths) < 256 or self.items < 1 or self.batch < 1:
            raise UserError("--lengths must be at least 256, --items and --batch at least 1")
        return self


def prose_of(request: Request) -> str:
    """The haystack."""
    parts = data.from_files(Path(request.haystack)) if request.haystack else data.python_docs()
    return "\n\n".join(parts)


def all_items(request: Request, tokenizer: Any) -> list[Item]:
    """Every item of the suites but `fidelity`, made anew from the request alone."""
    prose, made = prose_of(request), []
    bench = longbench.LongBench(request.longbench) if request.longbench else None
    for length in request.lengths:
        wanted: list[tuple[str, Iterable[str]]] = [
            ("ruler", ruler.TASKS),
            ("diversity", synthetic.TASKS),
            ("longbench", bench.tasks() if bench else ()),
        ]
        for suite, tasks in wanted:
            if suite not in request.suites:
                continue
            for task in tasks:
                if request.tasks and task not in request.tasks:
                    continue
                if suite == "longbench" and bench is not None:
                    made += bench.items(task, tokenizer, length, request.items)
                else:
                    maker = ruler.items if suite == "ruler" else synthetic.items
                    made += maker(task, tokenizer, prose, length, request.items, request.seed)
    return made


def free_items(request: Request, tokenizer: Any, prose: str) -> list[Item]:
    """The prompts of the suite `fidelity`: about the haystack `prose`, and LongBench's if its folder is given."""
    made: list[Item] = []
    bench = longbench.LongBench(request.longbench) if request.longbench else None
    tasks = [task for task in (bench.tasks() if bench else ()) if not request.tasks or task in request.tasks]
    for length in request.lengths:
        made += agreement.items(tokenizer, prose, length, request.items, FREE_TOKENS)
        if bench is not None:
            found = (item for task in tasks for item in bench.items(task, tokenizer, length, request.items))
            made += [replace(item, answer_tokens=FREE_TOKENS) for item in found]
    return made


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """The checkpoint with its own code, and its tokenizer.

    Raises:
        UserError: if the folder holds no checkpoint of this toolkit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_config(folder)
    if faults := setting_faults(folder):
        raise UserError("\n".join(f"{folder}: {fault}" for fault in faults))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model.to(device).eval(), tokenizer


def mode_keys(folder: Path, how: list[str]) -> dict[str, str]:
    """For dense and skipping answers, what they depend on beside the prompt."""
    return {mode: fingerprint(folder_key(folder, dense=mode == "dense"), how) for mode in MODES}


def computed_how(model: Any) -> list[str]:
    """What answers depend on beside the checkpoint and the prompt: type, kind of device, attention, and the program."""
    return [str(model.dtype), model.device.type, model.config._attn_implementation, environment()]


def free_key(spts_key: str, item: Item) -> str:
    """Where the measures of a free answer are kept."""
    return fingerprint("fidelity", spts_key, item.text, FREE_TOKENS)


def collect(
    model: Any, tokenizer: Any, folder: Path, request: Request, output: Path, ranks: Ranks = SINGLE_PROCESS
) -> None:
    """Run everything; each answer is in `output`/answers.jsonl at once (of several processes each has its own
    answers.N.jsonl, and its share of the prompts), and what is there is not run again.

    `output`/setting.json says beforehand which answers belong to this evaluation, so that a stopped one can be scored.
    """
    kept = Answers(output / "answers.jsonl", ranks.rank)
    how = computed_how(model)
    keys = mode_keys(folder, how)
    items, free, prose = all_items(request, tokenizer), [], ""
    if "fidelity" in request.suites:
        prose = prose_of(request)
        free, prose = free_items(request, tokenizer, prose), "\n\n".join(sentences(prose))
    wanted = {mode: [answer_key(key, item) for item in items] for mode, key in keys.items()}
    wanted["fidelity"] = [free_key(keys["spts"], item) for item in free]
    setting = {"keys": keys, "request": asdict(request), "hardware": hardware(str(model.device)), "how": how}
    if ranks.is_main:
        with writing(output / "setting.json") as partial:
            partial.write_text(json.dumps({**setting, "answers": wanted}))
    for _ in run(model, tokenizer, ranks.shard(items), keys, kept, request.batch):
        pass
    asked = ranks.shard(list(zip(free, wanted["fidelity"], strict=True)))
    for item, key in tqdm(asked, desc="fidelity", unit="prompt", disable=not free):
        if key not in kept.rows:
            begin = item.index * len(prose) // request.items
            following = prose[begin:] + prose[:begin] if item.task == agreement.TASK else None
            found = agreement.measure(model, tokenizer, item, following)
            kept.add({"key": key, "mode": "fidelity", **item.plain(), **found})
    if mode_keys(folder, how) != keys:
        raise UserError(f"{folder} was changed during the run, so the answers may be of either: give a new --output")
    ranks.barrier()


def summarise(output: Path) -> dict[str, Any]:
    """Score the answers kept in `output`; no model is run and no prompt is made.

    Raises:
        UserError: if there are none.
    """
    try:
        setting = json.loads((output / "setting.json").read_text())
        wanted = setting.pop("answers")
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(f"{output}: no evaluation there") from None
    kept = Answers(output / "answers.jsonl").rows
    found = {mode: [kept[key] for key in keys if key in kept] for mode, keys in wanted.items()}
    missing = sum(len(keys) for keys in wanted.values()) - sum(len(rows) for rows in found.values())
    rows = [{**row, "mode": mode} for mode in ("dense", "spts") for row in found[mode]]
    scored = recovery.score_rows(rows)
    result: dict[str, Any] = {"setting": setting, "missing": missing, "tasks": recovery.summary(scored)}
    result["fidelity"] = [
        {"length": length, "prompts": source, **_fidelity(measured)}
        for length in setting["request"]["lengths"]
        for source in ("haystack", "LongBench")
        if (measured := [r for r in found["fidelity"] if r["limit"] == length and _source(r) == source])
    ]
    result["depths"] = [
        {k: row[k] for k in ("task", "limit", "depth", "mode", "score")} for row in scored if row["depth"] is not None
    ]
    return result


def _source(row: dict) -> str:
    return "haystack" if row["task"] == agreement.TASK else "LongBench"


def _fidelity(rows: list[dict]) -> dict[str, Any]:
    modes = ("dense", "spts")
    tasks = dict.fromkeys(row["task"] for row in rows)
    losses = [r["loss"] for r in rows if r["loss"]]
    return {
        "items": len(rows),
        "kl": mean([r["kl"] for r in rows]),
        "top1": mean([r["top1"] for r in rows]),
        "interval": recovery.interval([1.0] * len(rows), [r["top1"] for r in rows]),
        "tasks": {task: mean([r["top1"] for r in rows if r["task"] == task]) for task in tasks},
        "repeats": {m: sum(r["repeats"][m] for r in rows) for m in modes},
        "perplexity": {m: math.exp(mean([loss[m] for loss in losses])) for m in modes} if losses else None,
    }


def as_tables(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    lines = []
    for row in result["tasks"]:
        low_high = f" ({row['interval'][0]:.2f}-{row['interval'][1]:.2f})" if row["interval"] else ""
        recovered = "" if row["recovery"] is None else f"{row['recovery']:.2f}{low_high}"
        scores = (f"{100 * row[mode]:.1f}" for mode in ("dense", "spts"))
        lines.append([row["task"], row["length"], row["items"], *scores, recovered])
    heads = ["task", "tokens", "items", "dense", "SPTS", "recovery (95% interval)"]
    parts = [table(heads, lines)] if lines else []
    if result["missing"]:
        parts.insert(0, f"Not finished: {result['missing']} answers are missing.")
    if result["fidelity"]:
        lines = [
            [
                row["prompts"],
                row["length"],
                row["items"],
                f"{row['top1']:.1%}"
                + (f" ({row['interval'][0]:.3f}-{row['interval'][1]:.3f})" if row["interval"] else ""),
                f"{row['kl']:.3f}",
                *(f"{row['repeats'][m]}" for m in ("dense", "spts")),
                *(f"{row['perplexity'][m]:.2f}" if row["perplexity"] else "" for m in ("dense", "spts")),
            ]
            for row in result["fidelity"]
        ]
        heads = ["free answers about", "tokens", "items", "next token as dense (95% interval)", "KL, nats"]
        heads += ["repeating, dense", "SPTS"]
        parts.append(table([*heads, "perplexity of following text, dense", "SPTS"], lines))
    return "\n\n".join(parts)


def save(result: dict[str, Any], output: Path) -> str:
    """Write `evaluation.json`, `evaluation.md` and `evaluation.png` into `output`, and return the tables."""
    tables = as_tables(result)
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "evaluation.md").write_text(tables + "\n")
    (output / "evaluation.png").unlink(missing_ok=True)  # an earlier result's
    if result["tasks"] and importlib.util.find_spec("matplotlib"):
        draw(result, output / "evaluation.png")
    return tables


def draw(result: dict[str, Any], target: Path) -> None:
    """Scores of every task (by length where there are several), and needles by depth and length, dense beside SPTS."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in result["tasks"]))
    figure = Figure(figsize=(11, 4 if not result["depths"] else 7.5), layout="constrained")
    rows = 2 if result["depths"] else 1
    axes = figure.subplots(rows, 2, squeeze=False)
    several = len({row["length"] for row in result["tasks"]}) > 1
    for axis, mode in zip(axes[0], ("dense", "spts"), strict=True):
        axis.set_title(f"{mode}: score")
        if several:
            for task in tasks:
                found = sorted((r["length"], r[mode]) for r in result["tasks"] if r["task"] == task)
                axis.plot([str(x) for x, _ in found], [100 * y for _, y in found], "o-", label=task)
            axis.set(xlabel="tokens", ylim=(-3, 103))
        else:
            bars = axis.barh([r["task"] for r in result["tasks"]], [100 * r[mode] for r in result["tasks"]])
            axis.bar_label(bars, fmt="%.0f", padding=2)
            axis.set(xlabel=f"{result['tasks'][0]['length']} tokens", xlim=(0, 110))
            axis.invert_yaxis()
    if several:
        axes[0][1].legend(fontsize=6, ncol=2)
    if result["depths"]:
        lengths = sorted({row["limit"] for row in result["depths"]})
        for axis, mode in zip(axes[1], ("dense", "spts"), strict=True):
            grid = [
                [
                    mean(
                        [
                            r["score"]
                            for r in result["depths"]
                            if r["mode"] == mode and r["limit"] == n and int(min(r["depth"], 0.999) * 5) == d
                        ]
                    )
                    for n in lengths
                ]
                for d in range(5)
            ]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set(title=f"{mode}: one needle by depth (grey: none there)", xlabel="tokens", ylabel="depth")
            axis.set_facecolor("lightgrey")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
            axis.set_yticks(range(5), [f"{20 * d}-{20 * d + 20}%" for d in range(5)])
        figure.colorbar(image, ax=list(axes[1]))
    figure.savefig(target, dpi=120)


def certify(folder: Path, result: dict[str, Any]) -> None:
    """Put the result into the checkpoint: a file for machines, and a section of the model card.

    Raises:
        UserError: if answers are missing, or are another checkpoint's.
    """
    key, setting = folder_key(folder), result["setting"]
    if setting["keys"]["spts"] != fingerprint(key, setting["how"]):
        raise UserError(f"{folder}: these answers are another checkpoint's; run evaluate without --rescore")
    if result["missing"]:
        raise UserError(f"{folder}: {result['missing']} answers are missing; run evaluate without --rescore")
    paths = {name: Path(value).name for name in ("haystack", "longbench") if (value := setting["request"][name])}
    told = {**setting, "request": {**setting["request"], **paths}}  # where a user's files lie is nobody's business
    data = {"checkpoint": key, "setting": told, "tasks": result["tasks"], "fidelity": result["fidelity"]}
    with writing(folder / CERTIFICATE) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")
    card = folder / "README.md"
    whole = card.read_text(encoding="utf-8") if card.is_file() else ""
    begin, end = MARKS
    if begin in whole and end in whole:
        whole = whole[: whole.index(begin)].rstrip() + "\n" + whole[whole.index(end) + len(end) :]
    machine, request = setting["hardware"], setting["request"]
    haystack = "a folder of the user's" if request["haystack"] else "the Python language reference"
    tried = {row["task"] for row in result["tasks"]}
    missing = [task for task in (*ruler.TASKS, *longbench.TASKS, *synthetic.TASKS) if task not in tried]
    section = f"""{begin}
## Evaluation

Dense and SPTS on the same prompts, greedy; recovery is SPTS / dense. Haystack: {haystack}; seed {request["seed"]};
{machine["device"]}, torch {machine["torch"]}, transformers {machine["transformers"]}, {setting["how"][0]}.

{as_tables(result)}

Not measured: {", ".join(missing) or "nothing of RULER, LongBench and this toolkit's own tasks"}; other lengths.
{end}"""
    made = with_results(f"{whole.rstrip()}\n\n{section}\n", folder.resolve().name, result["tasks"])
    with writing(card) as partial:
        partial.write_text(made, encoding="utf-8")


def stale(folder: Path) -> str | None:
    """A warning if the checkpoint was changed since its certificate was written."""
    path = folder / CERTIFICATE
    if not path.is_file():
        return None
    if json.loads(path.read_text()).get("checkpoint") == folder_key(folder):
        return None
    return f"{folder} was changed since the evaluation in {CERTIFICATE}; its figures are of another checkpoint"
