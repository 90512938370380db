"""Evaluating a checkpoint: suites of tasks, dense beside SPTS, with tables, pictures and a certificate."""

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter
from tqdm import tqdm
from yaml import YAMLError

from ..calibrate import data
from ..calibrate.base_checks import setting_faults
from ..checkpoint.families import context_of, read_config
from ..checkpoint.keys import environment, folder_key, watch
from ..checkpoint.layout import CARD, CERTIFICATE, REPORT, read_json
from ..export.card import with_results
from ..tasks import agreement, longbench, recovery, ruler, synthetic
from ..tasks.example import Example, is_shorter, sentences, text_notes
from ..tasks.runner import MODES, Answers, answer_key, own_file, run, ways_of
from ..utils import tables
from ..utils.devices import hardware
from ..utils.distributed import SINGLE_PROCESS, Ranks
from ..utils.errors import UserError, reason, some
from ..utils.store import file_hash, fingerprint, writing
from ..utils.tables import COLOURS, LABELS, plot_interval
from .columns import ON_NEEDLES, on_needles, score_tables

RESULTS = tables.files("evaluation")  # in the output
SUITES = ("ruler", "longbench", "diversity", "fidelity")
MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")
FREE_TOKENS = 64
HAYSTACK, LONGBENCH = "haystack", "LongBench"  # where prompts for free answers come from
BANDS = 5  # of needle depth


@dataclass(frozen=True)
class EvalConfig:
    """What to run. `tasks`: only these (none: all of the suites). `lengths` in tokens, answers included. `items` a task
    and length. `haystack`: a file or folder of text (none: CPython's language reference). `longbench`:
    LongBench's folder. `batch`: prompts at a time; rows equal their own runs but for rounding, which in bfloat16 can
    change a token."""

    suites: tuple[str, ...] = ("ruler", "diversity", "fidelity")
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    items: int = 8
    seed: int = 1
    haystack: str | None = None
    longbench: str | None = None
    batch: int = 1

    def checked(self) -> "EvalConfig":
        """Raises UserError for unknown or contradictory values."""
        suites = {"ruler": ruler.TASKS, "diversity": synthetic.TASKS, "longbench": longbench.TASKS}
        known = [task for tasks in suites.values() for task in tasks]
        for option, values, allowed in (("suite", self.suites, SUITES), ("task", self.tasks, known)):
            for value in values:
                if value not in allowed:
                    raise UserError(f"--{option} {value}: unknown; there are {', '.join(allowed)}")
        if "longbench" in self.suites and self.longbench is None:
            raise UserError("--suite longbench needs --longbench FOLDER, where LongBench's files are")
        chosen = {*self.suites, *(["longbench"] if "fidelity" in self.suites and self.longbench else [])}
        for task in self.tasks:
            suite = next(suite for suite, tasks in suites.items() if task in tasks)
            if suite not in chosen:
                needed = " and --longbench FOLDER" if suite == "longbench" else ""
                raise UserError(f"--task {task} is of the suite {suite}, which is not run; it needs that suite{needed}")
        if min(self.lengths) < 256 or self.items < 1 or self.batch < 1:
            raise UserError("--lengths must be at least 256, --items and --batch at least 1")
        return self

    @cached_property
    def documents(self) -> list[str]:
        """Those of the haystack."""
        return list(data.from_files(Path(self.haystack))) if self.haystack else data.python_docs()

    @cached_property
    def text(self) -> str:
        """The haystack."""
        return "\n\n".join(self.documents)

    @property
    def first(self) -> float:
        """Where in the haystack, from 0 to 1, the first prompt for a free answer is taken from."""
        return random.Random(self.seed).random()


def files(processes: int) -> tuple[str, ...]:
    """What an evaluation by so many processes makes in its output."""
    return (*(own_file(Path("answers.jsonl"), rank).name for rank in range(processes)), "setting.json", *RESULTS)


