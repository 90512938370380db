"""Looking at an exported checkpoint."""

from pathlib import Path

from ..checkpoint.families import read_config
from ..checkpoint.layout import REPORT, read_json
from ..checkpoint.outputs import changed
from ..plan import describe
from ..search.tables import as_text
from ..utils.errors import UserError, reason, some
from ..utils.tables import size
from .columns import fitted, score_tables, speed_table


def inspect(folder: Path) -> str:
    """Schedule, sizes, predicted speed-up, proxy fidelity and measurements as text."""
    config = read_config(folder)
    schedule = config.schedule()
    files = "\n".join(f"{size(p.stat().st_size):>12}  {p.name}" for p in sorted(folder.iterdir()) if p.is_file())
    path = folder / REPORT
    report = read_json(path) if path.is_file() else None
    measured, lengths = list[str](), [2048, 8192, 32768]
    try:
        if report:
            measured = [f"Measured in {report['dtype']}, with the weights that `verify` knows:"]
            measured += [*fitted(report), speed_table(report), score_tables(report)]
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
