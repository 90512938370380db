"""Looking at an exported checkpoint."""

from pathlib import Path
from typing import Any

from ..checkpoint.families import FAMILIES, model_class
from ..checkpoint.layout import CONFIG, REPORT, read_json
from ..checkpoint.outputs import changed
from ..plan import describe
from ..search.tables import as_text
from ..utils.errors import UserError, reason, some
from ..utils.tables import size
from .columns import distillation, fit_table, queries, score_tables, speed_table


def read_config(folder: Path) -> Any:
    """The checkpoint's configuration.

    Raises:
        UserError: if the folder holds no checkpoint of this toolkit, or one of a family that this release doesn't know.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no readable {CONFIG}; give the folder of an exported checkpoint")
    data = read_json(path)
    if not isinstance(data.get("spts"), dict):
        raise UserError(f"{path}: no spts block, so this is not a checkpoint made by spts-compress")
    family = str(data.get("model_type", "")).removeprefix("spts_")
    if family not in FAMILIES:
        raise UserError(f"{path}: family {family} is unknown to this release; it knows {', '.join(FAMILIES)}")
    try:
        return model_class(family).config_class.from_dict(data)
    except Exception as error:  # each family has checks of its own
        raise UserError(f"{path}: not a usable configuration: {reason(error)}") from None


def inspect(folder: Path) -> str:
    """Schedule, sizes, predicted speed-up, proxy fidelity and measurements as text."""
    config = read_config(folder)
    try:
        schedule = config.schedule()
    except ValueError as error:
        raise UserError("\n".join(f"{folder / CONFIG}: {fault}" for fault in error.args)) from None
    files = "\n".join(f"{size(p.stat().st_size):>12}  {p.name}" for p in sorted(folder.iterdir()) if p.is_file())
    path = folder / REPORT
    report = read_json(path) if path.is_file() else None
    measured, lengths = list[str](), [2048, 8192, 32768]
    try:
        if report:
            measured = [f"Measured in {report['dtype']}, with the weights that `verify` knows:"]
            measured += [fit_table(report["proxies"]), queries(report), distillation(report)]
            measured += [speed_table(report), score_tables(report)]
            measured += [as_text(report["search"])] if report.get("search") else []
            lengths = [row["length"] for row in report["speed"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a report that this release reads; use the one that wrote it, or move it away: {reason(error)}"
        ) from None
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    parts = [describe(folder.name, config, schedule, lengths, dtype, 0, None, "cpu"), files]
    if report and (names := changed(folder)):
        parts.append(
            f"Warning: {some(names)} changed or gone since the export; what was measured then is of what it said then:"
        )
    return "\n\n".join(part for part in (*parts, *measured) if part)
