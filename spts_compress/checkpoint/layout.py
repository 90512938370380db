"""Every file name of a checkpoint: which of the base's files travel, what the export calls them, and what it adds."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from .. import modeling
from ..utils.errors import UserError

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROXIES = "spts-proxies.safetensors"
CODE = tuple(sorted(path.name for path in Path(modeling.__file__).parent.glob("*.py")))
MANIFEST = "spts_files.json"
CARD, RECIPE, RESOLVED_RECIPE, REPORT = "README.md", "recipe.yaml", "recipe.resolved.yaml", "spts_report.json"
CERTIFICATE, SEARCH_PLOT = "spts_evaluation.json", "search.png"
TOLD = (CARD, RECIPE, RESOLVED_RECIPE, REPORT, SEARCH_PLOT)  # of the export, in which it decides nothing
FREE = (*TOLD, CERTIFICATE, MANIFEST)
# Names that the export needs for itself: a base's file of such a name travels under another one. A plain
# model.safetensors is among them, since it would hide the index.
OWN = (CONFIG, WEIGHTS, INDEX, PROXIES, *CODE, *FREE)
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
# What is about a model, under any ending.
ABOUT = ("README*", "LICENSE*", "NOTICE*", "USE_POLICY*", "base_README*", "*.ipynb")
# Of its subfolders only these do: others hold other models, data or notes.
SUBFOLDERS = ("additional_chat_templates/*.jinja", "custom_generate/**/*", "LICENSE*/**/*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def may_be_read(name: str) -> bool:
    """Whether a loader might read a file of this relative name in a checkpoint's folder."""
    top, below, _ = name.partition("/")
    in_place = not below or top in {pattern.split("/")[0] for pattern in SUBFOLDERS}
    return in_place and not matches(name, (*NOTES, *ABOUT))


def inside(name: str) -> bool:
    """Whether a relative name with forward slashes stays in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a checkpoint is.

    Raises:
        UserError: if it is none, or can't be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; give the folder of a checkpoint") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: can't be read: not a JSON object")
    return data


def all_files(folder: Path) -> list[str]:
    """Names of all files in a folder and below it. A link counts as a file, whatever it leads to, and so does a folder
    that can't be read."""
    names: list[str] = []
    unread = lambda error: names.append(os.path.relpath(error.filename, folder))  # noqa: E731
    for place, folders, files in os.walk(folder, onerror=unread):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def model_files(folder: Path) -> list[str]:
    """Names of the files of a folder that may be a model's, in those of its subfolders that may be."""
    paths = [*folder.iterdir(), *(path for pattern in SUBFOLDERS for path in folder.glob(pattern))]
    return sorted({path.relative_to(folder).as_posix() for path in paths if not path.is_dir()})


def first_weights(folder: Path, explicit: str | None = None) -> str:
    """The file that transformers begins to load with: weights, or an index, which a file of the plain name hides.

    Args:
        explicit: the config's `transformers_weights`, a file or an index of another name.
    """
    return explicit or (INDEX if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS)


def weight_files(folder: Path, explicit: str | None = None) -> list[str]:
    """Names of the files that transformers reads a checkpoint's weights from, see `first_weights`.

    Raises:
        UserError: if an index can't be read or names files outside the folder.
    """
    first = first_weights(folder, explicit)
    if not first.endswith(".index.json"):
        return [first]
    names = sorted(set(weight_map(folder, first).values()))
    for name in names:
        if not inside(name):
            raise UserError(f"{folder}: {first}: {name} points outside the folder")
    return names


def weight_map(folder: Path, index: str) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        UserError: if it can't be read.
    """
    try:
        files = read_json(folder / index)["weight_map"]
    except (UserError, KeyError):
        files = None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{folder}: {index}: not a JSON object with a weight_map from tensors to files")
    return files


def travelling(folder: Path, needed: Iterable[str] = ()) -> list[str]:
    """Names, relative to the base's folder, of all its files that travel into an export.

    Args:
        needed: files that travel whatever the rules say: the weights, and what the tokenizer's class reads.

    Raises:
        UserError: naming a file that can't be copied, such as a link to nothing.
    """
    left = (*LEFT, "*.safetensors", "*/__pycache__/*")
    names = {name for name in model_files(folder) if not matches(name, left)} | set(needed)
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
