"""The folders that a run makes: what may stand in their place, and how a finished one gets its name."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, some
from ..utils.store import claimed, file_hash, full_disk_named
from .layout import CERTIFICATE, CONFIG, FREE, MANIFEST, PROXIES, TOLD, all_files, read_json

WEIGHTS_OF_MODELS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def refuse_in_checkpoint(output: Path, option: str = "--output", replaced: Path | None = None) -> None:
    """Raises UserError if `output` is or lies in a checkpoint made here, which would no longer be whole.

    Args:
        replaced: a checkpoint that may be there, since it is made anew.
    """
    place = _place(output)
    for folder in (place, *place.parents):
        if folder != replaced and (folder / MANIFEST).exists():
            raise UserError(
                f"{option} {output} is in the checkpoint {folder}, which it would change; give one beside: "
                f"{_beside(folder)}"
            )


def refuse_in_model(output: Path) -> None:
    """Raises UserError if `output` is or lies in the folder of a model, whose files all travel into an export."""
    refuse_in_checkpoint(output)
    place = _place(output)
    for folder in (place, *place.parents):
        if (folder / CONFIG).exists() and any(p for kind in WEIGHTS_OF_MODELS for p in folder.glob(kind)):
            raise UserError(
                f"--output {output} is in the model {folder}, whose files travel into what is made of it; give one "
                f"beside: {_beside(folder)}"
            )


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + "-results")


def refuse_in_text(output: Path, text: str | Path | None, option: str = "--haystack") -> None:
    """Raises UserError if `output` is in the folder of text that an option names, and would become part of it."""
    if text and _is_in_text(_place(output), Path(text)):
        raise UserError(f"--output {output} is inside {option} {text}, whose text it would become; give another")


def _is_in_text(place: Path, text: Path) -> bool:
    """Whether a place is in a folder of text, all files of which are read."""
    return text.is_dir() and place.is_relative_to(text.resolve())


def refuse_among_inputs(
    output: Path, work: Path, base: Path | None, texts: Iterable[Path], search: Path | None = None
) -> None:
    """Raises UserError if the checkpoint `output`, the folder for finished work or that of a `search` would lie in a
    folder of text, which the next run would read it as; in another checkpoint, which would no longer be whole; or one
    of the last two in the base."""
    own = _place(output)
    made = [("--output", output, own), ("--work", work, _place(work))]
    if search is not None:
        made.append((f"--output {output}, whose search's folder", search, _place(search)))
    for text in texts:
        for option, path, place in made:
            if _is_in_text(place, text):
                raise UserError(
                    f"{option} {path} is in {text}, all files of which are read as text, so the next run would read "
                    "this one's as well; give one outside"
                )
    read_only = base.resolve() if base and base.is_dir() else None
    for option, path, root in made[1:]:
        if read_only and root.is_relative_to(read_only) and (root == read_only or not own.is_relative_to(read_only)):
            raise UserError(f"{option} {path} is in the base {base}, which is only read; give another")
    for option, path, _ in made:
        refuse_in_checkpoint(path, option, replaced=own)


def refuse(output: Path, force: bool | None = None, inputs: Iterable[Path] = ()) -> None:
    """Raises UserError, saying what is in the way, unless `output` is free to be made: there is nothing, or an empty
    folder, or with `force` a checkpoint made here that holds nothing else, and in which nothing was made since.

    Args:
        force: None where there is no such option.
        inputs: files and folders that are read, which must not be deleted.
    """
    place = _place(output)
    if not os.path.lexists(place):
        return
    other = "give another --output"
    refuse_to_hold(output, "the working folder", Path.cwd())
    refuse_to_hold(output, "your home", Path.home())
    for path in inputs:
        refuse_to_hold(output, "an input of this run", path)
    if not place.is_dir():
        raise UserError(f"{output} exists and is a file; {other}")
    if os.path.ismount(place):
        raise UserError(f"{output} is a mount point, which can't be replaced; give a folder inside it as --output")
    if not any(place.iterdir()):
        return
    if force is None:
        raise UserError(f"{output} exists; {other}")
    if (listed := _listed(place)) is None:
        raise UserError(f"{output} exists and is no checkpoint made here, so nothing replaces it; {other}")
    if foreign := set(all_files(place)) - listed:
        raise UserError(f"{output} exists and holds files of others: {some(foreign)}; {other}")
    if not force:
        raise UserError(f"{output} exists; {other}, or --force to replace it")
    if since := _made_since(place):
        raise UserError(f"{output}: {' and '.join(since)} changed since the export; move or delete them, or {other}")


def refuse_to_hold(output: Path, what: str, path: Path) -> None:
    """Raises UserError if replacing `output` would delete `path`."""
    if any(real.is_relative_to(_place(output)) for real in _real(path)):
        raise UserError(f"{output} is or holds {what}, {path}; give another --output")


def _place(output: Path) -> Path:
    """Where an output really lies: a link stays, and what it points to is made."""
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output}: not a path that can be used: {error}") from None


def _real(path: Path) -> list[Path]:
    """Where an input really lies, and what the links in it point to."""
    inside = path.iterdir() if path.is_dir() else ()
    return [path.absolute(), path.resolve(), *(p.resolve() for p in inside if p.is_symlink())]


def _listed(folder: Path) -> set[str] | None:
    """The files that a checkpoint made here may hold; None if it is none."""
    try:
        return {*read_json(folder / MANIFEST)["sha256"], *FREE}
    except (UserError, KeyError, TypeError):
        return None


def changed(folder: Path, weights: bool = False) -> list[str]:
    """Files of a checkpoint that are not as its list says, or are gone, or the list if it says nothing; the base's
    weights, which take long to read, are compared if `weights` is set, and by `verify`."""
    listed = read_json(folder / MANIFEST).get("sha256") if (folder / MANIFEST).is_file() else None
    if not isinstance(listed, dict):
        return [MANIFEST]

    def same(path: Path, digest: Any) -> bool:
        unread = path.suffix == ".safetensors" and path.name != PROXIES and not weights
        return path.is_file() and (unread or file_hash(path) == digest)

    return [name for name, digest in listed.items() if not same(folder / name, digest)]


def _made_since(folder: Path) -> list[str]:
    """What is in a checkpoint made here since its export: files that were edited, such as a schedule tuned by hand, a
    card that was added to, other weights, and an evaluation."""
    stated = read_json(folder / MANIFEST).get("told", {})
    edited = [name for name in changed(folder, weights=True) if (folder / name).is_file()]
    edited += [n for n in TOLD if (folder / n).is_file() and file_hash(folder / n) != stated.get(n)]
    return edited + [CERTIFICATE] * (folder / CERTIFICATE).is_file()


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint made here has all files on its list."""
    listed = _listed(folder)
    return listed is not None and set(all_files(folder)) >= listed - set(FREE)


