"""What an answer depends on beside its prompt: a model's folder, and the program that runs it."""

import hashlib
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..utils.errors import UserError
from ..utils.store import file_hash, fingerprint
from .layout import (
    ABOUT,
    CERTIFICATE,
    CONFIG,
    INDEX,
    LEFT,
    MANIFEST,
    NOTES,
    PROXIES,
    inside,
    matches,
    model_files,
    read_json,
)  # fmt: skip

VOCABULARIES = ("*.bin", "*.jsonl", "*.csv")  # seldom, but a tokenizer's class may name them
# About the model, or another form of its weights; any other file of a folder may decide what is answered, since
# vocabularies and code have names of any kind.
BESIDE_THE_POINT = (*ABOUT, "*.safetensors", "pytorch_model*", *({*NOTES, *LEFT} - {*VOCABULARIES}))


def folder_key(folder: Path, weights: dict[str, str] | None = None, dense: bool = False) -> str:
    """Fingerprint of all that decides what the model in `folder` answers: weights, configuration, generation settings,
    tokenizer, chat templates and code, by their bytes.

    Args:
        weights: names and SHA-256 of the weight files that count; none: every safetensors file.
        dense: of the model without skipping, so without an `spts` block and proxies.
    """
    if weights is None:
        weights = {p.name: file_hash(p) for p in folder.glob("*.safetensors")}
    if dense:
        weights = {name: digest for name, digest in weights.items() if name != PROXIES}
    others = {
        name: _without_skipping(folder / name) if dense and name in (CONFIG, INDEX) else file_hash(folder / name)
        for name in _others(folder)
    }
    return fingerprint(weights, others)


def stale(folder: Path, weights: dict[str, str] | None = None) -> str | None:
    """A warning if the checkpoint was changed since its certificate was written.

    Args:
        weights: see `folder_key`.

    Raises:
        UserError: if the certificate can't be read.
    """
    path = folder / CERTIFICATE
    if not path.is_file() or read_json(path).get("checkpoint") == folder_key(folder, weights):
        return None
    return f"{folder} was changed since the evaluation in {CERTIFICATE}; its figures are of another checkpoint"


def _others(folder: Path) -> list[str]:
    """Names of the files beside the weights that decide what the model in `folder` answers. In a checkpoint made here
    a note is a person's unless the export listed it, since what its tokenizer reads is listed."""
    listed = None
    with suppress(UserError):  # no checkpoint made here, or no list that can be read
        listed = read_json(folder / MANIFEST).get("sha256")

    def decides(name: str) -> bool:
        is_note = isinstance(listed, dict) and name not in listed and matches(name, NOTES)
        return not is_note and not matches(name, BESIDE_THE_POINT)

    names = {*model_files(folder), *filter(inside, listed if isinstance(listed, dict) else ())}
    return sorted(name for name in names if (folder / name).is_file() and decides(name))


def watch(folder: Path, weights: Iterable[str]) -> Callable[[], None]:
    """A cheap check that the model in `folder` is still the one it is now, of which each use raises UserError if not.

    It goes by the files' times of change. Weights are pages of their files, so what is computed is the model's only if
    this holds afterwards, and what is made is to be kept under the model's key only then.
    """
    weights = list(weights)

    def stamps() -> dict[str, tuple[int, int]]:
        stats = {name: (folder / name).stat() for name in {*weights, *_others(folder)} if (folder / name).exists()}
        return {name: (stat.st_size, stat.st_ctime_ns) for name, stat in stats.items()}

    before = stamps()

    def check() -> None:
        if stamps() != before:
            raise UserError(f"{folder} was changed during the run, so nothing more of it is kept: start it again")

    return check


def _without_skipping(path: Path) -> dict[str, Any]:
    """What a config or an index says of the model that does not skip."""
    data = read_json(path)
    if path.name == INDEX:
        return {name: file for name, file in data["weight_map"].items() if file != PROXIES}
    return {name: value for name, value in data.items() if name != "spts"}


@cache
def environment() -> str:
    """The versions that decide what is computed, and this package's own code, by its bytes."""
    package = Path(__file__).parent.parent
    sources = [(p.relative_to(package).as_posix(), file_hash(p)) for p in sorted(package.rglob("*.py"))]
    packages = ("transformers", "tokenizers", "safetensors", "numpy", "scipy")
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{name} {version(name)}" for name in packages]
    return ", ".join([*versions, f"spts-compress {__version__} ({fingerprint(sources)})"])


def tensors_key(tensors: dict[str, torch.Tensor]) -> str:
    """Fingerprint of tensors by their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
