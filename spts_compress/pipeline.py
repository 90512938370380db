"""The main job: recipe -> base and text -> proxies -> schedule -> checkpoint -> report."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from . import __version__, plan
from .calibrate.base_checks import tell_of_own_code
from .calibrate.base_model import Base, resolve, resolve_config
from .calibrate.corpus import Skipped
from .calibrate.data import Blocks, blocks, document_key, documents, from_files
from .checkpoint.families import context_of, model_class, norms_of
from .checkpoint.keys import environment, tensors_key
from .checkpoint.layout import CARD, RECIPE, REPORT, RESOLVED_RECIPE, SEARCH_PLOT, weight_files
from .checkpoint.outputs import new_folder, refuse, refuse_among_inputs
from .cost import predicted
from .evaluate import columns
from .evaluate.measure import check_prompts, measure_all
from .export import card, write
from .export.verify import write_manifest
from .fit.descent import Progress
from .fit.distill import distill
from .fit.proxies import fit_proxies, judged
from .fit.queries import Rows, Text, answered, fit_queries, pair_of_texts, scoring
from .fit.updates import blank, fit_updates, skipping_parts
from .modeling.configuration_spts import Amount, Schedule, Stage
from .recipe import DistillSection, ModelSection, Recipe, SearchSection
from .search import run as searching
from .search import space
from .search import tables as search_tables
from .search.prompts import PromptSet
from .timing.break_even import shortest_paying_length
from .timing.pairs import GREEDY, StageTimer, on_weights_of, stock_twin
from .utils.devices import hardware
from .utils.distributed import SINGLE_PROCESS, Ranks
from .utils.errors import UserError, reason
from .utils.store import Store, as_tensor, claimed, fingerprint, from_tensor
from .utils.tables import size

CORRECTED = "All that was searched is without the corrections of probing queries that the exported schedule has."
Log = Callable[[str], None]
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy")


def describe(recipe: Recipe, device: str = "cpu") -> str:
    """The plan of a recipe; reads the base's config only.

    Raises:
        UserError: for anything that would stop the run early.
    """
    notes: list[str] = []
    documents(recipe.calibration, notes.append)
    config = resolve_config(recipe.model, recipe.calibration.chat_template)
    recipe, schedule = suited(recipe, config, notes.append)
    _read_haystacks(recipe)
    name = recipe.model.path or str(recipe.model.gguf_file)
    tell_of_own_code(config, name, notes.append)
    rest = (recipe.report.lengths, recipe.model.dtype, recipe.calibration.tokens, recipe.search, device)
    weights = _weight_bytes(recipe.model, config)
    return "\n".join([plan.describe(name, config, schedule, *rest, weights, recipe.distill), *notes])


def _weight_bytes(section: ModelSection, config: Any) -> int | None:
    """Bytes of the weights that a run writes: of files that it copies, or of a GGUF file's tensors, twice, in the work
    folder too; None where they are not on this disk."""
    if section.gguf_file:
        return 2 * plan.BYTES[section.dtype] * plan.parameters(config)
    if not section.path or not (folder := Path(section.path).expanduser()).is_dir():
        return None
    files = [folder / name for name in weight_files(folder, getattr(config, "transformers_weights", None))]
    return sum(path.stat().st_size for path in files if path.is_file()) or None


def run(
    recipe: Recipe,
    verbatim: str,
    output: Path,
    device: str = "cpu",
    force: bool = False,
    work: Path | None = None,
    log: Log = print,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any] | None:
    """Build the checkpoint `output`. A run that was stopped goes on where it was when it is started again.

    Args:
        verbatim: the recipe as it was written, below its `--set` edits as comments.
        work: folder for finished work, by default `output`.work; recipes that share one share what they can.
        ranks: the processes that share calibration, fitting and search; the leader exports and measures.

    Returns:
        The report: proxy fidelity and measurements, and the costs of the stages unless some of the work was finished
        before; None but for the leader.

    Raises:
        UserError: for bad input or environment, before any long work where that is possible.
    """
    calibration, search = recipe.calibration, recipe.search
    named = (calibration.path, calibration.dataset, recipe.report.text, search and search.text)
    texts, base = [Path(path) for path in named if path], Path(recipe.model.path) if recipe.model.path else None
    inputs = [*texts, *([base] if base else [])]
    refuse(output, force, inputs)
    root, search_folder = work or output.with_name(output.name + ".work"), output.with_name(output.name + ".search")
    refuse_among_inputs(output, root, base, texts, search_folder if search else None)
    check_first(recipe, output, root, device)
    store, measures, stage, searched, asking, distilled = Store(root), Store(root), StageTimer(device), None, None, None
    begins_anew = not any(root.glob("[!.]*-*"))  # with no finished work, which would cost next to nothing now
    with ExitStack() as stack:
        if ranks.is_main:
            again = f" with --work {root}, and no finished work is done again"
            staging = stack.enter_context(new_folder(output, force, inputs, again))
            stack.enter_context(store.lock())
            if recipe.search is not None:
                stack.enter_context(claimed(search_folder, search_tables.FILES))
        ready = prepare(recipe, store, device, ranks, stage, log)
        if ready.prompts is not None:
            with stage("search"):
                key = ready.key(device)
                searched = searching.run(ready.model, ready.skipping(), ready.prompts, store, key, log, ranks)
            ready = _take_found(ready, searched, search_folder, log, ranks)
        if not ranks.is_main:
            return None
        if ready.schedule.probe.rank:
            with stage("queries"):
                ready, asking = _with_queries(ready, store, log)
        if ready.schedule.update:
            with stage("updates"):
                ready = _with_updates(ready, store)
        if recipe.distill.steps:
            with stage("distillation"):
                ready, distilled = _distilled(ready, store, log)
        if recipe.export.break_even:
            ready = replace(ready, schedule=_from_break_even(ready, device, store, log))
        ready = replace(ready, model=None)  # the check loads the checkpoint twice
        gc.collect()
        _export(ready, staging, stage, log)
        measured = _measure(ready, staging, device, measures)  # the base is no longer needed
        fits = judged(ready.fits, ready.schedule, max(ready.recipe.report.lengths))
        for fit in fits:
            if ranking := measured["skipped_states"].get(str(fit["layer"])):
                fit["skipped"] = ranking
        for row in measured["fidelity"] if ready.same_text else ():
            row["prompts"] = "text searched on"
        report = {
            "proxies": fits,
            "search": searched,
            "queries": asking,
            "distilled": distilled,
            "same_text": ready.same_text,
            "stages": stage.costs if begins_anew else {},
            **measured,
        }
        fitted_on = ready.searched_on.union(ready.sequences.fitted if ready.parameters else ())
        if ready.schedule.proxy or asking or distilled:  # whose sizes and best steps are chosen on what is held out
            fitted_on |= ready.sequences.checked
        report["fitted_on"] = sorted(fitted_on)
        fitted = "\n\n".join(columns.fitted(report))
        tables = columns.speed_table(report), columns.score_tables(report), fitted
        found = None if searched is None else search_tables.as_text(searched)
        shown = card.render(ready.base, ready.schedule, report, *tables, found)
        for name, text in (
            (CARD, shown),
            (RECIPE, verbatim),
            (RESOLVED_RECIPE, _resolved(ready, distilled is not None)),
        ):
            (staging / name).write_text(text, encoding="utf-8")
        if searched is not None and (plot := search_folder / SEARCH_PLOT).exists():
            shutil.copyfile(plot, staging / SEARCH_PLOT)
        (staging / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        write_manifest(staging, ready.carried.names)
    measures.forget("speed")  # times, which a later run takes anew, since this machine may have been busy
    store.forget("break-even")
    return report


def suited(recipe: Recipe, config: Any, log: Log = lambda _: None) -> tuple[Recipe, Schedule]:
    """The recipe with every value for one model, and its schedule with the largest proxies there may be: the given one,
    a default one, or with a search one that starts at the earliest layer any candidate may use, so that proxies are
    fitted for all of them.

    Args:
        log: told if the schedule is a default.

    Raises:
        UserError: for what does not suit the model.
    """
    context, layers = context_of(config), config.num_hidden_layers
    recipe = plan.complete(recipe, config, context)
    longest = max(recipe.report.lengths)
    for name, length in (
        ("calibration.length", recipe.calibration.length),
        ("report.lengths", longest),
        ("report.quality_length", recipe.report.longest),
        ("queries.length and queries.following", recipe.queries.tokens if recipe.corrects else 0),
        ("distill.length and distill.following", recipe.distill.tokens),
    ):
        if length > context:
            raise UserError(f"{name}: {length} is more than the model's context of {context}")
    schedule = recipe.read_schedule(layers, config.num_attention_heads)
    if schedule is None and recipe.search is not None:
        schedule = searching.widest(recipe.search, config)
    if schedule is None:
        schedule = space.default_schedule(config, plan.proxy_sizes(config, recipe.proxy), longest)
        speedup = predicted(config, schedule, longest)["speedup"]
        log(
            f"the recipe gives no schedule, so this is a default: {speedup:.2f} times fewer FLOPs at {longest} tokens; "
            "`search:` finds a better one"
        )
    later, now = ({layer for layer, _ in skipping_parts(schedule, layers, n)} for n in (context, longest))
    if (schedule.uses_proxies or schedule.update) and (idle := sorted(later - now)):
        log(
            f"schedule: of the longest of report.lengths, {longest} tokens, layers {', '.join(map(str, idle))} skip "
            "nothing, so that nothing is fitted for them, though they skip in longer prompts: give report.lengths as "
            "long as yours will be"
        )
    if schedule.probe.rank:
        length, always = recipe.queries.length, schedule.sink_tokens + schedule.always_last
        if 2 * always > length:
            raise UserError(f"queries.length: {always} of {length} tokens are always active; raise it")
        if not scoring(schedule, config, tokens := recipe.queries.tokens):
            raise UserError(f"queries.length: all heads that score have windows of less than {tokens} tokens; lower it")
    if not schedule.uses_proxies:
        return recipe, replace(schedule, proxy=())
    sizes = plan.proxy_sizes(config, recipe.proxy, schedule.start)
    return recipe, replace(schedule, proxy=tuple(sizes[layer] for layer in range(schedule.start, layers)))


def check_first(recipe: Recipe, output: Path, root: Path, device: str) -> None:
    """All that can be checked before the base's weights and the text are read.

    Raises:
        UserError: for folders that can't be written to, text that can't be read, what does not suit the model, or too
            little disk or memory.
    """
    if root.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--work {root} is in the output {output}, which is made anew; give another --work")
    _read_haystacks(recipe)
    config = resolve_config(recipe.model, recipe.calibration.chat_template)
    recipe, schedule = suited(recipe, config)
    dtype, tokens = recipe.model.dtype, recipe.calibration.tokens
    parent = next(p for p in output.absolute().parents if p.exists())
    need = plan.disk_need(config, schedule, dtype, tokens, recipe.search, _weight_bytes(recipe.model, config))
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(f"{parent}: {size(free)} free on the disk, but the run needs about {size(need)}")
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = plan.memory_need(config, dtype, tokens, device, recipe.distill)
    if memory < need:
        raise UserError(
            f"{device}: {size(memory)} of memory, but the run needs about {size(need)}; use a larger machine"
            + (", or lower distill.length" if recipe.distill.steps else "")
        )
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}: not writable; give another --output")


@dataclass(frozen=True)
class Prepared:
    """What search and export start from.

    `recipe`: with every value. `carried`: what of the base travels. `asked`: what probing queries are corrected on and
    checked by, if they are. `haystack`: text of the report's prompts.
    `prompts`: those of a search; None without one. `searched_on`: keys of the documents they are made of;
    `same_text`: whether the haystack has some of these. `model`: the stock model; None once it is not needed.
    `schedule`: with the sizes of the proxies, whose `parameters` go by their name in the exported model. `fits`:
    see `fit_proxies`.
    """

    recipe: Recipe
    base: Base
    carried: write.Carried
    tokenizer: Any
    sequences: Blocks
    asked: tuple[list[Text], ...]
    haystack: str
    prompts: PromptSet | None
    searched_on: frozenset[str]
    same_text: bool
    model: Any
    schedule: Schedule
    parameters: dict[str, torch.Tensor]
    fits: list[dict]

    def key(self, device: str) -> str:
        """Fingerprint of all that what a schedule does to a prompt depends on, but for these two."""
        kind, tensors = torch.device(device).type, tensors_key(self.parameters)
        return fingerprint(self.base.key, self.recipe.model.dtype, kind, tensors, environment())

    @property
    def computed_by(self) -> tuple[str, ...]:
        """What all that the stock model computes depends on."""
        return self.base.key, str(self.model.dtype), self.model.device.type, environment()

    def skipping(self) -> Any:
        """The skipping model on the parameters of the stock one."""
        kind = model_class(self.base.family)
        added = {name: tensor.to(self.model.device, self.model.dtype) for name, tensor in self.parameters.items()}
        return on_weights_of(self.model, kind, added, spts=self.schedule.to_dict())


def prepare(
    recipe: Recipe,
    store: Store,
    device: str,
    ranks: Ranks = SINGLE_PROCESS,
    stage: StageTimer | None = None,
    log: Log = lambda _: None,
) -> Prepared:
    """Read model and text, and fit proxies, and for a search updates, for every layer that may skip; what `store` has
    is reused.

    Raises:
        UserError: for bad input, where possible before long work.
    """
    stage, prompts, searched_on, same_text = stage or StageTimer(device), None, frozenset[str](), False
    with stage("model and text"):
        texts = documents(recipe.calibration, log)
        with ranks.main_first():  # who may convert or download it
            base = resolve(recipe.model, store)
        tell_of_own_code(base.config, base.name, log)
        if base.dequantised:
            log(f"{base.name}: its weights are dequantised, and so not quite those of the model that was quantised")
        recipe, schedule = suited(recipe, base.config, log)
        carried = write.carry(base)
        card.license_of(base)  # what is wrong with it shows now
        if any(name.startswith("custom_generate/") for name in carried.names):
            log(f"{base.name}: its custom_generate/ is renamed in the checkpoint, whose generate would not skip by it")
        tokenizer = base.tokenizer(recipe.calibration.chat_template)
        sequences = blocks(recipe.calibration, texts, tokenizer, log)
        column = recipe.calibration.column
        haystack, asked_about = _unseen("report.text", recipe.report.text, sequences, texts[0], column)
        check_prompts(recipe.report, tokenizer, haystack)
        if recipe.search is not None:  # made here, since bad lengths show before the long work
            text, searched_on = _unseen("search.text", recipe.search.text, sequences, texts[0], column)
            prompts = PromptSet(recipe.search, tokenizer, text).filled(ranks)
            for note in prompts.notes:
                log(f"search: {note}")
            same_text = text == haystack or not searched_on.isdisjoint(asked_about - sequences.fitted)
        asked: tuple[list[Text], ...] = ()
        if recipe.corrects:
            _check_text("queries", recipe.queries.tokens, sequences)
            if ranks.is_main:  # who alone fits them
                of = tokenizer.chat_template, recipe.queries.model_dump(), _plain(sequences.parts)
                make = partial(pair_of_texts, sequences, tokenizer, recipe.queries)
                asked = store.json("query-texts", fingerprint(base.key, environment(), *of), make)
        if recipe.distill.steps:
            _check_text("distill", recipe.distill.tokens, sequences)
            if recipe.search is None and not _distils(recipe.distill, schedule, base.config):
                raise UserError(f"distill.length: no update is used in {recipe.distill.length} tokens; raise it")
        model = base.load(recipe.model.dtype, device)
        _try_forward(model, sequences, base.name)
    fitted: Any = schedule, {}, [{"layer": layer} for layer in range(schedule.start, base.config.num_hidden_layers)]
    if schedule.proxy:
        with stage("proxies"):
            key = fingerprint(base.key, recipe.model.dtype, torch.device(device).type, environment())
            longest, places = max(recipe.report.lengths), norms_of(base.family)
            fitted = fit_proxies(model, schedule, recipe.proxy, sequences, longest, key, places, store, ranks)
    ready = Prepared(
        recipe, base, carried, tokenizer, sequences, asked, haystack, prompts, searched_on, same_text, model, *fitted
    )
    if prompts is not None and ready.schedule.update:
        with stage("updates for the search"), ranks.main_first():
            ready = _with_updates(ready, store, on_dense=True)
    return ready


def _take_found(ready: Prepared, searched: dict[str, Any], folder: Path, log: Log, ranks: Ranks) -> Prepared:
    """Save what the search found, and take the schedule that meets its target, with the proxies of its layers if it
    uses them.

    Raises:
        UserError: that none was chosen, since what was wanted was not found or not said, with what was found.
    """
    layers, section = ready.base.config.num_hidden_layers, ready.recipe.search or SearchSection()
    points, wanted = searched["points"], "search has no target"
    if section.decides:
        wanted = "no schedule meets the target" + (f" of quality {section.quality:g}" if section.quality else "")
    if searched["chosen"] is None and points and section.on_failure == "export":
        searched["chosen"] = number = max(range(len(points)), key=lambda i: points[i]["quality"])
        searched["missed"] = f"{wanted}; by search.on_failure the nearest is exported: {points[number]['quality']:.3f}"
        log(searched["missed"])
    if section.probe_rank:
        searched["notes"] = [*searched["notes"], CORRECTED]
    if ranks.is_main:
        search_tables.save(searched, folder, layers)
    if (chosen := searched["chosen"]) is None:
        nearest = "; ".join(f"{p['cost']['speedup']:.2f}x has {p['quality']:.3f}" for p in points) or "none"
        raise UserError(
            f"{wanted}, so nothing is exported (agreement with dense by speed-up: {nearest}; see {folder}): set "
            "search.speedup, or lower search.quality, or search.on_failure: export"
        )
    schedule = Schedule.from_dict(points[chosen]["winner"]["schedule"], layers)
    schedule = replace(schedule, probe=replace(schedule.probe, rank=section.probe_rank))
    if not schedule.uses_proxies:
        return replace(ready, schedule=replace(schedule, proxy=()), parameters={})
    parameters = {n: t for n, t in ready.parameters.items() if int(n.split(".")[2]) >= schedule.start}
    return replace(ready, schedule=schedule, parameters=parameters)


def _with_queries(ready: Prepared, store: Store, log: Log) -> tuple[Prepared, dict[str, Any] | None]:
    """With the corrections of its probing queries, and what they bring; without, and None, where no head that scores
    sees a text to fit on whole. What is fitted is kept, for all schedules that ask alike."""
    schedule, config, section = ready.schedule, ready.base.config, ready.recipe.queries
    if not scoring(schedule, config, section.tokens):
        log(f"queries: all heads that score have windows of less than {section.tokens} tokens, and stay as they are")
        return replace(ready, schedule=replace(schedule, probe=replace(schedule.probe, rank=0))), None
    stages = (Stage(config.num_hidden_layers - 1, Amount(1.0)),)
    bare = Schedule(
        schedule.start, stages, (), schedule.probe, schedule.sink_tokens, schedule.recent_tokens, "attention"
    )
    none = blank(bare, config, ready.model.dtype, queries=True)
    fitted = replace(ready, schedule=bare, parameters=none)

    def kept(prompts: Rows, make: Callable[[], Rows]) -> Rows:
        answers: Rows = store.json("query-answers", fingerprint(*ready.computed_by, prompts, section.following), make)
        return answers

    texts = [answered(ready.model, some, section.following, kept) for some in ready.asked]
    fitted, brought = _fitted(fitted, store, "queries", fit_queries, *texts, section, resumes=True)
    return replace(ready, parameters={**ready.parameters, **fitted.parameters}), {**brought, "kinds": section.kinds}


def _with_updates(ready: Prepared, store: Store, on_dense: bool = False) -> Prepared:
    """With the maps that the schedule's `update` asks for, and their R^2 among the fits; what is fitted is kept.

    Args:
        on_dense: see `fit_updates`.
    """
    ready = replace(
        ready, parameters={**ready.parameters, **blank(ready.schedule, ready.base.config, ready.model.dtype)}
    )
    longest = max(*ready.recipe.report.lengths, ready.recipe.report.longest)
    ready, rows = _fitted(ready, store, "updates", fit_updates, *ready.sequences.parts, longest, on_dense)
    r2 = {row["layer"]: row for row in rows}
    return replace(ready, fits=[{**fit, "update": r2.get(fit["layer"], {})} for fit in ready.fits])


def _plain(value: Any) -> Any:
    """Tensors, in lists and tuples of any depth, as lists."""
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _fitted(
    ready: Prepared, store: Store, name: str, fit: Callable[..., Any], *given: Any, resumes: bool = False
) -> tuple[Prepared, Any]:
    """With the updates or corrections of a skipping model that `fit` changed in place by what is `given`, and what it
    said of them. Both are kept under `name`, and meanwhile, if it `resumes`, what it has done."""
    key = fingerprint(*ready.computed_by, _plain(given), ready.schedule.to_dict(), tensors_key(ready.parameters))
    kept, begun = store.tensors(name, key), (f"{name}-begun", key)
    if kept is None:
        model = ready.skipping()
        more = [Progress(partial(store.tensors, *begun), partial(store.put_tensors, *begun))] if resumes else []
        said = as_tensor(fit(model, *given, *more))
        fitted = {part: value for part, value in model.state_dict().items() if "_update." in part}
        kept = {**fitted, "said": said}
        store.put_tensors(name, key, kept)
    store.drop(*begun)
    said = from_tensor(kept.pop("said"))
    return replace(ready, parameters={**ready.parameters, **kept}), said


def _check_text(name: str, tokens: int, sequences: Blocks) -> None:
    """Raises UserError if there is too little text for a section of the recipe, which takes so many tokens at once."""
    least = min(sequences.sizes)
    if least < tokens:
        raise UserError(
            f"{name}: a prompt and what follows it are {tokens} tokens, and {least} are to be fitted on, or "
            f"held out: raise calibration.tokens (or held_out), or lower {name}.length"
        )


def _distils(section: DistillSection, schedule: Schedule, config: Any) -> bool:
    """Whether an update changes what follows the prompts: those of the last layer never do, which nothing reads."""
    layers = config.num_hidden_layers
    return any(layer < layers - 1 for layer, _ in skipping_parts(schedule, layers, section.length))


def _distilled(ready: Prepared, store: Store, log: Log) -> tuple[Prepared, dict[str, float] | None]:
    """With updates that are distilled, and what that brought, see `distill`; as it is, and None, where a search found a
    schedule without use for it."""
    section = ready.recipe.distill
    if not _distils(section, ready.schedule, ready.base.config):
        log(f"distill: the schedule that was found uses no update in {section.length} tokens, so there is none")
        return ready, None
    return _fitted(ready, store, "distilled", distill, *ready.sequences.parts, section, resumes=True)


def _from_break_even(ready: Prepared, device: str, store: Store, log: Log) -> Schedule:
    """The schedule with prompts dense up to where skipping begins to pay; what was timed is kept."""
    schedule = ready.schedule
    key = fingerprint(ready.base.key, schedule.to_dict(), hardware(device), str(ready.model.dtype), environment())
    length = store.json("break-even", key, lambda: shortest_paying_length(ready.model, ready.skipping()))
    if length is None:
        log("skipping does not pay here at any length tried, so min_length stays; the KV cache is smaller all the same")
        return schedule
    return replace(schedule, min_length=max(schedule.min_length, length))


def _export(ready: Prepared, folder: Path, stage: StageTimer, log: Log) -> None:
    """Write the checkpoint into `folder`, and check it."""
    base = ready.base
    log("writing the checkpoint")
    with stage("export"):
        write.write(base, ready.carried, ready.schedule, ready.parameters, folder)
    if base.key_now() != base.key:
        raise UserError(f"{base.name}: the base was changed during the run; start it again")
    log("checking it in a fresh process")
    with stage("check"):
        write.check(folder, base, ready.carried, ready.schedule, ready.recipe.model.dtype)


def _measure(ready: Prepared, folder: Path, device: str, store: Store) -> dict[str, Any]:
    """Measure the checkpoint in `folder` beside its base; each finished measurement is kept."""
    dtype, section = ready.recipe.model.dtype, ready.recipe.report
    spts = write.load(folder, ready.base.family, device, dtype)
    measured = [ready.schedule.to_dict(), dtype, section.model_dump(), tensors_key(ready.parameters)]
    key = fingerprint(ready.base.key, measured, hardware(device), ready.haystack, environment())
    what = stock_twin(spts), spts, ready.tokenizer, ready.haystack, section
    return measure_all(*what, lambda name, make: store.json(name, key, make))


def _unseen(
    name: str, path: str | None, sequences: Blocks, calibration: list[str], column: str | None
) -> tuple[str, frozenset[str]]:
    """Text that nothing was fitted on: that of a file or folder, which the recipe calls `name`, or of those of the
    documents for `calibration` (of this `column`, if it names one) that are left; and the keys of all documents there.

    Raises:
        UserError: if something was fitted on a document of the file or folder.
    """
    if path is None:
        return sequences.unseen, frozenset(map(document_key, calibration))
    texts = list(from_files(Path(path)))
    keys = list(map(document_key, texts))
    seen = sum(key in sequences.fitted for key in keys)
    if column:  # the same rows may have other text for prompts than for calibration
        with suppress(UserError):  # or none
            fitted_on = from_files(Path(path), (column,), Skipped())
            seen = max(seen, sum(document_key(text) in sequences.fitted for text in fitted_on))
    if seen:
        raise UserError(
            f"{name}: the calibration fits on {seen} of the {len(texts)} documents in {path}: leave it out, and "
            "documents held out there are taken, or give other text"
        )
    return "\n\n".join(texts), frozenset(keys)


def _read_haystacks(recipe: Recipe) -> None:
    """Read the text of prompts once, so that what is wrong with it shows early."""
    for path in (recipe.report.text, recipe.search and recipe.search.text):
        if path:
            list(from_files(Path(path)))


def _try_forward(model: Any, sequences: Blocks, name: str) -> None:
    """One tiny forward pass, as an answer's first token, so that a broken base is found before the long work."""
    embeddings, largest = model.config.vocab_size, max(int(part.max()) for part in sequences.fit + sequences.held_out)
    if largest >= embeddings:
        raise UserError(
            f"{name}: the calibration text has the token {largest}, but the model has {embeddings} embeddings"
        )
    ids = sequences.fit[0][None, :8].to(model.device)
    options = {**GREEDY, "max_new_tokens": 1, "output_logits": True}
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{name}: the base does not answer with its generation_config.json: {reason(error)}") from None
    if not torch.isfinite(out.logits[0]).all():
        raise UserError(f"{name}: the base model gives values that are not finite; check its weights and model.dtype")


def _resolved(ready: Prepared, distilled: bool) -> str:
    """The recipe with every value (the schedule in place of its search, and steps only where updates were `distilled`),
    the base's exact weights and the versions used, as YAML that loads as a recipe."""
    lines = [f"# made with spts-compress {__version__}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)]
    lines += [f"# base {name}: sha256 {digest}" for name, digest in ready.base.weights.items()]
    if ready.recipe.search and ready.schedule.proxy:
        lines.append("# the proxies were fitted for all candidates; this schedule alone may choose other sizes of them")
    if ready.recipe.search:
        lines.append("# the schedule was searched for on text that a checkpoint made by this recipe does not know of")
    data = ready.recipe.model_dump()
    data["model"]["revision"] = ready.base.revision or ready.recipe.model.revision
    data["schedule"] = {k: v for k, v in ready.schedule.to_dict().items() if k not in ("proxy", "enabled")}
    data["distill"]["steps"] *= distilled  # a schedule that is given must have use for them
    if not ready.schedule.probe.rank:
        del data["queries"]
    data["export"]["break_even"] = False  # its result is the schedule's min_length
    del data["search"]
    return "\n".join(lines) + "\n" + yaml.safe_dump(data, sort_keys=False)
