"""The folders that a run makes: what may stand in their place, and how a finished one gets its name."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..utils.errors import UserError
from ..utils.store import claimed, full_disk_named
from .layout import FREE, MANIFEST

NEW, OLD, GONE = "new", "old", "gone"  # being written; renamed away while the new one gets its name; to be deleted


def refuse_inside(output: Path, checkpoint: Path) -> None:
    """Raises UserError if `output` is the checkpoint's own folder or lies in it, since it would no longer be whole."""
    if (checkpoint / "config.json").exists() and _place(output).is_relative_to(checkpoint.resolve()):
        beside = checkpoint.resolve().with_name(checkpoint.resolve().name + "-results")
        raise UserError(f"--output {output} is inside the checkpoint, which it would change; give one beside: {beside}")


def refuse(output: Path, force: bool | None = None, inputs: Iterable[Path] = ()) -> None:
    """Raises UserError, saying what is in the way, unless `output` is free to be made: there is nothing, or an empty
    folder, or with `force` a checkpoint made here that holds nothing else.

    Args:
        force: None where there is no such option.
        inputs: files and folders that are read, which must not be deleted.
    """
    place = _place(output)
    if not os.path.lexists(place):
        return
    other = "give another --output"
    for what, path in [
        ("the working folder", Path.cwd()),
        ("your home", Path.home()),
        *(("an input of this run", path) for path in inputs),
    ]:
        if any(real.is_relative_to(place) for real in _real(path)):
            raise UserError(f"{output} is or holds {what}, {path}; {other}")
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
    if foreign := sorted(_names(place) - listed):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UserError(f"{output} exists and holds files of others: {', '.join(foreign[:3])}{more}; {other}")
    if not force:
        raise UserError(f"{output} exists; {other}, or --force to replace it")


def _place(output: Path) -> Path:
    """Where an output really lies: a link stays, and what it points to is made."""
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output}: not a path that can be used: {error}") from None


def _real(path: Path) -> list[Path]:
    """Where an input really lies, and what the links in it point to."""
    return [path.absolute(), path.resolve(), *(p.resolve() for p in (path.iterdir() if path.is_dir() else ()))]


def _listed(folder: Path) -> set[str] | None:
    """The files that a checkpoint made here may hold; None if it is none."""
    try:
        return {*json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"], *FREE}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _names(folder: Path) -> set[str]:
    """Files and links in a folder and all below it; of folders that can't be read, their own names."""
    found = set[str]()

    def unread(error: OSError) -> None:
        found.add(os.path.relpath(error.filename, folder))

    for place, folders, files in os.walk(folder, onerror=unread):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found |= {(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


@contextmanager
def new_folder(output: Path, force: bool | None = None, inputs: Iterable[Path] = (), kept: str = "") -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the name `output` in the end, if nothing that `refuse` protects is
    there. Until then one run alone may make `output`, and an old checkpoint keeps its name.

    All is done in a hidden folder beside `output`. What a kill leaves there is deleted, or put back, by the next run.

    Args:
        force, inputs: see `refuse`.
        kept: what to say of finished work, if something came to be at `output` meanwhile.

    Raises:
        UserError: at once or in the end, see `refuse`; or if another run is making `output`, or the disk is full.
    """
    inputs = list(inputs)
    refuse(output, force, inputs)
    place = _place(output)
    hidden = place.with_name(f".{place.name}.spts-compress")
    new, old, gone = hidden / NEW, hidden / OLD, hidden / GONE
    try:
        with claimed(hidden, (NEW, OLD, GONE), f"{output} as its output"):
            _tidy(place, new, old, gone)
            refuse(output, force, inputs)
            try:
                new.mkdir()
                with full_disk_named(place):
                    yield new
                try:
                    refuse(output, force, inputs)
                    _give_name(new, place, old)
                except UserError as error:
                    raise UserError(f"{error}{kept}") from None
            finally:
                _tidy(place, new, old, gone)
    finally:
        with suppress(OSError):  # another run's by now
            hidden.rmdir()


def _tidy(place: Path, new: Path, old: Path, gone: Path) -> None:
    """Put an old checkpoint back that has lost its name, and delete the rest; all has another name before it is half
    deleted."""
    if old.exists() and not place.exists():
        old.rename(place)
    for folder in (gone, old, new):
        if folder.exists():
            if folder != gone:
                folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _give_name(new: Path, place: Path, old: Path) -> None:
    """Rename `new` to `place`, whose checkpoint is renamed to `old` just before."""
    if place.exists() and any(place.iterdir()):
        place.rename(old)
    try:
        new.rename(place)  # takes the place of nothing but an empty folder
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{place}: something was put there during the run; give another --output") from None
        raise
