"""Looking at an exported checkpoint."""

import json
from pathlib import Path
from typing import Any

from ..calibrate.base_model import FAMILIES
from ..export.write import model_class
from ..pipeline import REPORT
from ..plan import describe
from ..search.report import as_text
from ..utils.errors import UserError
from ..utils.tables import size
from .report import fidelity_table, quality_table, speed_table


def read_config(folder: Path) -> Any:
    """The checkpoint's configuration.

    Raises:
        UserError: if the folder holds no checkpoint of this toolkit, or one of a family that this release doesn't know.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no readable config.json; give the folder of an exported checkpoint") from None
    if not isinstance(data.get("spts"), dict):
        raise UserError(f"{path}: no spts block, so this is not a checkpoint made by spts-compress")
    family = str(data.get("model_type", "")).removeprefix("spts_")
    if family not in FAMILIES:
        raise UserError(f"{path}: family {family} is unknown to this release; it knows {', '.join(FAMILIES)}")
    return model_class(family).config_class.from_dict(data)


def inspect(folder: Path) -> str:
    """Schedule, sizes, predicted speed-up, proxy fidelity and measurements as text."""
    config = read_config(folder)
    try:
        schedule = config.schedule()
    except ValueError as error:
        raise UserError("\n".join(f"{folder / 'config.json'}: {fault}" for fault in error.args)) from None
    files = "\n".join(f"{size(p.stat().st_size):>12}  {p.name}" for p in sorted(folder.iterdir()) if p.is_file())
    report_file = folder / REPORT
    report = json.loads(report_file.read_text()) if report_file.is_file() else None
    lengths = [row["length"] for row in report["speed"]] if report else [2048, 8192, 32768]
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    parts = [describe(folder.name, config, schedule, lengths, dtype, 0, None, "cpu"), files]
    if report:
        parts += [fidelity_table(report["proxies"]), speed_table(report), quality_table(report)]
        if report.get("search"):
            parts.append(as_text(report["search"]))
    return "\n\n".join(parts)
