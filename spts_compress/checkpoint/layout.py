"""Every file name of a checkpoint: which of the base's files travel, what the export calls them, and what it adds."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path, PurePosixPath

from ..utils.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROXIES = "spts-proxies.safetensors"
MANIFEST = "spts_files.json"
REPORT = "spts_report.json"  # what was measured
CODE = tuple(
    sorted(path.name for path in resources.files("spts_compress.modeling").iterdir() if path.name.endswith(".py"))
)
FREE = (  # what tells of a checkpoint and decides nothing
    "README.md", "recipe.yaml", "recipe.resolved.yaml", REPORT, "spts_evaluation.json", "search.png",
    MANIFEST,
)  # fmt: skip
# Names that the export needs for itself: a base's file of such a name travels under another one. A plain
# model.safetensors is among them, since it would hide the index.
OWN = ("config.json", WEIGHTS, INDEX, PROXIES, *CODE, *FREE)
# Where `*` also matches a slash, as in the Hub's client. What no loader reads:
BESIDE = (
    ".*", "*/.*", "*.pyc", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4", "*.mp3", "*.wav",
    "*.jsonl", "*.csv", "*.parquet", "*.arrow", "*.log", "*.lock", "*.zip", "*.tar*", "events.out.tfevents*",
)  # fmt: skip
# ... what a command of this toolkit or a person may put into an exported checkpoint's folder,
NOTES = (*BESIDE, *FREE, "*.md", "setting.json", "evaluation.json", "ablation.json", "bench.json")
# ... and what a base may hold that isn't needed: weights in other formats, a training's state. All else in the base's
# folder travels, since any name can be a vocabulary's, and is downloaded from the Hub.
LEFT = (
    *BESIDE, "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack*", "*.ot", "*.gguf", "*.onnx*",
    "*.npz", "*.tflite", "*.mlmodel", "*.nemo", "*.engine", "consolidated*", "adapter_model*",
    "optimizer*", "scheduler*", "trainer_state.json", "training_args*", "rng_state*",
)  # fmt: skip
# Of its subfolders only these do: others hold other models, data or notes.
SUBFOLDERS = ("additional_chat_templates/*.jinja", "custom_generate/**/*", "LICENSE*/**/*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def inside(name: str) -> bool:
    """Whether a relative name with forward slashes stays in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def weight_files(folder: Path, explicit: str | None = None) -> list[str]:
    """Names of the files that transformers reads a checkpoint's weights from, in its own order of preference: one that
    has the plain name hides an index.

    Args:
        explicit: the config's `transformers_weights`, a file or an index of another name.

    Raises:
        UserError: if an index can't be read or names files outside the folder.
    """
    named = named_weights(folder, explicit)
    if not named.endswith(".index.json"):
        return [named]
    names = sorted(set(weight_map(folder, named).values()))
    for name in names:
        if not inside(name):
            raise UserError(f"{folder}: {named}: {name} points outside the folder")
    return names


def named_weights(folder: Path, explicit: str | None) -> str:
    """The file that loading begins with: of weights, or an index."""
    return explicit or (INDEX if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS)


def weight_map(folder: Path, index: str) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        UserError: if it can't be read.
    """
    try:
        found = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{folder}: {index}: not a JSON object with a weight_map from tensors to files")
    return found


def travelling(folder: Path, needed: Iterable[str] = ()) -> list[str]:
    """Names, relative to the base's folder, of all its files that travel into an export.

    Args:
        needed: files that travel whatever the rules say: the weights, and what the tokenizer's class reads.

    Raises:
        UserError: naming a file that can't be copied, such as a link to nothing.
    """
    found = [*folder.iterdir(), *(path for pattern in SUBFOLDERS for path in folder.glob(pattern))]
    names = {path.relative_to(folder).as_posix() for path in found if not path.is_dir()}
    names = {name for name in names if not matches(name, (*LEFT, "*.safetensors", "*/__pycache__/*"))} | set(needed)
    for name in sorted(names):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there; mend or remove it")
        if not path.is_file() or not os.access(path, os.R_OK):
            raise UserError(f"{path}: not a readable file, so it can't travel with the checkpoint; mend or remove it")
    return sorted(names)


def exported(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """The base's name -> its name in the export, equal but for what would stand in the way.

    Args:
        taken: patterns of further names that the base's files can't have.
    """
    own = (*OWN, *taken)
    given: dict[str, str] = {}
    plain = {name: name.replace("/", "_") if name.endswith(".safetensors") else name for name in names}
    for name in sorted(plain, key=lambda name: (plain[name] != name or matches(name, own), name)):
        new = plain[name]
        while matches(new, own) or new in given.values():
            new = f"base_{new}"
        given[name] = new
    return given
