"""Recipes: the YAML file that says what to build. Reading is strict, and all faults are reported at once."""

import copy
import importlib.util
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    conlist,
    create_model,
    model_validator,
)

from .modeling.configuration_spts import Schedule
from .modeling.spts_block import HEAD_REDUCTIONS, unknown_key
from .utils.errors import UserError, reason
from .utils.paths import expand

Place = Annotated[str, AfterValidator(expand)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


def _margin(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("must be 0 or at least 1")
    return value


def _reduction(value: Any) -> Any:
    if value not in HEAD_REDUCTIONS and (isinstance(value, str) or not 0 < value <= 1):
        raise ValueError("must be mean, max, or above 0 and up to 1")
    return value


def _different(values: list[Any]) -> list[Any]:
    if repeated := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"must not have {repeated} twice")
    return values


Odd = Annotated[int, Field(ge=1), AfterValidator(_odd)]
T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1), AfterValidator(_different)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """The base model: `path` is a folder or a Hub id; `package` an installed Python package that holds `gguf_file`.
    `trust_remote_code`: whether a tokenizer that is code of its own may run; the base model's own code never does."""

    path: Place | None = None
    package: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def one_source(self) -> "ModelSection":
        if (self.path is None) == (self.package is None):
            raise ValueError("needs exactly one of path and package")
        if self.package is not None and self.gguf_file is None:
            raise ValueError("package needs gguf_file, the name of the GGUF file inside the package")
        return self


Source = Literal["python-docs", "python-code", "files", "dataset"]


def _as_list(value: Any) -> Any:
    """One name stands for a list of one."""
    return [value] if isinstance(value, str) else value


class CalibrationSection(Section):
    """Text the proxies are fitted on, `tokens` of it, in equal parts from one or more sources: `python-docs` and
    `python-code` (ship with CPython), `files` (plain text, JSON, JSON lines, CSV, parquet, or a folder of them),
    `dataset` (a name for `datasets.load_dataset`). `column` holds the text, or conversations, which go through the
    tokenizer's chat template; by default `text`, `messages` or `conversations`. `invalid`: whether a value that is not
    text ends the run or is left out and counted. `chat_template`: whether plain text becomes a user's turn."""

    source: Annotated[list[Source], Field(min_length=1), BeforeValidator(_as_list)] = ["python-docs"]
    path: Place | None = None
    dataset: Place | None = None
    config: str | None = None
    split: str = "train"
    column: str | None = None
    invalid: Literal["error", "skip"] = "error"
    tokens: Positive = 32768
    length: Annotated[int, Field(ge=16)] = 2048
    pack: bool = True
    chat_template: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Natural = 0

    @model_validator(mode="after")
    def source_named(self) -> "CalibrationSection":
        for source, key in (("files", "path"), ("dataset", "dataset")):
            given = getattr(self, key) is not None
            if given != (source in self.source):
                raise ValueError(f"{key} goes with source: {source}" + ("" if given else f", so {key} is missing"))
        return self


class ProxySection(Section):
    """The proxies: `channels` and `rank` are the largest size (D_low and r of the paper; by default what suits the
    model; rank 0: the regression alone), which may cost at most `max_flop_fraction` of the dense feed-forward network's
    FLOPs; a layer gets a smaller one if its recall of the tokens that count is at most `tolerance` worse.
    `saliency_quantile`: the share of most salient tokens that rates a channel (rho in the paper). `init`: plain or
    activation-weighted SVD; `regression`: whether a regression mends it; `steps` of refinement (0: none) lessen
    `objective`. The paper's own proxies: `regression: false`, `steps: 0`."""

    channels: Positive | None = None
    rank: Natural | None = None
    max_flop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.03
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.02
    saliency_quantile: Annotated[float, Field(gt=0, le=1)] = 0.2
    init: Literal["svd", "weighted-svd"] = "weighted-svd"
    regression: bool = True
    steps: Natural = 200
    objective: Literal["log-norm", "ranking", "representation"] = "log-norm"
    seed: Natural = 0


Kind = Literal[  # groups of tasks, or one; counting words (cwe, fwe) small models can't do, so it tells nothing
    "retrieval", "multi-hop", "free", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1",
    "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "multi_hop",
    "repository", "arithmetic",
]  # fmt: skip


