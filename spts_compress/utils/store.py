"""The one store of finished work: whatever a run has finished is on disk at once, under what it depends on."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UserError, reason


def fingerprint(*parts: Any) -> str:
    """Short hash of plain data; equal data, equal hash."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


HALF_WRITTEN = re.compile(r"\..+-[0-9a-f]{16}(-\d+of\d+)?(\.\w+)?\.\d+\.partial")  # a unit's, by `writing`


@contextmanager
def full_disk_named(target: Path) -> Iterator[None]:
    """Raises UserError if the disk gets full while `target` is written in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"{target.parent}: no space left on the disk while writing {target.name}") from None
        raise


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to; on success it takes the target's name in one step.

    Raises:
        UserError: if the disk is full. Nothing half-written is left under either name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with full_disk_named(target):
            yield partial
            if partial.is_file():
                with partial.open("rb") as stream:
                    os.fsync(stream.fileno())
            os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


CLAIM = ".spts-compress"  # locked by the run that uses a folder; lists what runs have made there under plain names


@contextmanager
def claimed(folder: Path, names: Iterable[str] = (), use: str = "this folder") -> Iterator[None]:
    """Hold `folder` for one run, which may make and replace `names` in it. It is made, and if nothing comes into it,
    it goes again.

    Raises:
        UserError: if another run holds it, it can't be written to, or one of `names` is there and no run made it.
    """
    # a claim that is there already was left by a killed run, which made the folder, too
    to_remove = [path for path in (folder, *folder.parents) if not path.exists() or (path / CLAIM).exists()]
    claim = folder / CLAIM
    try:
        with _locked(claim, use) as stream:
            stream.seek(0)
            listed = stream.read()
            ours = set(listed.splitlines())
            try:
                for name in names:
                    if name not in ours and os.path.lexists(folder / name):
                        raise UserError(f"{folder / name} exists and was not made by this toolkit; give another folder")
                new = [f"{name}\n" for name in names if name not in ours]
                with full_disk_named(claim):  # by the descriptor, as a buffer would be written once more at the close
                    os.write(stream.fileno(), "".join(["\n" * (listed[-1:] not in ("", "\n")), *new]).encode())
                ours |= set(names)
                yield
            finally:  # while it is locked, so that nobody else's is removed
                made = {name for name in ours if os.path.lexists(folder / name)}
                if not made:
                    claim.unlink(missing_ok=True)
                elif made != ours:  # what was not made is free for others, unless there is no room to say so
                    with suppress(OSError, UserError), writing(claim) as partial:
                        partial.write_text("".join(f"{name}\n" for name in sorted(made)))
    finally:
        with suppress(OSError):  # not empty
            for path in to_remove:
                path.rmdir()


def _locked(path: Path, use: str) -> IO[str]:
    """The file, held by this process alone until it is closed."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        except FileNotFoundError:  # the run that had it has just removed it
            continue
        except BlockingIOError:
            raise UserError(f"{path.parent}: another run is using {use}; wait for it to end") from None
        except OSError as error:
            raise UserError(f"{path.parent}: can't be written to: {error.strerror}") from None


def as_tensor(data: Any) -> torch.Tensor:
    """Plain data as a tensor of bytes, to lie in one unit with tensors, so that no kill can part them."""
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def from_tensor(tensor: torch.Tensor) -> Any:
    """What `as_tensor` was given."""
    return json.loads(bytes(tensor.tolist()))


class Store:
    """Finished units in one folder. A unit is named, and found again only under the same fingerprint. `check` raises if
    what was just made must not be kept."""

    def __init__(self, root: Path):
        self.root = root
        self.check: Callable[[], None] = lambda: None
        self.had = set[Path]()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one run; what a killed one left half-written is removed.

        Raises:
            UserError: if another run holds it.
        """
        with claimed(self.root, use="this work folder"):
            for leftover in self.root.iterdir():
                if HALF_WRITTEN.fullmatch(leftover.name):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    def path(self, name: str, key: str, suffix: str = "") -> Path:
        return self.root / f"{name}-{key}{suffix}"

    def json(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """The unit's plain data; `make()` and kept if it is not there yet."""
        path = self.path(name, key, ".json")
        self.had.add(path)
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError:
                path.unlink()
        data = make()
        self.check()
        with writing(path) as partial:
            partial.write_text(json.dumps(data))
        return data

    def tensors(self, name: str, key: str) -> dict[str, torch.Tensor] | None:
        """The unit's tensors; None if it is not there yet or is damaged.

        Raises:
            UserError: if it can't be read for another reason.
        """
        path = self.path(name, key, ".safetensors")
        if not path.exists():
            return None
        try:
            return load_file(path)
        except SafetensorError:  # damaged
            path.unlink()
            return None
        except OSError as error:  # such as too many open files, which tells nothing of this one
            raise UserError(f"{path}: can't be read now: {reason(error)}; it is kept, so run again") from None

    def put_tensors(self, name: str, key: str, tensors: dict[str, torch.Tensor]) -> None:
        self.check()
        with writing(self.path(name, key, ".safetensors")) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial)

    def forget(self, name: str) -> None:
        """Remove the plain data that this run had of units whose names begin so."""
        for path in self.had:
            if path.name.startswith(f"{name}-"):
                path.unlink(missing_ok=True)

    def drop(self, name: str, key: str) -> None:
        self.path(name, key, ".safetensors").unlink(missing_ok=True)
