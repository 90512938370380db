"""A checkpoint's list of hashes, and the check of a checkpoint against it, its index, its schedule and this release."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import revert_weight_conversion

from . import __version__, schedule
from .base import FAMILIES, INDEX
from .errors import UserError
from .export import model_class
from .modeling import code_files
from .store import file_hash, writing

MANIFEST = "spts_files.json"
FREE = (  # what tells of the checkpoint and decides nothing
    "README.md", "recipe.yaml", "recipe.resolved.yaml", "spts_report.json", "spts_evaluation.json", "search.png",
    MANIFEST,
)  # fmt: skip
DECIDES = (".py", ".safetensors", ".json", ".bin", ".jinja")  # an unlisted file of these could change what is loaded


def write_manifest(folder: Path) -> None:
    """List the SHA-256 of every file in `folder` that decides what is loaded."""
    files = {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in FREE}
    with writing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({"spts_compress": __version__, "sha256": files}, indent=1) + "\n")


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with an exported checkpoint, a line each; empty if all is well.

    Raises:
        UserError: if the folder is no checkpoint of this toolkit.
    """
    listed = _json(folder / MANIFEST).get("sha256")
    config = _json(folder / "config.json")
    if not isinstance(listed, dict) or not isinstance(config.get("spts"), dict):
        raise UserError(
            f"{folder}: not a checkpoint of spts-compress: it needs {MANIFEST} and a config with an spts block"
        )
    faults = []
    for name, digest in listed.items():
        if Path(name).name != name:
            faults.append(f"{MANIFEST}: {name} points outside the folder")
        elif not (folder / name).is_file():
            faults.append(f"{name}: missing")
        elif file_hash(folder / name) != digest:
            faults.append(f"{name}: changed since it was exported")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.suffix in DECIDES and name not in listed and name not in FREE:
            faults.append(f"{name}: not among the exported files")
    family = str(config.get("model_type", "")).removeprefix("spts_")
    if family not in FAMILIES:
        faults.append(f"config.json: model_type {config.get('model_type')} is of no family that this release knows")
        return faults + _schedule(config)
    return faults + _code(folder, family) + (_schedule(config) or _tensors(folder, family, config))


def require(folder: Path) -> None:
    """Raises UserError, a line for each fault, if `folder` is no whole checkpoint of this toolkit."""
    if faults := verify(folder):
        raise UserError("\n".join(f"{folder}: {fault}" for fault in faults))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or not JSON; give the folder of an exported checkpoint") from None
    return found if isinstance(found, dict) else {}


def _code(folder: Path, family: str) -> list[str]:
    """The modelling code against this release's own."""
    return [
        f"{own.name}: not the code of spts-compress {__version__}"
        for own in code_files(FAMILIES[family][0])
        if not (folder / own.name).is_file() or file_hash(folder / own.name) != file_hash(own)
    ]


def _schedule(config: dict[str, Any]) -> list[str]:
    try:
        schedule.read(config["spts"], config["num_hidden_layers"], config["num_attention_heads"])
    except (ValueError, KeyError) as error:
        return [f"config.json: {fault}" for fault in error.args]
    return []


def _tensors(folder: Path, family: str, config: dict[str, Any]) -> list[str]:
    """The index and shapes of all tensors against the model that the config describes."""
    cls = model_class(family)
    with torch.device("meta"):
        model = cls(cls.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    index, state = _json(folder / INDEX).get("weight_map", {}), model.state_dict()
    alone = revert_weight_conversion(model, state)  # every expert alone, as most checkpoints have them
    state = alone if (alone.keys() - state.keys()) & index.keys() else state
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ("$^",)))
    faults, there = [], {}
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            faults.append(f"{INDEX}: {file} points outside the folder")
            continue
        try:
            with safe_open(folder / file, "pt") as opened:
                for name in list(opened.keys()):
                    there[name] = file, opened.get_slice(name).get_shape()
        except (OSError, SafetensorError) as error:
            faults.append(f"{file}: can't be read: {error}")
    for name, (file, shape) in there.items():
        if index.get(name) != file:
            faults.append(f"{INDEX}: {name} lies in {file}, which the index does not say")
        elif name not in expected and ignored.search(name):
            continue  # loading passes over it, too
        elif name not in expected:
            faults.append(f"{file}: {name} is no tensor of this model")
        elif shape != expected[name]:
            faults.append(f"{file}: {name} has the shape {shape}, the config asks for {expected[name]}")
    faults += [f"{INDEX}: {name} is missing" for name in expected if name not in there and name not in tied]
    return faults
