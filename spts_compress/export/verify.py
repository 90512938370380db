"""A checkpoint's list of hashes, and the check of a checkpoint against it, its index, its schedule and this release."""

import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import layout, loadable
from ..checkpoint.families import code_files, exported_config, model_class, read_config
from ..checkpoint.keys import stale
from ..checkpoint.layout import CERTIFICATE, CONFIG, FREE, MANIFEST, NOTES, TOLD, all_files, inside, matches, read_json
from ..utils.errors import UserError
from ..utils.store import file_hash, writing


def write_manifest(folder: Path, names: dict[str, str]) -> None:
    """List the SHA-256 of every file in `folder` that decides what is loaded, and apart of those that tell of it, and
    what the base called its own.

    Args:
        names: the base's name of a file -> the export's, relative to their folders.
    """
    files = {name: file_hash(folder / name) for name in all_files(folder) if name not in FREE}
    data: dict[str, Any] = {"spts_compress": __version__, "sha256": files}
    told = {name: file_hash(folder / name) for name in TOLD if (folder / name).is_file()}
    data |= {"base": {new: name for name, new in names.items()}, "told": told}
    with writing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n")


def base_names(folder: Path) -> dict[str, str]:
    """The files of an exported checkpoint that are its base's: their names -> those that the base had them under."""
    names = read_json(folder / MANIFEST).get("base")
    return names if isinstance(names, dict) else {}


def require(folder: Path) -> None:
    """Raises UserError, a line for each fault, if `folder` is no whole checkpoint of this toolkit."""
    if faults := verify(folder):
        raise UserError("\n".join(f"{folder}: {fault}" for fault in faults))


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with an exported checkpoint, a line each; empty if all is well.

    Raises:
        UserError: if the folder is no checkpoint of this toolkit.
    """
    listed, written = read_json(folder / MANIFEST).get("sha256"), read_json(folder / CONFIG)
    if not isinstance(listed, dict) or not isinstance(written.get("spts"), dict):
        raise UserError(
            f"{folder}: not a checkpoint of spts-compress: it needs {MANIFEST} and a config with an spts block"
        )
    found = {name: file_hash(folder / name) for name in listed if inside(name) and (folder / name).is_file()}
    faults = _file_faults(folder, listed, found) + _name_faults(listed, base_names(folder))
    if stale(folder, {name: digest for name, digest in found.items() if name.endswith(".safetensors")}):
        faults.append(f"{CERTIFICATE}: of another checkpoint; remove it, or run evaluate --certify")
    try:
        config = read_config(folder)
    except UserError as error:
        return faults + [line.removeprefix(f"{folder}/") for line in str(error).splitlines()]
    family = config.model_type.removeprefix("spts_")
    return faults + _code_faults(folder, family, written) + loadable.faults(folder, model_class(family), config)


def _file_faults(folder: Path, listed: dict[str, Any], found: dict[str, str]) -> list[str]:
    """The folder's files, and those hashes of them that were `found`, against its list."""
    faults = []
    for name, digest in listed.items():
        if not inside(name):
            faults.append(f"{MANIFEST}: {name} points outside the folder")
        elif name not in found:
            faults.append(f"{name}: missing")
        elif found[name] != digest:
            faults.append(f"{name}: changed since it was exported")
    strangers = [name for name in all_files(folder) if name not in listed and not matches(name, NOTES)]
    return faults + [f"{name}: not among the exported files; remove it if it is yours" for name in strangers]


def _name_faults(listed: dict[str, Any], names: dict[str, str]) -> list[str]:
    """The list of the base's files against that of all files."""
    lacking = [name for name in listed if name.endswith(".safetensors") and name not in {*layout.OWN, *names}]
    faults = [f"{MANIFEST}: does not say what the base calls {name}" for name in lacking]
    for exported, name in names.items():
        if exported not in listed:
            faults.append(f"{MANIFEST}: {exported}, a file of the base, is not among the exported files")
        elif not isinstance(name, str) or not inside(name):
            faults.append(f"{MANIFEST}: {name} points outside the base's folder")
    if CONFIG not in names.values() or len(set(map(str, names.values()))) < len(names):
        faults.append(f"{MANIFEST}: does not say what the base's files are called")
    return faults


def _code_faults(folder: Path, family: str, config: dict[str, Any]) -> list[str]:
    """The modelling code against this release's own, and that the config asks for no other."""
    faults = [
        f"{own.name}: not the code of spts-compress {__version__}"
        for own in code_files(family)
        if not (folder / own.name).is_file() or file_hash(folder / own.name) != file_hash(own)
    ]
    if config.get("auto_map") != exported_config({"model_type": family})["auto_map"]:
        faults.append(f"{CONFIG}: auto_map names other code than that of spts-compress")
    return faults
