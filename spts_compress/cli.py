"""The command line."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import __version__
from .utils.errors import UserError
from .utils.launch import world_size
from .utils.paths import expand


class FilePath(click.Path):
    """A path as people write it, see `expand`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(expand(os.fspath(value)), param, ctx)
        except ValueError as error:
            self.fail(f"the path {error}", param, ctx)


class Commands(click.Group):
    """Shows every fault as plain lines and exits with 2; Ctrl-C says that nothing finished is lost."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _plain_errors("--debug" in args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _plain_errors(ctx.params.get("debug", False)):
            return super().invoke(ctx)


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """Ends the process with the lines of an error in place of a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = "what is finished is kept, and the same command goes on from there"
        click.echo(f"\nstopped; {stop or kept}", err=True)
        sys.exit(130)
    except (click.exceptions.Exit, click.Abort, click.exceptions.NoArgsIsHelpError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader of our output has gone
            raise
        if debug:
            traceback.print_exc()
        lines, code = _explained(error)
        for line in lines:
            click.echo(f"error: {line}", err=True)
        sys.exit(code)


def _explained(error: Exception) -> tuple[list[str], int]:
    """An error in words, a line a fault, and the exit code: 2 for bad input or environment, 1 for a fault of ours."""
    if isinstance(error, UserError):
        return str(error).splitlines(), 2
    if isinstance(error, click.ClickException):
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "spts-compress"
        return [f"{' '.join(error.format_message().split())} (see {place} --help)"], 2
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename or 'system'}: {error.strerror}"], 2
    text = " ".join(str(error).split())
    return [f"unexpected {type(error).__name__}: {text[:300]} (spts-compress --debug ... shows where)"], 1


CHECKPOINT = click.argument("folder", metavar="DIR", type=FilePath(path_type=Path))
RECIPE = click.argument("file", metavar="FILE.yaml")
EDITS = click.option(
    "--set", "edits", multiple=True, metavar="SECTION.KEY=VALUE", help="Edit the recipe; may be repeated."
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...; auto: CUDA if there."
)
DTYPE = click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
OUTPUT = click.option(
    "--output", type=FilePath(path_type=Path), required=True, help="Folder for answers, tables, JSON and pictures."
)
PROMPTS = (  # which prompts an evaluation runs on, and how
    click.option(
        "--haystack", type=FilePath(), help="A file or folder of text [default: CPython's language reference]."
    ),
    click.option(
        "--longbench", type=FilePath(), metavar="FOLDER", help="LongBench's files, with its two dataset2*.json."
    ),
    click.option("--items", default=8, show_default=True, help="Prompts a task and length."),
    click.option("--seed", default=1, show_default=True, help="Of the generated prompts."),
    click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated."),
    click.option("--batch", default=1, show_default=True, help="Prompts at a time."),
    DTYPE,
    DEVICE,
    OUTPUT,
)


