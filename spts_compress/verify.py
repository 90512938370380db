"""A checkpoint's list of hashes, and the check of a checkpoint against it, its index, its schedule and this release."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from . import __version__, loadable
from .base import FAMILIES
from .errors import UserError, reason
from .export import model_class
from .modeling.configuration_spts import Schedule
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
        return faults
    return faults + _code(folder, family) + _loads(folder, family, config)


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
    own = Path(str(resources.files(f"{__package__}.modeling")))
    return [
        f"{name}: not the code of spts-compress {__version__}"
        for name in ("configuration_spts.py", "spts.py", f"{FAMILIES[family][0]}.py")
        if not (folder / name).is_file() or file_hash(folder / name) != file_hash(own / name)
    ]


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
        Schedule.from_dict(config["spts"], read.num_hidden_layers, read.num_attention_heads)
    except (ValueError, KeyError) as error:
        return [f"config.json: {fault}" for fault in error.args]
    return []