def _longbench_tasks(config: EvalConfig) -> Iterator[tuple[longbench.LongBench, str]]:
    if config.longbench is not None:
        bench = longbench.LongBench(config.longbench)
        for task in dict.fromkeys(config.tasks) or bench.tasks():
            if task in longbench.TASKS:
                yield bench, task


def _longbench_examples(
    config: EvalConfig, tokenizer: Any, length: int, answer_tokens: int | None = None
) -> Iterator[Example]:
    for bench, task in _longbench_tasks(config):
        yield from bench.examples(task, tokenizer, length, config.items, answer_tokens)


def all_examples(config: EvalConfig, tokenizer: Any, ranks: Ranks = SINGLE_PROCESS) -> list[Example]:
    """Every example of the suites but `fidelity`, made anew from the configuration alone, by all processes together."""
    haystack, makers = config.text, list[Callable[[], Iterable[Example]]]()
    for length in config.lengths:
        for suite, source in (("ruler", ruler), ("diversity", synthetic)):
            for task in source.TASKS if suite in config.suites else ():
                if not config.tasks or task in config.tasks:
                    values = task, tokenizer, haystack, length, config.items, config.seed
                    makers.append(partial(source.examples, *values))
        if "longbench" in config.suites:
            makers.append(partial(_longbench_examples, config, tokenizer, length))
    shard = tqdm(ranks.shard(makers), desc="prompts", unit="task", disable=not makers)
    return [example for some in ranks.all_gather([list(make()) for make in shard]) for example in some]


def free_examples(config: EvalConfig, tokenizer: Any, haystack: str) -> list[Example]:
    """The prompts of the suite `fidelity`: about the `haystack`, and LongBench's if its folder is given."""
    examples = list[Example]()
    for length in config.lengths:
        examples += agreement.examples(tokenizer, haystack, length, config.items, FREE_TOKENS, config.first)
        examples += _longbench_examples(config, tokenizer, length, FREE_TOKENS)
    return examples


def require_context(config: Any, tokens: int, what: str) -> None:
    """Raises UserError, naming `what` they come from, if so many `tokens` are more than the model's context."""
    if tokens > (context := context_of(config)):
        raise UserError(f"{what}: {tokens} tokens are more than the context of {context}")


class FolderKeys(dict[str, str]):
    """For dense and skipping answers, what of the checkpoint in `folder` they depend on; all of its weights are read.
    `unchanged`: see `watch`. `fitted_on`: keys of documents that it was fitted or chosen on, as far as it tells;
    `on_needles`: whether it was on needles, too."""

    def __init__(self, folder: Path):
        paths = list(folder.glob("*.safetensors"))
        self.unchanged = watch(folder, [path.name for path in paths])
        weights = {path.name: file_hash(path) for path in paths}
        super().__init__({mode: folder_key(folder, weights, dense=mode == "dense") for mode in MODES})
        report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
        self.fitted_on = frozenset(report.get("fitted_on", ()))
        self.on_needles = on_needles(report)


