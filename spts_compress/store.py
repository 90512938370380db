"""The one store of finished work: whatever a run has finished is on disk at once, under what it depends on."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UserError


def fingerprint(*parts: Any) -> str:
    """Short hash of plain data; equal data, equal hash."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to; on success it takes the target's name in one step.

    Raises:
        UserError: if the disk is full. Nothing half-written is left under either name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"{target.parent}: no space left on the disk while writing {target.name}") from None
        raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what `writing` left half-done for `name` in `folder`, by processes that are gone."""
    for leftover in folder.glob(f".{name}.*.partial"):
        try:
            os.kill(int(leftover.name.split(".")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except PermissionError:  # somebody else's, and alive
            continue


class Store:
    """Finished units in one folder. A unit is named, and found again only under the same fingerprint."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one run.

        Raises:
            UserError: if another run holds it.
        """
        with (self.root / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.root}: another run is using this work folder; wait for it to end") from None
            sweep(self.root)
            yield

    def path(self, name: str, key: str, suffix: str = "") -> Path:
        return self.root / f"{name}-{key}{suffix}"

    def json(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """The unit's plain data; `make()` and kept if it is not there yet."""
        path = self.path(name, key, ".json")
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError:
                path.unlink()
        return self.put_json(name, key, make())

    def put_json(self, name: str, key: str, data: Any) -> Any:
        with writing(self.path(name, key, ".json")) as partial:
            partial.write_text(json.dumps(data))
        return data

    def tensors(self, name: str, key: str) -> dict[str, torch.Tensor] | None:
        """The unit's tensors; None if it is not there yet or can't be read."""
        path = self.path(name, key, ".safetensors")
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink()
            return None

    def put_tensors(self, name: str, key: str, tensors: dict[str, torch.Tensor]) -> None:
        with writing(self.path(name, key, ".safetensors")) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial)

    def drop(self, name: str, key: str) -> None:
        self.path(name, key, ".safetensors").unlink(missing_ok=True)
