"""The main job: recipe -> base and calibration -> proxies -> search -> checkpoint -> report."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from . import __version__, plan
from .calibrate import capture
from .calibrate.base_model import Base, resolve, resolve_config
from .calibrate.data import Blocks, blocks, documents, from_files
from .checkpoint.families import context_of, model_class, norms_of
from .checkpoint.keys import environment, tensors_key
from .checkpoint.layout import CARD, RECIPE, REPORT, RESOLVED_RECIPE, SEARCH_PLOT
from .checkpoint.outputs import new_folder, refuse
from .cost import has_experts
from .evaluate import columns
from .evaluate.report import check_prompts, measure_all
from .export import card, write
from .export.verify import write_manifest
from .fit import metrics
from .fit.ltp import FeedForward, Tokens
from .fit.size import choose
from .modeling.configuration_spts import Proxy, Schedule
from .recipe import Recipe, SearchSection
from .search import dense_reference
from .search import report as search_report
from .search import run as searching
from .timing.break_even import shortest_paying_length
from .timing.pairs import stock_twin
from .timing.stage_timer import StageTimer
from .utils.devices import hardware
from .utils.distributed import SINGLE_PROCESS, Ranks
from .utils.errors import UserError, reason
from .utils.store import Store, claimed, fingerprint
from .utils.tables import size


def describe(recipe: Recipe, device: str = "cpu") -> str:
    """The plan of a recipe; reads the base's config only.

    Raises:
        UserError: for anything that would stop the run early.
    """
    notes: list[str] = []
    documents(recipe.calibration, notes.append)
    config = resolve_config(recipe.model, recipe.calibration.chat_template)
    _check_lengths(recipe, config)
    for path in (recipe.report.text, recipe.search.text if recipe.search else None):
        _prose(path)
    schedule = _widest(recipe, config)
    plan.check_share(config, recipe.proxy, schedule.start)
    name = recipe.model.path or str(recipe.model.gguf_file)
    rest = (recipe.report.lengths, recipe.model.dtype, recipe.calibration.tokens, recipe.search, device)
    return "\n".join([plan.describe(name, config, schedule, *rest), *notes])


def _widest(recipe: Recipe, config: Any) -> Schedule:
    """The recipe's schedule; where it is to be searched for, one from the earliest layer on that a candidate may
    score or skip in."""
    full, layers = Proxy(recipe.proxy.channels, recipe.proxy.rank), config.num_hidden_layers
    sizes = tuple(Proxy(1, 0) if has_experts(config, layer) else full for layer in range(layers))
    if (schedule := recipe.read_schedule(layers, config.num_attention_heads)) is None:
        schedule = searching.widest(recipe.search or SearchSection(), config)
    return replace(schedule, proxy=sizes[schedule.start :])


@dataclass(frozen=True)
class Prepared:
    """What search and export start from.

    `carried`: what of the base travels. `model`: the stock model. `asked`: the prompts of a search; None without one.
    `schedule`: with the sizes of the proxies, whose `parameters` go by their name in the exported model. `fits`: see
    `fit_proxies`.
    """

    base: Base
    carried: write.Carried
    tokenizer: Any
    sequences: Blocks
    asked: searching.Asked | None
    model: PreTrainedModel
    schedule: Schedule
    parameters: dict[str, torch.Tensor]
    fits: list[dict]

    def skipping(self, schedule: Schedule | None = None) -> Any:
        """The skipping model on the parameters of the stock one."""
        return dense_reference.skipping(
            self.model, model_class(self.base.family), schedule or self.schedule, self.parameters
        )


def prepare(
    recipe: Recipe,
    store: Store,
    device: str,
    ranks: Ranks = SINGLE_PROCESS,
    stage: StageTimer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Read model and text, and fit proxies for every layer in which the recipe may skip; what `store` has is reused.

    Raises:
        UserError: for bad input, where possible before long work.
    """
    stage = stage or StageTimer(device)
    with stage("model and text"):
        texts, search = documents(recipe.calibration, say), recipe.search
        with ranks.main_first():  # who may convert or download it
            base = resolve(recipe.model, store)
        carried = write.carry(base)
        tokenizer = base.tokenizer(recipe.calibration.chat_template)
        sequences = blocks(recipe.calibration, texts, tokenizer, say)
        check_prompts(recipe.report, tokenizer, _prose(recipe.report.text) or sequences.unseen)
        asked = None
        if search is not None:  # made here, since bad lengths show before the long work
            prose = _prose(search.text) or sequences.unseen
            asked = searching.Asked(search, tokenizer, prose).first(ranks)
        model = base.load(recipe.model.dtype, device)
        _try_forward(model, sequences, base.name)
    with stage("proxies"):
        schedule = _widest(recipe, base.config)
        schedule, parameters, fits = fit_proxies(model, base, recipe, schedule, sequences, store, ranks)
    return Prepared(base, carried, tokenizer, sequences, asked, model, schedule, parameters, fits)