def _with(*options: Any) -> Callable[[Any], Any]:
    """Decorates a command with options."""
    return lambda command: reduce(lambda wrapped, option: option(wrapped), options, command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Turn a Hugging Face causal language model into a skip-ready checkpoint (SPTS, arXiv 2601.13155)."""
    if not _is_first():  # of several processes only the first shows progress
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which is later


@main.command()
@click.argument("model", metavar="MODEL")
@click.option("--speedup", type=float, help="Search for so many times fewer FLOPs [default: 2.0].")
@click.option("--kv", "kv_share", type=float, help="Or for keeping this share of the KV cache.")
@click.option("--quality", type=float, help="And, or instead, for this share of next tokens as dense.")
@click.option("--length", default=8192, show_default=True, help="Longest prompts in tokens.")
def init(model: str, length: int, **goals: float | None) -> None:
    """Print a commented recipe made for MODEL: a folder, a GGUF file, or a Hub id."""
    from .calibrate.base_model import resolve_config
    from .checkpoint.families import context_of
    from .starter import model_section, starter

    _quiet()
    section, goal = model_section(model), {name: value for name, value in goals.items() if value is not None}
    config = resolve_config(section)
    click.echo(starter(section, config, context_of(config), goal or {"speedup": 2.0}, length), nl=False)


@main.command()
@RECIPE
@click.option("--output", type=FilePath(path_type=Path), help="Folder to write, instead of the recipe's export.path.")
@EDITS
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@DEVICE
@click.option("--work", type=FilePath(path_type=Path), help="Folder for finished work [default: OUTPUT.work].")
@click.option("--force", is_flag=True, help="Replace a checkpoint that was made here and left as it was.")
def recipe(
    file: str, output: Path | None, edits: tuple[str, ...], dry_run: bool, device: str, work: Path | None, force: bool
) -> None:
    """Run a recipe: calibrate, fit, (search,) export, report. FILE.yaml is a path or the name of a shipped recipe."""
    from .recipe import find, parse, read_text

    path = find(file)
    text = read_text(path)
    read = parse(text, path, edits)
    verbatim = "".join(f"# --set {line}\n" for edit in edits for line in edit.splitlines()) + text
    from . import pipeline
    from .checkpoint.outputs import refuse_to_hold
    from .evaluate.columns import score_tables, speed_table
    from .export import hub

    _quiet()
    if dry_run:
        click.echo(pipeline.describe(read, _device(device)))
        return
    target = output or Path(read.export.path)
    if read.export.push_to_hub:
        hub.check_target(read.export.push_to_hub, read.export.private)  # now, not after hours
    refuse_to_hold(target, "an input of this run", path)
    with _spread(device) as (ranks, own):
        log = click.echo if ranks.is_main else lambda _: None
        report = pipeline.run(read, verbatim, target, own, force, work, log, ranks)
    if report is not None:
        tables = f"{speed_table(report)}\n\n{score_tables(report)}"
        click.echo(f"\n{tables}\n\n{target} is ready; its README.md is the model card")
        if read.export.push_to_hub:
            click.echo(hub.push(target, read.export.push_to_hub, read.export.private))


@main.command()
@CHECKPOINT
def inspect(folder: Path) -> None:
    """Show an exported checkpoint's schedule, sizes, proxy fidelity and measurements."""
    from .evaluate import inspect

    click.echo(inspect.inspect(folder))


@main.command()
@RECIPE
@OUTPUT
@click.option("--layers", metavar="N,N,...", help="Layers to study [default: four of the skipping ones].")
@click.option("--vary", multiple=True, metavar="FACTOR", help="Only this factor; may be repeated [default: all].")
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE", help="One more source of text; may be repeated.")
@EDITS
@DEVICE
def sweep(
    file: str,
    output: Path,
    layers: str | None,
    vary: tuple[str, ...],
    texts: tuple[str, ...],
    edits: tuple[str, ...],
    device: str,
) -> None:
    """Study how size, rho, calibration and objective change the proxies' fidelity."""
    from .checkpoint.outputs import refuse_in_text
    from .recipe import find, load, load_study
    from .utils.tables import files

    _single_process()
    _quiet()
    study, sources, recipe = load_study("proxy_sensitivity"), _named_files(texts), load(find(file), edits)
    for option, text in (
        ("calibration.path", recipe.calibration.path),
        ("calibration.dataset", recipe.calibration.dataset),
        *(("--text", path) for path in sources.values()),
    ):
        refuse_in_text(output, text, option)
    _claim(output, files("sweep"))
    own, numbers = _device(device), _numbers("--layers", layers) if layers is not None else None
    result = study.run(recipe, numbers, sources, output / "work", own, vary)
    click.echo(study.save(result, output))


@main.command()
@CHECKPOINT
@click.option("--suite", "suites", multiple=True, help="ruler, longbench, diversity, fidelity; may be repeated.")
@click.option("--lengths", default="4096", show_default=True, help="Prompt lengths in tokens, answers included.")
@click.option("--rescore", is_flag=True, help="Only score the answers that are there; no model is run.")
@click.option("--certify", is_flag=True, help="Put the result, in place of an earlier one, into card and checkpoint.")
@_with(*PROMPTS)
def evaluate(
    folder: Path, suites: tuple[str, ...], lengths: str, rescore: bool, certify: bool, output: Path, **options: Any
) -> None:
    """Scores of the dense and the skipping model on the same prompts. A stopped run goes on."""
    from .checkpoint.keys import stale
    from .checkpoint.outputs import refuse_in_text
    from .evaluate import suites as work

    device, dtype = options.pop("device"), options.pop("dtype")
    if suites:
        options["suites"] = suites
    config = work.EvalConfig(lengths=tuple(_numbers("--lengths", lengths)), **options).checked()
    refuse_in_text(output, config.haystack)
    _claim(output, work.RESULTS if rescore else work.files(world_size()))
    if warning := stale(folder):
        click.echo(f"warning: {warning}", err=True)
    if certify:
        work.card_text(folder)  # which is added to in the end
    if not rescore:
        with _spread(device) as (ranks, own):
            model, tokenizer, keys = work.load(folder, own, dtype, max(config.lengths), "--lengths")
            work.collect(model, tokenizer, keys, config, output, ranks)
        if not ranks.is_main:
            return
    result = work.summarise(output)
    if rescore:
        values, source = {**asdict(config), "dtype": dtype}, click.get_current_context().get_parameter_source
        asked = {name: value for name, value in values.items() if source(name) is ParameterSource.COMMANDLINE}
        for warning in work.differences(folder, result["setting"], asked):
            click.echo(f"warning: {warning}", err=True)
    click.echo(work.save(result, output))
    if certify:
        work.certify(folder, result)


@main.command()
@CHECKPOINT
@click.option("--length", default=8192, show_default=True, help="Prompt length in tokens.")
@click.option("--pairs", default=3, show_default=True, help="Timed rounds, all variants in turn.")
@click.option("--new-tokens", default="16,128", show_default=True, help="For the end-to-end times.")
@_with(*PROMPTS)
def ablate(folder: Path, length: int, pairs: int, new_tokens: str, output: Path, **options: Any) -> None:
    """The method's parts one after another: time, KV cache and scores."""
    from .checkpoint.outputs import refuse_in_text
    from .evaluate import ablate as work
    from .evaluate import suites as evaluation
    from .tasks.longbench import LongBench

    _single_process()
    numbers = tuple(_numbers("--new-tokens", new_tokens))
    if min(pairs, *numbers) < 1:
        raise UserError("--pairs and --new-tokens must be at least 1")
    device, dtype = _device(options.pop("device")), options.pop("dtype")
    if not options["tasks"]:
        there = LongBench(options["longbench"]).tasks() if options["longbench"] else []
        options["tasks"] = ("niah_single_2", "niah_multikey_1", *there)
    suites = tuple(s for s in evaluation.SUITES if s != "longbench" or options["longbench"])
    config = evaluation.EvalConfig(suites=suites, lengths=(length,), **options).checked()
    refuse_in_text(output, config.haystack)
    _claim(output, work.FILES)
    model, tokenizer, keys = evaluation.load(folder, device, dtype, length, "--length")
    result = work.ablate(model, tokenizer, keys, config, output, pairs, numbers)
    keys.unchanged()  # while it was timed, too
    click.echo(work.save(result, output))


@main.command()
@CHECKPOINT
@click.option("--lengths", default="2048,4096,8192", show_default=True, help="Prompt lengths in tokens.")
@click.option("--batch", "batches", default="1", show_default=True, help="Prompts at a time, one or more numbers.")
@click.option("--new-tokens", default=16, show_default=True, help="For end-to-end times and the decoding rate.")
@click.option("--pairs", default=5, show_default=True, help="Timed rounds, dense and SPTS in turn.")
@_with(DTYPE, DEVICE, OUTPUT)
def bench(
    folder: Path, lengths: str, batches: str, new_tokens: int, pairs: int, dtype: str, device: str, output: Path
) -> None:
    """Time, memory and what the arithmetic allows: dense and SPTS on the same weights."""
    from .evaluate import benchmark

    _single_process()
    _claim(output, benchmark.FILES)
    own = _device(device)
    command = (
        f"spts-compress bench {folder.resolve().name} --lengths {lengths} --batch {batches} --new-tokens {new_tokens} "
        f"--pairs {pairs} --dtype {dtype} --device {device}"
    )
    sizes = _numbers("--lengths", lengths), _numbers("--batch", batches)
    try:
        result = benchmark.run(folder, *sizes, new_tokens, pairs, own, dtype, output, command)
    except KeyboardInterrupt:
        kept = "bench.json has the rows that are finished; the same command starts anew"
        raise KeyboardInterrupt(kept) from None
    click.echo(benchmark.save(result, output))


@main.command()
@CHECKPOINT
def verify(folder: Path) -> None:
    """Check an exported checkpoint: hashes, code, index, shapes, schedule."""
    from .export.verify import require

    _quiet()
    require(folder)
    click.echo(f"{folder} is whole, and its code is that of spts-compress {__version__}")


@main.command()
@CHECKPOINT
@click.option("--output", type=FilePath(path_type=Path), required=True, help="New folder for the stock checkpoint.")
def strip(folder: Path, output: Path) -> None:
    """Give back the stock checkpoint, byte for byte, for engines without the skipping code."""
    from .export.strip import strip as back

    _quiet()
    click.echo("\n".join(back(folder, output)))


@main.command()
@CHECKPOINT
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Create it as private; one that is public already is refused.")
@click.option("--revision", help="Branch to upload to; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
def push(folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> None:
    """Upload an exported checkpoint to the Hub: the files that the export made, and no others.

    A repository that holds a checkpoint made here is made equal to this one: other files that a loader might read are
    removed, and the model card is replaced; its history keeps both. One that holds anything else is refused, so that
    neither a model nor a card of yours is overwritten; there, use a new --revision or --create-pr.
    """
    from .export import hub

    _quiet()
    click.echo(hub.listing(folder))
    click.echo(hub.push(folder, repo_id, private, revision, create_pr))


def _claim(output: Path, names: tuple[str, ...]) -> None:
    """Hold the folder in which this command makes `names`, until it ends."""
    from .checkpoint.outputs import refuse_in_model
    from .utils.store import claimed

    refuse_in_model(output)
    if _is_first():  # which writes for all
        click.get_current_context().with_resource(claimed(output, names))


def _is_first() -> bool:
    """Whether this is the first of several processes, or the only one, whose RANK would mean nothing."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def _single_process() -> None:
    """Raises UserError if this is one of several processes, which would disturb each other's times."""
    if world_size() > 1:
        name = click.get_current_context().info_name
        raise UserError(
            f"{name} is for one process: start it without torchrun or accelerate launch (WORLD_SIZE is set)"
        )


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _numbers(option: str, text: str) -> list[int]:
    """A list of different whole numbers, from 1,2,3."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers, separated by commas") from None


def _named_files(texts: tuple[str, ...]) -> dict[str, Path]:
    files = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--text {text}: give it as NAME=FILE")
        if name in files:
            raise UserError(f"--text {text}: the name {name} is given twice")
        try:
            files[name] = Path(expand(path))
        except ValueError as error:
            raise UserError(f"--text {text}: the path {error}") from None
    return files


@contextmanager
def _spread(device: str) -> Iterator[Any]:
    """The processes this one was started with (torchrun, accelerate launch), and its own device."""
    from .utils.distributed import ranks

    own = _device(device)
    with ranks() as processes:
        yield processes, own


def _device(name: str) -> str:
    """The device of this process, which the first of several says."""
    from .utils import devices

    device = devices.choose(name)
    if _is_first():
        click.echo(f"computing on {devices.in_words(device)}", err=True)
    return device