def load(folder: Path, device: str, dtype: str, tokens: int = 0, what: str = "") -> tuple[Any, Any, FolderKeys]:
    """The checkpoint with its own code, its tokenizer, and its keys.

    Args:
        tokens, what: see `require_context`.

    Raises:
        UserError: if the folder holds no checkpoint of this toolkit, or not all that its schedule needs, or was changed
            while it was read, or its context is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_config(folder)
    if faults := setting_faults(folder):
        raise UserError("\n".join(f"{folder}: {fault}" for fault in faults))
    require_context(config, tokens, what)
    keys = FolderKeys(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    options |= {"trust_remote_code": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"{folder}: its schedule needs {some(absent)}, which was not fitted and would be random")
    keys.unchanged()
    return model.to(device).eval(), tokenizer, keys


def mode_keys(keys: dict[str, str], how: list[str]) -> dict[str, str]:
    """For dense and skipping answers, what they depend on beside the prompt."""
    return {mode: fingerprint(key, how) for mode, key in keys.items()}


def computed_how(model: Any) -> list[str]:
    """What answers depend on beside the checkpoint and the prompt: type, kind of device, attention, and the program."""
    return [str(model.dtype), model.device.type, model.config._attn_implementation, environment()]


def begun(
    model: Any, folder_keys: FolderKeys, config: EvalConfig, output: Path, rank: int = 0
) -> tuple[dict[str, str], Answers, dict[str, Any]]:
    """See `mode_keys`; the answers that are kept in `output`; and what a result says of how it was computed."""
    machine, how = hardware(str(model.device)), computed_how(model)
    done = Answers(output / "answers.jsonl", rank, {"hardware": machine, "batch": config.batch})
    done.check = folder_keys.unchanged
    return mode_keys(folder_keys, how), done, {"hardware": machine, "how": how}


def of_texts(tokenizer: Any, folder_keys: FolderKeys, config: EvalConfig) -> dict[str, Any]:
    """What a result says of the texts that prompts are made of: `fitted_on`, on how many of the `documents` (`of` so
    many) something was fitted or chosen, and `notes` on the haystack, see `text_notes`, and on needles."""
    documents, notes = list[str](), list[str]()
    if {*config.suites} != {"longbench"}:
        documents, notes = config.documents, text_notes(config.text, config.lengths, tokenizer)
    if {*config.suites} & {"longbench", "fidelity"}:
        benches = _longbench_tasks(config)
        documents = [*documents, *(text for bench, task in benches for text in bench.documents(task, config.items))]
    seen = [data.document_key(text) in folder_keys.fitted_on for text in documents]
    notes = [*notes, *([ON_NEEDLES] if folder_keys.on_needles and "ruler" in config.suites else [])]
    return {"fitted_on": {"documents": sum(seen), "of": len(seen)}, "notes": notes}


def collect(
    model: Any,
    tokenizer: Any,
    folder_keys: FolderKeys,
    config: EvalConfig,
    output: Path,
    ranks: Ranks = SINGLE_PROCESS,
) -> None:
    """Run everything; each answer is in `output`/answers.jsonl at once (of several processes each has its own
    answers.N.jsonl, and its share of the prompts), and what is there is not run again.

    `output`/setting.json says beforehand which answers belong to this evaluation, so that a stopped one can be scored,
    and to which examples: one answer may be that of several, such as of a document that fits into two lengths.

    Raises:
        UserError: if a prompt does not fit into its length, or the checkpoint was changed meanwhile; what was answered
            then is not kept.
    """
    keys, done, made = begun(model, folder_keys, config, output, ranks.rank)
    ways, schedule = ways_of(model), model.config.schedule()
    examples, free, text = all_examples(config, tokenizer, ranks), list[Example](), ""
    overlapping: list[int] = []
    if "fidelity" in config.suites:
        haystack = config.text
        overlapping = [n for n in config.lengths if is_shorter(haystack, n * config.items, tokenizer)]
        free, text = free_examples(config, tokenizer, haystack), "\n\n".join(sentences(haystack))

    def following(example: Example) -> str | None:
        begin = int((config.first + example.index / config.items) % 1 * len(text))
        return text[begin:] + text[:begin] if example.task == agreement.TASK else None

    wanted = {mode: [answer_key(key, example) for example in examples] for mode, key in keys.items()}
    wanted["fidelity"] = [
        fingerprint("fidelity", keys["spts"], example.text, FREE_TOKENS, following(example)) for example in free
    ]
    rows = {
        name: [{**example.to_row(), "skips": schedule.skips(example.tokens)} for example in some]
        for name, some in (("known", examples), ("free", free))
    }
    setting = {"keys": keys, "request": asdict(config), **made, **of_texts(tokenizer, folder_keys, config)}
    setting |= {"overlapping": overlapping, "prompts": fingerprint(wanted)}
    if ranks.is_main:
        with writing(output / "setting.json") as partial:
            partial.write_text(json.dumps({**setting, "answers": wanted, "examples": rows}))
    for _ in run(ways, tokenizer, ranks.shard(examples), keys, done, config.batch):
        pass
    shard = ranks.shard(list(zip(free, wanted["fidelity"], strict=True)))
    for example, key in tqdm(shard, desc="fidelity", unit="prompt", disable=not free):
        if key not in done.rows:
            measures = agreement.measure(ways, tokenizer, example, following(example))
            done.add({"key": key, "mode": "fidelity", **example.to_row(), **measures})
    ranks.barrier()


def summarise(output: Path) -> dict[str, Any]:
    """Score the answers kept in `output`; no model is run and no prompt is made. The setting's `made` lists how the
    answers came to be: on which hardware, in batches of how many prompts.

    Raises:
        UserError: if there are none.
    """
    try:
        setting = json.loads((output / "setting.json").read_text())
        wanted = TypeAdapter(dict[str, list[str]]).validate_python(setting.pop("answers"))
        examples = TypeAdapter(dict[str, list[dict[str, Any]]]).validate_python(setting.pop("examples"))
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(f"{output}: no evaluation there, or its setting.json was changed") from None
    answers = Answers(output / "answers.jsonl").rows
    rows = {
        mode: [
            {**answers[key], **example}
            for key, example in zip(keys, examples["free" if mode == "fidelity" else "known"], strict=True)
            if key in answers
        ]
        for mode, keys in wanted.items()
    }
    last = {"hardware": setting.pop("hardware"), "batch": setting["request"].pop("batch")}
    made = [row.get("made", last) for some in rows.values() for row in some] or [last]
    setting["made"] = [one for index, one in enumerate(made) if one not in made[:index]]
    scored = recovery.score_rows([{**row, "mode": mode} for mode in MODES for row in rows[mode]])
    free: dict[tuple[int, str], list[dict]] = defaultdict(list)  # in the order in which prompts are made
    for row in rows["fidelity"]:
        free[row["limit"], HAYSTACK if row["task"] == agreement.TASK else LONGBENCH].append(row)
    return {
        "setting": setting,
        "missing": sum(map(len, wanted.values())) - sum(map(len, rows.values())),
        "notes": setting.pop("notes", []),
        "tasks": recovery.summary(scored),
        "fidelity": [
            {
                "length": length,
                "prompts": source,
                "overlap": source == HAYSTACK and length in setting.get("overlapping", ()),
                **recovery.fidelity_summary(measured),
            }
            for (length, source), measured in free.items()
        ],
        "depths": [
            {name: row[name] for name in ("task", "limit", "depth", "mode", "score")}
            for row in scored
            if row["depth"] is not None
        ],
    }


def fitted_note(setting: dict[str, Any]) -> list[str]:
    """What a table says of a setting's `fitted_on`, if anything."""
    seen = setting.get("fitted_on")
    note = "The checkpoint was fitted or chosen on {documents} of {of} documents that prompts are made of."
    return [note.format(**seen)] if seen and seen["documents"] else []


