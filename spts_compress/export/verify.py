"""A checkpoint's list of hashes, and the check of a checkpoint against it, its index, its schedule and this release."""

import json
from pathlib import Path
from typing import Any

from .. import __version__, schedule
from ..calibrate.base_model import FAMILIES
from ..checkpoint import loadable
from ..checkpoint.layout import FREE, MANIFEST, NOTES, inside, matches
from ..modeling import code_files
from ..utils.errors import UserError, reason
from ..utils.store import file_hash, writing
from .write import auto_map, model_class


def write_manifest(folder: Path, names: dict[str, str]) -> None:
    """List the SHA-256 of every file in `folder` that decides what is loaded, and what the base called its own.

    Args:
        names: the base's name of a file -> the export's, relative to their folders.
    """
    files = {name: file_hash(folder / name) for name in _files(folder) if name not in FREE}
    data = {"spts_compress": __version__, "sha256": files, "base": {new: name for name, new in names.items()}}
    with writing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def base_names(folder: Path) -> dict[str, str]:
    """The files of an exported checkpoint that are its base's: their names -> those that the base had them under."""
    found = _json(folder / MANIFEST).get("base")
    return found if isinstance(found, dict) else {}


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
    faults = _listed(folder, listed)
    family = str(config.get("model_type", "")).removeprefix("spts_")
    if family not in FAMILIES:
        faults.append(f"config.json: model_type {config.get('model_type')} is of no family that this release knows")
        return faults
    return faults + _code(folder, family, config) + _loads(folder, family, config)


def _files(folder: Path) -> list[str]:
    """Names of all files, relative to the folder; a link counts as a file, whatever it leads to."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _listed(folder: Path, listed: dict[str, Any]) -> list[str]:
    """The folder's files against its list, and that list against itself."""
    faults = []
    for name, digest in listed.items():
        if not inside(name):
            faults.append(f"{MANIFEST}: {name} points outside the folder")
        elif not (folder / name).is_file():
            faults.append(f"{name}: missing")
        elif file_hash(folder / name) != digest:
            faults.append(f"{name}: changed since it was exported")
    for name in _files(folder):
        if name not in listed and not matches(name, NOTES):
            faults.append(f"{name}: not among the exported files; remove it if it is yours")
    names = base_names(folder)
    for exported, name in names.items():
        if exported not in listed:
            faults.append(f"{MANIFEST}: {exported}, a file of the base, is not among the exported files")
        elif not isinstance(name, str) or not inside(name):
            faults.append(f"{MANIFEST}: {name} points outside the base's folder")
    if "config.json" not in names.values() or len(set(map(str, names.values()))) < len(names):
        faults.append(f"{MANIFEST}: does not say what the base's files are called")
    return faults


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


def _code(folder: Path, family: str, config: dict[str, Any]) -> list[str]:
    """The modelling code against this release's own, and that the config asks for no other."""
    faults = [
        f"{own.name}: not the code of spts-compress {__version__}"
        for own in code_files(FAMILIES[family][0])
        if not (folder / own.name).is_file() or file_hash(folder / own.name) != file_hash(own)
    ]
    if config.get("auto_map") != auto_map(family):
        faults.append("config.json: auto_map names other code than that of spts-compress")
    return faults


def _loads(folder: Path, family: str, config: dict[str, Any]) -> list[str]:
    """The schedule, and all tensors, against the model that the config describes."""
    cls = model_class(family)
    try:
        read = cls.config_class.from_dict(config)
    except Exception as error:  # whatever the family's own checks raise
        return [f"config.json: not a usable configuration: {reason(error)}"]
    return _schedule(config, read) or loadable.faults(folder, cls, read)


def _schedule(config: dict[str, Any], read: Any) -> list[str]:
    """The schedule against the model; what `config` leaves out has the family's defaults in `read`."""
    try:
        schedule.read(config["spts"], read.num_hidden_layers, read.num_attention_heads)
    except (ValueError, KeyError) as error:
        return [f"config.json: {fault}" for fault in error.args]
    return []
