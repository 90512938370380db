"""Tables that read well in a terminal and as Markdown, pictures in one style, and the files of a result."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from .store import writing

# Okabe and Ito's colours, which colour-blind readers can tell apart; dense and SPTS are the same two everywhere.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666")
COLOURS = {"dense": "#666666", "spts": PALETTE[0]}
STYLE: Any = {
    "legend.frameon": False, "legend.fontsize": 8, "axes.titlesize": 11, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
LABELS = {"dense": "dense", "spts": "SPTS"}
Show = str | Callable[[Any], object]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def columns_table(columns: Mapping[str, Show], rows: Iterable[Any]) -> str:
    """A table of `rows` by the columns' declarations.

    Args:
        columns: for each header how a row is shown: a format string for its values ("{dense[seconds][0]:.2f} s"), or a
            function of the row.
    """
    return table(
        list(columns),
        [[show.format(**row) if isinstance(show, str) else show(row) for show in columns.values()] for row in rows],
    )


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def files(name: str) -> tuple[str, ...]:
    """What `save` makes or removes."""
    return f"{name}.json", f"{name}.md", f"{name}.png"


def keep_earlier(output: Path, names: Iterable[str]) -> None:
    """Move an earlier result's files, those of `names` that are there, under the first number that is free for all."""
    there = [path for path in (output / name for name in names) if path.exists()]
    moved = ([p.with_stem(f"{p.stem}-{n}") for p in there] for n in count(1))
    free = next(paths for paths in moved if not any(path.exists() for path in paths))
    for path, target in zip(there, free, strict=True):
        path.rename(target)


def is_edited(output: Path, name: str, as_text: Callable[[Any], str]) -> bool:
    """Whether `name`.md is there and is not what is made of `name`.json: someone wrote in it, or it is an earlier
    release's."""
    shown = output / f"{name}.md"
    if not shown.is_file():
        return False
    try:
        made = as_text(json.loads((output / f"{name}.json").read_text()))
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        return True
    return shown.read_text(encoding="utf-8") != made + "\n"


def save_data(result: Any, output: Path, name: str) -> None:
    """Write `name`.json; an earlier result's other files go just before, so that a kill never leaves two results'."""
    with writing(output / f"{name}.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
        for other in files(name)[1:]:
            (output / other).unlink(missing_ok=True)


def save(
    result: Any, tables: str, output: Path, name: str, draw: Callable[[Any], None] | None = None, width: float = 9
) -> str:
    """Write `name`.json, `name`.md and, where matplotlib is there, `name`.png into the folder `output`.

    Args:
        draw: draws the picture onto a matplotlib figure `width` inches wide; None for none.

    Returns:
        The `tables`.
    """
    save_data(result, output, name)
    with writing(output / f"{name}.md") as partial:
        partial.write_text(tables + "\n", encoding="utf-8")
    if draw is not None and has_matplotlib():
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(STYLE):
            figure = Figure(figsize=(width, 4), layout="constrained")
            draw(figure)
            with writing(output / f"{name}.png") as partial:
                figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    return tables


def plot_interval(axis: Any, x: Sequence[Any], y: Sequence[Any], ends: Sequence[Sequence[float]], **looks: Any) -> None:
    """Points with intervals.

    Args:
        ends: low and high of each point, of its x where y are names, else of its y.
    """
    along, values = ("xerr", x) if isinstance(y[0], str) else ("yerr", y)
    errors = [[max(0.0, value - low), max(0.0, high - value)] for value, (low, high) in zip(values, ends, strict=True)]
    looks = {"marker": "o", "capsize": 3, "markersize": 5, **looks}
    axis.errorbar(x, y, **{along: list(zip(*errors, strict=True))}, **looks)