@dataclass(frozen=True)
class ScheduleParams:
    """What a search draws: a schedule but for the size of its budgets. Annotations say what a value must be and, last,
    which ones are drawn unless the recipe's `search.choices` names others.

    start: first skipping layer. stages: their number. bend: their lengths, 1 for equal ones, more for short first
    ones. decay: the last stage's budget over the first one's. margin: candidates a stage leaves, over the next
    one's budget (0: all). ffn: the feed-forward network's budget over the attention's. floor: tokens no budget goes
    under. filters: whether the first skipping layer works on all tokens, of which those leave that the next stage
    has no budget for, as in FastKV (arXiv 2502.01068). heads: as in `Probe`, or a share: only heads that find so
    much of what the best one finds score, also in layers before the start. kv: drawn only with updates. The rest as
    in `Schedule` and `Probe`.
    """

    start: int
    stages: Annotated[Positive, (1, 2, 3, 4, 5)] = 4
    bend: Annotated[float, Field(gt=0), (0.5, 0.7, 1.0, 1.5)] = 1.0
    decay: Annotated[float, Field(gt=0, le=1), (1.0, 0.6, 0.35, 0.2, 0.1)] = 0.2
    margin: Annotated[float, Field(ge=0), AfterValidator(_margin), (0.0, 1.0, 1.3, 1.8, 2.5)] = 1.6
    ffn: Annotated[float, Field(gt=0), (0.5, 0.75, 1.0, 1.4, 2.0)] = 1.0
    floor: Annotated[Natural, (0, 128, 256)] = 0
    filters: Annotated[bool, (False, True)] = False
    ffn_selection: Annotated[Literal["proxy", "relative", "attention"], ("relative", "proxy", "attention")] = "relative"
    window_size: Annotated[Positive, (1, 8, 32, 64, 96, 128)] = 1
    heads: Annotated[str | float, AfterValidator(_reduction), ("mean", "max", 0.8, 0.9)] = "mean"
    score_carry: Annotated[float, Field(ge=0, le=1), (0.0, 0.25, 0.5, 1.0)] = 0.0
    kernel_size: Annotated[Odd, (1, 7, 15, 31, 63, 95, 127)] = 1
    sink_tokens: Annotated[Natural, (0, 4, 16)] = 4
    recent_tokens: Annotated[Positive, (1, 32, 64)] = 32
    kv: Annotated[Annotated[float, Field(gt=0, le=1)] | None, (None, 0.5, 0.75, 1.0)] = None


_DRAWN: Any = {
    name: (conlist(hint, min_length=1), list(hint.__metadata__[-1]))
    for name, hint in get_type_hints(ScheduleParams, include_extras=True).items()
    if name != "start"
}
_Choices: Any = create_model("_Choices", __base__=Section, **_DRAWN)


class ChoicesSection(_Choices):
    """What a search draws each of `ScheduleParams` from, but for `start`, which `search.starts` says. A number among
    `heads` lets only those score that find at least this share of what the best head finds."""

    def from_starts(self, starts: Sequence[int]) -> dict[str, tuple]:
        """The choices for every one of `ScheduleParams`."""
        return {"start": tuple(starts), **{name: tuple(values) for name, values in self}}


class UpdateSection(Section):
    """Ranks of the updates of skipped tokens, as in `Update`."""

    attention_rank: Natural
    ffn_rank: Natural