def run(
    recipe: Recipe,
    verbatim: str,
    output: Path,
    device: str = "cpu",
    force: bool = False,
    work: Path | None = None,
    say: Callable[[str], None] = print,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any] | None:
    """Build the checkpoint `output`. A run that was stopped goes on where it was when it is started again.

    Args:
        verbatim: the recipe as it was written.
        work: folder for finished work, by default `output`.work; recipes that share one share what they can.
        ranks: the processes that share calibration, fitting and search; the leader exports and measures.

    Returns:
        The report: proxy fidelity and measurements; None but for the leader.

    Raises:
        UserError: for bad input or surroundings, before any long work where that is possible.
    """
    named = (recipe.model.path, recipe.calibration.path, recipe.report.text, recipe.search and recipe.search.text)
    inputs = [Path(path) for path in named if path]
    refuse(output, force, inputs)
    root = work or output.with_name(output.name + ".work")
    if root.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--work {root} is in the output {output}, which is made anew; give another --work")
    prose = _prose(recipe.report.text)
    config = resolve_config(recipe.model, recipe.calibration.chat_template)
    _check_lengths(recipe, config)
    schedule = _widest(recipe, config)
    plan.check_share(config, recipe.proxy, schedule.start)
    _check_room(recipe, config, schedule, output, device)
    store, folder = Store(root), output.with_name(output.name + ".search")
    with ExitStack() as stack:
        staging = Path()
        if ranks.is_main:
            again = f" with --work {root}, and no finished work is done again"
            staging = stack.enter_context(new_folder(output, force, inputs, again))
            stack.enter_context(store.lock())
            if recipe.search is not None:
                stack.enter_context(claimed(folder, search_report.FILES))
        stage = StageTimer(device)
        ready = prepare(recipe, store, device, ranks, stage, say)
        base, schedule, parameters, fits = ready.base, ready.schedule, ready.parameters, ready.fits
        carried = ready.carried
        searched = None
        if recipe.search is not None and ready.asked is not None:
            key = fingerprint(
                base.key, recipe.model.dtype, torch.device(device).type, tensors_key(parameters), environment()
            )
            with stage("search"):
                searched = searching.run(ready.model, ready.skipping(), ready.asked, store, key, say, ranks)
            if ranks.is_main:
                search_report.save(searched, folder, config.num_hidden_layers)
            schedule = _found(searched, recipe.search, folder, config.num_hidden_layers)
            fits = [fit for fit in fits if fit["layer"] >= schedule.start]
            parameters = {n: t for n, t in parameters.items() if int(n.split(".")[2]) >= schedule.start}
            ready = replace(ready, parameters=parameters)
        if not ranks.is_main:
            return None
        if recipe.export.break_even:
            schedule = _from_break_even(ready, schedule, device, store, say)
        tokenizer, text = ready.tokenizer, prose or ready.sequences.unseen
        del ready  # and its model: the check loads the checkpoint twice
        gc.collect()
        say("writing the checkpoint")
        with stage("export"):
            write.write(base, carried, schedule, parameters, staging)
        if base.key_now() != base.key:
            raise UserError(f"{base.name}: the base was changed during the run; start it again")
        say("checking it in a fresh process")
        with stage("check"):
            write.check(staging, base, carried, schedule, recipe.model.dtype)
        measured = _report(recipe, base, staging, schedule, tokenizer, text, device, store, parameters)
        for fit in fits:
            if found := measured["skipped_states"].get(str(fit["layer"])):
                fit["skipped"] = found
        report = {"proxies": fits, "search": searched, "stages": stage.costs, **measured}
        (staging / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        speed, quality = columns.speed_table(report), columns.score_tables(report)
        found = None if searched is None else search_report.as_text(searched)
        proxies = columns.proxy_table(fits)
        (staging / CARD).write_text(card.render(base, schedule, report, speed, quality, proxies, found))
        (staging / RECIPE).write_text(verbatim)
        (staging / RESOLVED_RECIPE).write_text(_resolved(recipe, base, schedule))
        if searched is not None and (plot := folder / SEARCH_PLOT).exists():
            shutil.copyfile(plot, staging / SEARCH_PLOT)
        write_manifest(staging, carried.names)
    return report


def fit_proxies(
    model: PreTrainedModel,
    base: Base,
    recipe: Recipe,
    schedule: Schedule,
    sequences: Blocks,
    store: Store,
    ranks: Ranks,
) -> tuple[Schedule, dict[str, torch.Tensor], list[dict]]:
    """Proxies of all skipping layers: the schedule with their sizes, parameters by their name in the exported model,
    and for each layer what was tried and how well it ranks tokens that nothing was fitted or chosen on."""
    text = [s.tolist() for s in sequences.fit + sequences.held_out]
    data_key = fingerprint(base.key, recipe.model.dtype, model.device.type, text, environment())
    layers = range(schedule.start, base.config.num_hidden_layers)
    relative = schedule.ffn_selection == "relative"
    shares = {}
    for layer in layers:
        counts = schedule.counts(layer, max(recipe.report.lengths))
        shares[layer] = counts.ffn_tokens / counts.candidates_in
    keys = {layer: fingerprint(data_key, recipe.proxy.model_dump(), layer, shares[layer], relative) for layer in layers}
    missing = ranks.broadcast([layer for layer in layers if store.tensors(f"proxy-{layer}", keys[layer]) is None])
    if missing:
        everything, places = sequences.fit + sequences.held_out, norms_of(base.family)
        fitted, kept = (sum(map(len, part)) for part in (sequences.fit, sequences.held_out))
        for layer, states, norms in capture.feed_forward(model, everything, missing, store, data_key, ranks, places):
            ffn = FeedForward.of(model.model.layers[layer], base.config, places)
            tokens, check, judge = (
                Tokens.of(ffn, *part)
                for part in zip(*(x.split([fitted, kept // 2, kept - kept // 2]) for x in (states, norms)), strict=True)
            )
            proxy, tried = choose(ffn, tokens, check, recipe.proxy, shares[layer], relative)
            proxy.to(getattr(torch, recipe.model.dtype))  # judged as it is exported
            judged = {f"judged.{name}": value for name, value in metrics.norms(proxy, ffn, judge).items()}
            # one unit, so that no kill can part what was tried from what was chosen
            choice = torch.tensor(list(json.dumps(tried).encode()), dtype=torch.uint8)
            store.put_tensors(f"proxy-{layer}", keys[layer], {**proxy.state_dict(), **judged, "choice": choice})
    ranks.barrier()
    parameters, fits, sizes = {}, [], []
    for layer in layers:
        unit = store.tensors(f"proxy-{layer}", keys[layer])
        if unit is None:
            raise UserError(f"{store.root}: the proxy of layer {layer} can't be read; run again to fit it anew")
        tried = json.loads(bytes(unit.pop("choice").tolist()))
        judged = {name.removeprefix("judged."): unit.pop(name) for name in list(unit) if name.startswith("judged.")}
        fits.append({"layer": layer, "share": shares[layer], **metrics.of(judged, shares[layer], relative), **tried})
        chosen = tried["candidates"][tried["chosen"]]
        sizes.append(Proxy(max(1, chosen["channels"]), chosen["rank"]))
        for name, value in unit.items():
            parameters[f"model.layers.{layer}.proxy.{name}"] = value
    return replace(schedule, proxy=tuple(sizes)), parameters, fits


def _report(
    recipe: Recipe,
    base: Base,
    folder: Path,
    schedule: Schedule,
    tokenizer: Any,
    prose: str,
    device: str,
    store: Store,
    parameters: dict[str, torch.Tensor],
) -> dict:
    """Measure the checkpoint in `folder` beside its base; each finished measurement is kept."""
    spts = write.load(folder, base.family, device, recipe.model.dtype)
    asked = [schedule.to_dict(), recipe.model.dtype, recipe.report.model_dump(), tensors_key(parameters)]
    key = fingerprint(base.key, asked, hardware(device), prose, environment())

    def keep(name: str, make: Callable[[], Any]) -> Any:
        return store.json(name, key, make)

    return measure_all(stock_twin(spts), spts, tokenizer, prose, recipe.report, keep)


def _from_break_even(
    ready: Prepared, schedule: Schedule, device: str, store: Store, say: Callable[[str], None]
) -> Schedule:
    """The schedule with prompts dense up to where skipping begins to pay; what was timed is kept."""
    key = fingerprint(ready.base.key, schedule.to_dict(), hardware(device), str(ready.model.dtype), environment())
    found = store.json("break-even", key, lambda: shortest_paying_length(ready.model, ready.skipping(schedule)))
    if found is None:
        say("skipping does not pay here at any length tried, so min_length stays; the KV cache is smaller all the same")
        return schedule
    return replace(schedule, min_length=max(schedule.min_length, found))


def _prose(path: str | None) -> str:
    """The text of a file or folder, empty if there is none."""
    return "\n\n".join(from_files(Path(path))) if path else ""


def _found(found: dict[str, Any], section: SearchSection, folder: Path, num_layers: int) -> Schedule:
    """The schedule that meets the target.

    Raises:
        UserError: if none does, or none was asked for, with what was found.
    """
    number = found["chosen"]
    if number is None and found["points"] and section.on_failure == "export":
        number = max(range(len(found["points"])), key=lambda i: found["points"][i]["quality"])
    if number is None:
        nearest = "; ".join(f"{p['cost']['speedup']:.2f}x has {p['quality']:.3f}" for p in found["points"]) or "none"
        wanted = "no schedule meets the target" if section.decides else "search has no target, so nothing is exported"
        raise UserError(
            f"{wanted} (agreement with dense by speed-up: {nearest}; see {folder}): set search.speedup, or lower "
            "search.quality, or search.on_failure: export"
        )
    return Schedule.from_dict(found["points"][number]["winner"]["schedule"], num_layers)


def _check_lengths(recipe: Recipe, config: Any) -> None:
    """Raises UserError for text that is longer than the model's context."""
    context = context_of(config)
    for name, length in (
        ("calibration.length", recipe.calibration.length),
        ("report.lengths", max(recipe.report.lengths)),
        ("report.quality_length", recipe.report.longest),
    ):
        if length > context:
            raise UserError(f"{name}: {length} is more than the model's context of {context}")


def _try_forward(model: PreTrainedModel, sequences: Blocks, name: str) -> None:
    """One tiny forward pass, as an answer's first token, so that a broken base is found before the long work."""
    size, largest = model.config.vocab_size, max(int(part.max()) for part in sequences.fit + sequences.held_out)
    if largest >= size:
        raise UserError(f"{name}: the calibration text has the token {largest}, but the model has {size} embeddings")
    ids = sequences.fit[0][None, :8].to(model.device)
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True}
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **asked)  # type: ignore[operator]
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{name}: the base does not answer with its generation_config.json: {reason(error)}") from None
    if not torch.isfinite(out.logits[0]).all():
        raise UserError(f"{name}: the base model gives values that are not finite; check its weights and model.dtype")


def _check_room(recipe: Recipe, config: Any, schedule: Schedule, output: Path, device: str) -> None:
    """Disk, memory and a writable output folder."""
    dtype, tokens = recipe.model.dtype, recipe.calibration.tokens
    parent = next(p for p in output.absolute().parents if p.exists())
    need = plan.disk_need(config, schedule, dtype, tokens, recipe.search)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(f"{parent}: {size(free)} free on the disk, but the run needs about {size(need)}")
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = plan.memory_need(config, dtype, tokens, device)
    if memory < need:
        raise UserError(
            f"{device}: {size(memory)} of memory, but the run needs about {size(need)}; use a larger machine"
        )
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}: not writable; give another --output")


def _resolved(recipe: Recipe, base: Base, schedule: Schedule) -> str:
    """The recipe with every value (the schedule in place of its search), the base's exact weights and the versions
    used, as YAML that loads as a recipe."""
    packages = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy")
    lines = [f"# made with spts-compress {__version__}, " + ", ".join(f"{p} {version(p)}" for p in packages)]
    lines += [f"# base {name}: sha256 {digest}" for name, digest in base.weights.items()]
    data = recipe.model_dump()
    data["model"]["revision"] = base.revision or recipe.model.revision
    data["schedule"] = {k: v for k, v in schedule.to_dict().items() if k not in ("proxy", "enabled")}
    data["export"]["break_even"] = False  # its result is the schedule's min_length
    del data["search"]
    return "\n".join(lines) + "\n" + yaml.safe_dump(data, sort_keys=False)