def as_tables(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    notes = [f"Not finished: {result['missing']} answers are missing."] if result["missing"] else []
    return "\n\n".join([*notes, *fitted_note(result["setting"]), score_tables(result)])


def save(result: dict[str, Any], output: Path) -> str:
    """Write `evaluation.json`, `evaluation.md` and `evaluation.png` into `output`, and return the tables; an earlier
    evaluation's stay, unless it is the same one and its tables are as they were written."""
    path, new = output / RESULTS[0], result["setting"]
    old = read_json(path) if path.is_file() else result
    other = any(old.get("setting", {}).get(name) != new.get(name) for name in ("keys", "request", "prompts"))
    edited = tables.is_edited(output, "evaluation", as_tables)
    if other or edited or result["missing"] > old.get("missing", 0):  # answers may be gone
        tables.keep_earlier(output, RESULTS)
    drawing = (lambda figure: draw(result, figure)) if result["tasks"] else None
    return tables.save(result, as_tables(result), output, "evaluation", drawing, 11 if result["depths"] else 7)


def draw(result: dict[str, Any], figure: Any) -> None:
    """Scores of every task, dense beside SPTS, and the score of single needles by their depth."""
    lengths = sorted({row["length"] for row in result["tasks"]})
    figure.set_figheight(1.5 + 0.34 * len(result["tasks"]))
    panels = figure.subplots(1, 2, squeeze=False, width_ratios=[3, 2])[0] if result["depths"] else [figure.subplots()]
    _draw_scores(panels[0], result["tasks"], lengths)
    if result["depths"]:
        _draw_depths(panels[1], result["depths"], lengths)


def _draw_scores(axis: Any, rows: list[dict], lengths: list[int]) -> None:
    """A pair of points for each task and length, joined by a line; SPTS with the interval of its recovery."""
    rows = sorted(rows, key=lambda row: (row["task"], row["length"]))
    names = [row["task"] + (f", {row['length']}" if len(lengths) > 1 else "") for row in rows]
    dense, spts = ([100 * row[mode] for row in rows] for mode in MODES)
    ends = [[min(100.0, score * end) for end in row["interval"] or ()] for row, score in zip(rows, dense, strict=True)]
    axis.hlines(names, dense, spts, color="#BBBBBB", zorder=0)
    axis.plot(dense, names, "|", markersize=15, markeredgewidth=2, color=COLOURS["dense"], label="dense")
    known = [end or [score, score] for end, score in zip(ends, spts, strict=True)]
    plot_interval(axis, spts, names, known, linestyle="none", color=COLOURS["spts"], label="SPTS, 95% of its recovery")
    axis.set(title=f"Score, {lengths[0]} prompt tokens" if len(lengths) == 1 else "Score, by prompt tokens")
    axis.set(xlabel="score, %", xlim=(-3, 103))
    axis.invert_yaxis()
    axis.legend()


def _draw_depths(axis: Any, rows: list[dict], lengths: list[int]) -> None:
    """Mean score by depth of the needle: a line for each mode where there is one length, else a map of what SPTS loses
    by length and depth."""
    bands = [f"{100 * band // BANDS}-{100 * (band + 1) // BANDS}" for band in range(BANDS)]
    scores: dict[tuple[str, int], list[list[float]]] = {(m, n): [[] for _ in bands] for m in MODES for n in lengths}
    for row in rows:
        scores[row["mode"], row["limit"]][min(int(row["depth"] * BANDS), BANDS - 1)].append(100 * row["score"])
    if len(lengths) == 1:
        for mode, style in (("dense", "--"), ("spts", "-")):
            filled = {band: values for band, values in zip(bands, scores[mode, lengths[0]], strict=True) if values}
            means = [fmean(values) for values in filled.values()]
            ends = [recovery.interval([1.0] * len(values), values) or (min(values),) * 2 for values in filled.values()]
            plot_interval(axis, [*filled], means, ends, linestyle=style, color=COLOURS[mode], label=LABELS[mode])
        axis.set(title="One needle, by its depth (95% intervals)", xlabel="depth in the prompt, %", ylim=(-3, 105))
        axis.set_ylabel("score, %")
        axis.legend()
        return
    mean = {key: [fmean(values) if values else float("nan") for values in found] for key, found in scores.items()}
    loss = [[mean["dense", n][band] - mean["spts", n][band] for n in lengths] for band in range(BANDS)]
    image = axis.imshow(loss, vmin=-100, vmax=100, cmap="PuOr_r", aspect="auto")
    axis.set(title="One needle: score, dense - SPTS", xlabel="prompt tokens", ylabel="depth in the prompt, %")
    axis.set_facecolor("lightgrey")  # where there was no needle
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axis.set_yticks(range(BANDS), bands)
    axis.figure.colorbar(image, ax=axis, label="points lost")


def card_text(folder: Path) -> str:
    """The checkpoint's model card; empty if it has none.

    Raises:
        UserError: if it can't be read or added to.
    """
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        with_results(text, folder.resolve().name, [])
    except (ValueError, YAMLError) as error:
        raise UserError(f"{card}: no model card that can be added to; mend or remove it: {reason(error)}") from None
    if re.findall("|".join(MARKS), text) not in ([], [*MARKS]):
        raise UserError(f"{card}: {' and '.join(MARKS)} must be there once each, in this order, or not at all")
    return text


def _is_of(key: str, setting: dict[str, Any]) -> bool:
    """Whether an evaluation's answers are those of the checkpoint with a `folder_key`."""
    return setting["keys"]["spts"] == fingerprint(key, setting["how"])


def differences(folder: Path, setting: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Warnings if an evaluation's answers are another checkpoint's, or were asked for with other values than `asked`,
    options by name."""
    warnings = []
    if not _is_of(folder_key(folder), setting):
        warnings.append(f"these answers are another checkpoint's than that in {folder}")
    known = {**setting["request"], "dtype": setting["how"][0].removeprefix("torch.")}
    for name, value in json.loads(json.dumps(asked)).items():
        if name in known and value != known[name]:
            warnings.append(f"these answers were asked for with {name} {known[name]}, not {value}")
    return warnings


def certify(folder: Path, result: dict[str, Any]) -> None:
    """Put the result into the checkpoint: a file for machines, and a section of the model card.

    Raises:
        UserError: if answers are missing, or there are none, or they are another checkpoint's or NaN, or the card
            can't be added to.
    """
    key, setting = folder_key(folder), result["setting"]
    if not _is_of(key, setting):
        raise UserError(f"{folder}: these answers are another checkpoint's; run evaluate without --rescore")
    if result["missing"]:
        raise UserError(f"{folder}: {result['missing']} answers are missing; run evaluate without --rescore")
    if not result["tasks"] and not result["fidelity"]:
        raise UserError(f"{folder}: nothing was measured that could be certified; choose tasks that have prompts")
    if wrong := next((row["prompts"] for row in result["fidelity"] if not math.isfinite(row["kl"])), None):
        raise UserError(f"{folder}: the skipping model's logits are NaN for free answers about {wrong}; not certified")
    request = setting["request"]
    paths = {name: Path(value).name for name in ("haystack", "longbench") if (value := request[name])}
    public = {**setting, "request": {**request, **paths}}  # where a user's files lie is nobody's business
    text = card_text(folder)
    certificate = {"checkpoint": key, "setting": public, "tasks": result["tasks"], "fidelity": result["fidelity"]}
    begin, end = MARKS
    if begin in text:
        text = text[: text.index(begin)].rstrip() + "\n" + text[text.index(end) + len(end) :]
    machines = [made["hardware"] for made in setting["made"]]
    devices = ", ".join(dict.fromkeys(machine["device"] for machine in machines))
    haystack = "a folder of the user's" if request["haystack"] else "the Python language reference"
    measured = {row["task"] for row in result["tasks"]}
    missing = [task for task in (*ruler.TASKS, *longbench.TASKS, *synthetic.TASKS) if task not in measured]
    section = f"""{begin}
<!-- The next evaluation that is certified takes the place of all between this line and the closing one. -->
## Evaluation

Dense and SPTS on the same prompts, greedy; recovery is SPTS / dense. Haystack: {haystack}; seed {request["seed"]};
{devices}, torch {machines[0]["torch"]}, transformers {machines[0]["transformers"]}, {setting["how"][0]}.

{as_tables(result)}

Not measured: {", ".join(missing) or "nothing of RULER, LongBench and this toolkit's own tasks"}; other lengths.
{end}"""
    text = with_results(f"{text.rstrip()}\n\n{section}\n", folder.resolve().name, result["tasks"])
    with writing(folder / CARD) as partial:
        partial.write_text(text, encoding="utf-8")
        (folder / CERTIFICATE).unlink(missing_ok=True)  # or a kill would leave an earlier one beside this card
    with writing(folder / CERTIFICATE) as partial:
        partial.write_text(json.dumps(certificate, indent=1) + "\n")