class SearchSection(Section):
    """A target instead of a schedule. One of `speedup` (dense over SPTS FLOPs of a prompt as long as the longest of
    `lengths`) and `kv_share`: the best schedule at that cost, and with `quality` (share of the next tokens on which
    both models agree, along the dense model's own answers) only if it is that good. `quality` alone: the fastest of
    `speedups` that is that good. None of them: the whole front of `speedups`, from which nothing is exported.

    Speed-ups are `cost: counted` in FLOPs, or `measured`: told by a table of this machine's times for a layer's
    parts, which is kept with the run. Candidates start at one of the layers `starts` (by default a third to three
    quarters of the depth, with `update` from a sixth on); heads that score may be in layers from `heads_from` on (by
    default the earliest start). With `update` every candidate has updates of these ranks, fitted on the dense states
    while it is searched, and for the schedule that is found anew, on the states that it leaves. `probe_rank` is the
    rank of the corrections of probing queries that the found schedule gets. `candidates` are drawn, half as many varied
    in each of `rounds`. They are judged on `prompts` of every one of `kinds` (or of single tasks of theirs, which the
    kind then leaves out, so that the worst task counts) and `lengths`, and the winner on as many others; their text is
    `text` (a file or folder, as `calibration.path`), by default the calibration documents that nothing was fitted on.
    `choices` narrows what candidates are drawn from.
    `require_dense_correct`: whether prompts with a known answer are replaced until the dense model answers them
    rightly, since fidelity to a wrong answer is of no use. `on_failure`: whether the nearest schedule is exported if
    the quality is not reached."""

    speedup: Annotated[float, Field(gt=1)] | None = None
    kv_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    quality: Annotated[float, Field(gt=0, le=1)] | None = None
    cost: Literal["counted", "measured"] = "counted"
    speedups: Some[Annotated[float, Field(gt=1)]] = [1.25, 1.5, 1.75, 2.0, 2.25]
    lengths: Some[Annotated[int, Field(ge=512)]] = [4096, 8192]
    kinds: Some[Kind] = ["retrieval", "multi-hop", "free"]
    prompts: Positive = 4
    answer_tokens: Annotated[int, Field(ge=8)] = 40
    starts: Some[Positive] | None = None
    heads_from: Positive | None = None
    candidates: Annotated[int, Field(ge=4)] = 32
    rounds: Natural = 2
    text: Place | None = None
    on_failure: Literal["stop", "export"] = "stop"
    choices: ChoicesSection = ChoicesSection()
    update: UpdateSection | None = None
    probe_rank: Natural = 0
    require_dense_correct: bool = False
    seed: Natural = 11

    @model_validator(mode="after")
    def without_contradiction(self) -> "SearchSection":
        if self.speedup is not None and self.kv_share is not None:
            raise ValueError("takes one of speedup and kv_share, not both")
        if self.heads_from is not None and all(isinstance(heads, str) for heads in self.choices.heads):
            raise ValueError("has heads_from, but no number in choices.heads to choose heads by")
        if self.update is None and any(self.choices.kv) and "kv" in self.choices.model_fields_set:
            raise ValueError("has choices.kv, but no update, without which what is cached of skipped tokens does harm")
        return self

    def start_layers(self, num_layers: int) -> list[int]:
        """First skipping layers to try in a model of `num_layers` layers."""
        earliest = num_layers // (6 if self.update else 3)
        return sorted(set(self.starts or range(max(1, earliest), 3 * num_layers // 4 + 1)))

    def drawn_from(self, num_layers: int) -> dict[str, tuple]:
        """What a search draws each of `ScheduleParams` from, for a model of `num_layers` layers."""
        choices = self.choices.from_starts(self.start_layers(num_layers))
        return choices if self.update else {**choices, "kv": (None,)}

    @property
    def turn(self) -> int:
        """Prompts after one another of which there is one of each kind and length."""
        return len(self.kinds) * len(self.lengths)

    @property
    def num_prompts(self) -> int:
        """Prompts that are searched on; as many confirm."""
        return self.prompts * self.turn

    @property
    def decides(self) -> bool:
        """Whether there is a target that one schedule is to meet."""
        return any(goal is not None for goal in (self.speedup, self.kv_share, self.quality))

    def targets(self) -> list[tuple[str, float]]:
        """Costs to search at, dearest first."""
        if self.speedup is not None:
            return [("speedup", self.speedup)]
        if self.kv_share is not None:
            return [("kv_share", self.kv_share)]
        return [("speedup", value) for value in sorted(self.speedups)]


class QueriesSection(Section):
    """How the corrections of the probing queries are fitted, of a schedule with a `probe.rank` (or of one that is
    found, by `search.probe_rank`): by `steps`, each on a prompt of `length` tokens and up to `following` ones of what
    comes after it, of one of `kinds` in turn: the calibration text and how it goes on, needles that are hidden in it
    and the right answer, questions about it and the dense model's answer."""

    kinds: Some[Literal["text", "needles", "questions"]] = ["text", "needles"]
    steps: Positive = 160
    length: Annotated[int, Field(ge=512)] = 2048
    following: Positive = 48
    seed: Natural = 0

    @property
    def tokens(self) -> int:
        """Of a prompt and what follows it."""
        return self.length + self.following


class DistillSection(Section):
    """Gradient steps that take all updates together nearer to the dense model's next tokens: `steps` of them (0: none),
    each on a prompt of `length` tokens of the calibration text and the `following` ones."""

    steps: Natural = 0
    length: Annotated[int, Field(ge=16)] = 2048
    following: Positive = 96
    seed: Natural = 0

    @property
    def tokens(self) -> int:
        """Of a prompt and what follows it; 0 without steps."""
        return self.length + self.following if self.steps else 0


class ReportSection(Section):
    """What is measured at the end: time and cache at each of `lengths` (in `pairs` of runs), and at `quality_length`
    (by default the longest) `needles` prompts with a hidden number among `keys`, and agreement with the dense model
    along `answers` of its own answers, `answer_tokens` long. The prompts' text is `text` (a file or folder, as
    `calibration.path`), by default the calibration documents that nothing was fitted on."""

    lengths: Some[Annotated[int, Field(ge=64)]] = [2048, 4096, 8192]
    pairs: Positive = 5
    quality_length: Annotated[int, Field(ge=256)] | None = None
    needles: Natural = 4
    keys: Positive = 1
    text: Place | None = None
    answers: Natural = 4
    answer_tokens: Positive = 24
    seed: Natural = 1

    @property
    def longest(self) -> int:
        """Tokens of the prompts that quality is measured on."""
        return self.quality_length or max(self.lengths)


class ExportSection(Section):
    """Where the checkpoint goes. `break_even`: prompts too short for skipping to pay on the machine that makes the
    checkpoint run dense; the first length that pays is timed and becomes `min_length`, if the recipe's is not longer.
    What is timed differs from machine to machine, and so may checkpoints made with it. `push_to_hub`: a repository
    that the finished checkpoint is uploaded to, made as `private` if it is not there."""

    path: Place
    break_even: bool = False
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    private: bool = False


UNSAID = {"proxy": {"channels": 1, "rank": 0}, "enabled": True}  # a recipe's schedule has no size of the proxies


class Recipe(Section):
    """What is built. Without `schedule`, see `Schedule`, and a search there is a default schedule, and lengths that are
    not given are cut to the model's context, see `plan.complete`."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    proxy: ProxySection = ProxySection()
    schedule: dict[Any, Any] | None = None
    search: SearchSection | None = None
    queries: QueriesSection = QueriesSection()
    distill: DistillSection = DistillSection()
    report: ReportSection = ReportSection()
    export: ExportSection

    @model_validator(mode="after")
    def one_way(self) -> "Recipe":
        if self.schedule is not None and self.search is not None:
            raise ValueError("has both schedule and search; give one of them, or none for a default schedule")
        if self.distill.steps and not (self.search.update if self.search else (self.schedule or {}).get("update")):
            raise ValueError("has distill.steps, but no updates that they could better: give `update`, too")
        if self.queries != QueriesSection() and not self.corrects:
            raise ValueError("has queries, but no corrections: give `schedule.probe.rank` or `search.probe_rank`")
        return self

    @property
    def corrects(self) -> bool:
        """Whether probing queries get corrections."""
        probe = (self.schedule or {}).get("probe")
        return bool(self.search.probe_rank if self.search else isinstance(probe, dict) and probe.get("rank"))

    def read_schedule(self, num_layers: int, num_heads: int | None = None) -> Schedule | None:
        """The schedule, checked against a model of `num_layers` layers of `num_heads` heads, but for the
        proxies' sizes; None if the recipe gives none.

        Raises:
            UserError: naming every fault.
        """
        if self.schedule is None:
            return None
        try:
            schedule: Schedule = Schedule.from_dict(self.schedule, num_layers, num_heads, "schedule", UNSAID)
        except ValueError as error:
            raise UserError(str(error)) from None
        return schedule


def find(name: str) -> Path:
    """The recipe file `name`: a path, or the bare name of a shipped recipe.

    Raises:
        UserError: if there is no such file.
    """
    try:
        path = Path(expand(name))
    except ValueError as error:
        raise UserError(f"the recipe's path {error}") from None
    if path.is_file():
        return path
    shipped = {p.name: p for p in shipped_recipes()}
    if path.name == name and (found := shipped.get(name) or shipped.get(f"{name}.yaml")):
        return found
    raise UserError(
        f"no recipe {name}: give the path of a YAML file, or one of the shipped {', '.join(sorted(shipped))}"
    )


def _shipped() -> Path:
    """The folder of recipes that comes with the package (from a wheel) or with the source tree."""
    inside = Path(str(resources.files("spts_compress"))) / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Recipe files that come with the toolkit."""
    return sorted(_shipped().glob("*.yaml"))


def load_study(name: str) -> ModuleType:
    """The script `name` of the studies that lie beside the recipes, as a module.

    Raises:
        UserError: if it is not there.
    """
    module_name, path = f"spts_studies_{name}", _shipped() / "studies" / f"{name}.py"
    if module_name not in sys.modules:
        if not path.is_file():
            raise UserError(f"{path} is missing; install the toolkit again")
        spec: Any = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[module_name]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key, place = self.construct_object(key_node, deep=True), f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key, Hashable):
                raise UserError(f"{place}: {key} can't be a key; a template not filled in?")
            if key in seen:
                raise UserError(f"{place}: {key} is given twice in one section")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path, edits: tuple[str, ...] = ()) -> Recipe:
    """The recipe in a file, see `parse`."""
    return parse(read_text(path), path, edits)


def read_text(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        UserError: if it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def parse(text: str, path: Path, edits: tuple[str, ...] = ()) -> Recipe:
    """The recipe in the `text` of the file `path`, with `--set` edits, each `section.key=value` with a YAML value.

    Raises:
        UserError: with every fault of the file, its path in the recipe, what is allowed and the nearest spelling.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        data = loader.get_single_data()
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or reason(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}")
    for edit in edits:
        _apply(data, edit)
    return validated(data, str(path))


def validated(data: dict, name: str) -> Recipe:
    """The recipe in plain data; `name` begins every fault.

    Raises:
        UserError: with every fault.
    """
    faults: list[str] = []
    try:
        if isinstance(data.get("schedule"), dict):
            Schedule.from_dict(data["schedule"], None, None, "schedule", UNSAID)
    except ValueError as error:
        faults = str(error).splitlines()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        faults += map(_explain, error.errors())
    if faults:
        raise UserError("\n".join(f"{name}: {fault}" for fault in faults))
    return recipe


def _apply(data: dict, edit: str) -> None:
    """Apply one `section.key=value` edit to plain recipe data; list items go by number."""
    name, equals, text = edit.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {edit}: give it as section.key=value")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"--set {edit}: {text} is not a YAML value") from None
    place: Any = data
    for depth, key in enumerate(keys):
        final = depth == len(keys) - 1
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            step: Any = int(key)
        elif isinstance(place, dict):
            step = next((there for there in place if str(there) == key), key)  # YAML makes numbers of some keys
            if not final and place.get(step) is None:
                place[step] = {}
        else:
            raise UserError(f"--set {edit}: there is no {'.'.join(keys[: depth + 1])} in the recipe")
        if final:
            place[step] = value
        else:
            place[step] = place = copy.copy(place[step])  # of an anchor, whose other places stay as they are


def _explain(fault: Any) -> str:
    """One line for one pydantic fault."""
    where = fault["loc"]
    path = ".".join(map(str, where))
    if fault["type"] == "extra_forbidden":
        return unknown_key(path, list(_section(where[:-1]).model_fields))
    if fault["type"] == "missing":
        return f"{path} is missing"
    if fault["type"] == "value_error":
        return f"{path or 'the recipe'} {fault['ctx']['error']}"
    return f"{path} is {fault['input']!r}; {fault['msg'][0].lower() + fault['msg'][1:]}"


def _section(where: tuple) -> type[BaseModel]:
    """The section at `where`."""
    section: type[BaseModel] = Recipe
    for name in where:
        annotation = section.model_fields[name].annotation
        kinds = (annotation, *get_args(annotation))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section
