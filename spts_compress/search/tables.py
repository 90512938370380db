"""What a search came to, as tables and a picture."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.layout import read_json
from ..modeling.configuration_spts import Schedule
from ..utils import tables
from ..utils.errors import UserError
from ..utils.tables import table

FILES = tables.files("search")
LENGTH = 8192  # tokens of the prompt whose budgets are drawn


def front_table(search: dict[str, Any]) -> str:
    """One row for each cost: what it is, and how close to dense on prompts that its schedule was not chosen on."""
    rows = []
    for number, point in enumerate(search["points"]):
        cost, held_out, winner = point["cost"], point["held_out"], point["winner"]
        probe, ends = dict(winner["schedule"]["probe"]), point["interval"]
        if not isinstance(probe["heads"], str):
            probe["heads"] = f"{sum(map(len, probe['heads'].values()))} of them"
        rows.append(
            [
                f"{cost['speedup']:.2f}x" + (" *" if number == search["chosen"] else ""),
                f"{cost['kv_share']:.0%}",
                winner["params"]["start"],
                " / ".join(f"{probe.get(name, '')}" for name in ("window_size", "heads", "score_carry", "kernel_size")),
                f"{point['quality']:.3f}" + (f" ({ends[0]:.3f}-{ends[1]:.3f})" if ends else ""),
                f"{held_out['loss']:.3f}",
                ", ".join(f"{kind} {means['same']:.0%}" for kind, means in held_out["kinds"].items()),
            ]
        )
    cost = "speed-up, FLOPs" if search.get("latencies") is None else "speed-up, by measured times"
    names = [cost, "KV kept", "start", "window / heads / carry / kernel", "next token as dense (95% interval)"]
    return table([*names, "loss, nats", "all next tokens the same"], rows)


def without_table(point: dict[str, Any]) -> str:
    """What each chosen value brings: the loss at the same cost with the plain value instead."""
    params, own = point["winner"]["params"], point["winner"]["loss"]
    losses = sorted(point["without"].items(), key=lambda pair: -pair[1])
    rows = [[name, params[name], f"{loss:.3f}", f"{loss - own:+.3f}"] for name, loss in losses]
    return table(["value", "chosen", "loss with the plain one", "difference"], rows)


def shown_point(search: dict[str, Any]) -> dict[str, Any]:
    """The chosen point; the last one if none was."""
    return search["points"][-1 if search["chosen"] is None else search["chosen"]]


def as_text(search: dict[str, Any]) -> str:
    """The tables as Markdown."""
    seconds = search["seconds"]
    parts = [f"**Target missed**: {search['missed']}."] if "missed" in search else []
    parts += [
        f"{search['candidates']} candidates, {search['evaluations']} evaluations, {seconds['all'] / 60:.0f} minutes "
        f"in this run, of which {seconds['dense'] / 60:.0f} for dense answers. The loss is the KL to dense along its "
        "own answers, half the mean over the kinds of prompt, half the worst kind's.",
        front_table(search),
        *search.get("notes", []),
    ]
    if search["points"]:
        point = shown_point(search)
        parts += [f"At {point['cost']['speedup']:.2f}x:", without_table(point), *point["diagnosis"]]
    return "\n\n".join(parts)


def save(search: dict[str, Any], folder: Path, num_layers: int) -> None:
    """Write `search.json`, `search.md` and, where matplotlib is there, `search.png` into `folder`. What another search
    found, and tables that someone wrote in, move aside."""
    path, before = folder / FILES[0], None  # of what can't be read, which is another's
    with suppress(UserError):
        before = _found(read_json(path))
    if (path.is_file() and before != _found(search)) or tables.is_edited(folder, "search", as_text):
        tables.keep_earlier(folder, FILES)
    drawing = partial(draw, search, num_layers) if search["points"] else None
    tables.save(search, as_text(search), folder, "search", drawing, 14)


def _found(search: dict[str, Any]) -> Any:
    """What a result says, in plain data, whatever it took to find."""
    return json.loads(json.dumps([search.get("points"), search.get("chosen")]))


def draw(search: dict[str, Any], num_layers: int, figure: Any) -> None:
    """The front if it has more than one point, loss by start layer, active tokens over the layers, what each stage's
    budget is worth, and which layers rank tokens well."""
    panels: list[Any] = [_front, _starts, partial(_active, num_layers), _budgets, _rankings]
    figure.set_figheight(8)
    for number, panel in enumerate(panels if len(search["points"]) > 1 else panels[1:], 1):
        panel(figure.add_subplot(2, 3, number), search)


def _front(axes: Any, search: dict[str, Any]) -> None:
    points = search["points"]
    x, y = [p["cost"]["speedup"] for p in points], [p["quality"] for p in points]
    error = [[abs(p["quality"] - (p["interval"] or [p["quality"]] * 2)[i]) for p in points] for i in (0, 1)]
    axes.errorbar(x, y, yerr=error, fmt="o-", capsize=3)
    if (chosen := search["chosen"]) is not None:
        axes.plot(x[chosen], y[chosen], "r*", markersize=16, label="chosen")
        axes.legend()
    axes.set(title="Front, on held-out prompts", xlabel="speed-up", ylabel="next token as dense")


def _starts(axes: Any, search: dict[str, Any]) -> None:
    for point in search["points"]:
        tried = [(c["params"]["start"], c["loss"]) for c in point["tried"]]
        axes.plot(*zip(*tried, strict=True), "o", alpha=0.4, markersize=4)
    axes.set(title="All candidates", xlabel="start layer", ylabel="loss, nats", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _active(num_layers: int, axes: Any, search: dict[str, Any]) -> None:
    for point in search["points"]:
        schedule = Schedule.from_dict(point["winner"]["schedule"], num_layers)
        shares = [100 * schedule.counts(layer, LENGTH).active / LENGTH for layer in range(num_layers)]
        axes.step(range(num_layers), shares, where="mid", label=f"{point['cost']['speedup']:.2f}x")
    axes.set(title=f"Active tokens of {LENGTH} in the winners", xlabel="layer", ylabel="%")
    axes.legend(fontsize=7)


def _budgets(axes: Any, search: dict[str, Any]) -> None:
    point = shown_point(search)
    for stage in dict.fromkeys(row["stage"] for row in point["budgets"]):
        losses = [(row["factor"], row["loss"]) for row in point["budgets"] if row["stage"] == stage]
        line = sorted([*losses, (1.0, point["winner"]["loss"])])
        axes.plot(*zip(*line, strict=True), "o-", label=f"stage {stage + 1}")
    axes.set(title=f"One stage's budget, {point['cost']['speedup']:.2f}x", xlabel="times as many tokens")
    axes.set(ylabel="loss, nats", yscale="log")
    if point["budgets"]:
        axes.legend(fontsize=7)


def _rankings(axes: Any, search: dict[str, Any]) -> None:
    axes.plot([100 * share for share in search["reliability"]], "o-")
    axes.axhline(25, color="grey", linewidth=0.8)  # what a random ranking has
    axes.set(title="Attention of the answer on a layer's own top quarter", xlabel="layer", ylabel="%", ylim=(0, 103))
    axes.xaxis.get_major_locator().set_params(integer=True)