@contextmanager
def new_folder(output: Path, force: bool | None = None, inputs: Iterable[Path] = (), hint: str = "") -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the name `output` in the end, if nothing that `refuse` protects is
    there. Until then one run alone may make `output`, and an old checkpoint keeps its name.

    All is done in a hidden folder beside `output`. What a kill leaves there is deleted, or put back, by the next run.

    Args:
        force, inputs: see `refuse`.
        hint: what to say of finished work, if something came to be at `output` meanwhile.

    Raises:
        UserError: at once or in the end, see `refuse`; or if another run is making `output`, or the disk is full.
    """
    inputs = list(inputs)
    refuse(output, force, inputs)
    place = _place(output)
    hidden = place.with_name(f".{place.name}.spts-compress")
    new, old = hidden / "new", hidden / "old"  # being written; renamed away while the new one gets its name

    def tidy() -> None:
        shutil.rmtree(new, ignore_errors=True)
        if not old.exists():
            return
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            old.rename(place)
        elif _is_whole(place):  # killed, or failed, when all but the deletion was done
            shutil.rmtree(old, ignore_errors=True)
        else:
            raise UserError(
                f"{place}: something was put there while it was being replaced; the old checkpoint is {old}, so move "
                "one of the two elsewhere"
            )

    with claimed(hidden, (new.name, old.name), f"{output} as its output"):
        tidy()
        try:
            refuse(output, force, inputs)
            new.mkdir()
            with full_disk_named(place):
                yield new
            try:
                refuse(output, force, inputs)
                if place.exists() and any(place.iterdir()):
                    place.rename(old)
                new.rename(place)  # takes the place of nothing but an empty folder
                shutil.rmtree(old, ignore_errors=True)
            except UserError as error:
                raise UserError(f"{error}{hint}") from None
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise UserError(f"{place}: something was put there during the run; give another --output") from None
                raise
        finally:
            tidy()
