"""What a search found, as tables and a picture."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..modeling.configuration_spts import Schedule
from ..utils.tables import table

FILES = ("search.json", "search.md", "search.png")


def front_table(found: dict[str, Any]) -> str:
    """One row for each cost: what was counted, and how close to dense on prompts nothing was chosen on."""
    rows = []
    for number, point in enumerate(found["points"]):
        cost, kinds, probe = point["cost"], point["held_out"]["kinds"], point["winner"]["schedule"]["probe"]
        rows.append(
            [
                f"{cost['speedup']:.2f}x" + (" *" if number == found["chosen"] else ""),
                f"{cost['kv_share']:.0%}",
                point["winner"]["shape"]["start"],
                f"{probe['window_size']} / {_heads(probe['heads'])} / "
                f"{probe['score_carry']:g} / {probe['kernel_size']}",
                f"{point['quality']:.3f} ({point['interval'][0]:.3f}-{point['interval'][1]:.3f})",
                f"{point['held_out']['loss']:.3f}",
                ", ".join(f"{kind} {row['same']:.0%}" for kind, row in kinds.items()),
            ]
        )
    names = ["counted", "KV kept", "start", "window / heads / carry / kernel", "next token as dense (95% interval)"]
    return table([*names, "loss, nats", "same answer"], rows)


def _heads(heads: str | dict) -> str:
    return heads if isinstance(heads, str) else f"{sum(map(len, heads.values()))} of them"


def without_table(point: dict[str, Any]) -> str:
    """What each found value brings: the loss at the same cost with the plain value instead."""
    shape, own = point["winner"]["shape"], point["winner"]["loss"]
    found = sorted(point["without"].items(), key=lambda pair: -pair[1])
    rows = [[name, shape[name], f"{loss:.3f}", f"{loss - own:+.3f}"] for name, loss in found]
    return table(["value", "found", "loss with the plain one", "difference"], rows)


def as_text(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    seconds = found["seconds"]
    parts = [
        f"{found['candidates']} candidates, {found['evaluations']} evaluations, {seconds['all'] / 60:.0f} minutes, of "
        f"which {seconds['dense'] / 60:.0f} for dense answers. The loss is the KL to dense along its own answers, half "
        "the mean over the kinds of prompt, half the worst kind's.",
        front_table(found),
    ]
    number = found["chosen"] if found["chosen"] is not None else len(found["points"]) - 1
    if found["points"]:
        point = found["points"][number]
        parts += [f"At {point['cost']['speedup']:.2f}x:", without_table(point), *point["signs"]]
    return "\n\n".join(parts)


def save(found: dict[str, Any], folder: Path, num_layers: int) -> None:
    """Write `search.json`, `search.md` and, where matplotlib is there, `search.png` into `folder`."""
    (folder / "search.png").unlink(missing_ok=True)  # an earlier search's
    (folder / "search.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "search.md").write_text(as_text(found) + "\n")
    if found["points"] and importlib.util.find_spec("matplotlib"):
        draw(found, folder / "search.png", num_layers)


def draw(found: dict[str, Any], target: Path, num_layers: int) -> None:
    """Agreement against cost with the front, loss by start layer, kept tokens over the layers, what each stage's budget
    is worth, and which layers rank tokens well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    (front, starts, kept), (budgets, rankings, rest) = figure.subplots(2, 3)
    rest.axis("off")
    points = found["points"]
    x = [p["cost"]["speedup"] for p in points]
    low, high = ([abs(p["quality"] - p["interval"][i]) for p in points] for i in (0, 1))
    front.errorbar(x, [p["quality"] for p in points], yerr=[low, high], fmt="o-", capsize=3)
    if found["chosen"] is not None:
        chosen = points[found["chosen"]]
        front.plot(chosen["cost"]["speedup"], chosen["quality"], "r*", markersize=16, label="chosen")
        front.legend()
    front.set(title="Front, on held-out prompts", xlabel="dense / SPTS operations", ylabel="next token as dense")
    for point in points:
        name = f"{point['cost']['speedup']:.2f}x"
        tried = [(c["shape"]["start"], c["loss"]) for c in point["tried"]]
        starts.plot(*zip(*tried, strict=True), "o", alpha=0.4, markersize=4, label=name)
        schedule = Schedule.from_dict(point["winner"]["schedule"], num_layers)
        shares = [schedule.counts(layer, 8192).active / 8192 for layer in range(num_layers)]
        kept.step(range(num_layers), [100 * s for s in shares], where="mid", label=name)
    starts.set(title="All candidates", xlabel="start layer", ylabel="loss, nats", yscale="log")
    starts.xaxis.get_major_locator().set_params(integer=True)
    kept.set(title="Active tokens of 8192 in the winners", xlabel="layer", ylabel="%")
    kept.legend(fontsize=7)
    point = points[found["chosen"] if found["chosen"] is not None else -1]
    for stage in dict.fromkeys(row["stage"] for row in point["budgets"]):
        rows = [(r["factor"], r["loss"]) for r in point["budgets"] if r["stage"] == stage]
        line = sorted([*rows, (1.0, point["winner"]["loss"])])
        budgets.plot(*zip(*line, strict=True), "o-", label=f"stage {stage + 1}")
    budgets.set(title=f"One stage's budget, {point['cost']['speedup']:.2f}x", xlabel="times as many tokens")
    budgets.set(ylabel="loss, nats", yscale="log")
    if point["budgets"]:
        budgets.legend(fontsize=7)
    rankings.plot([100 * share for share in found["reliability"]], "o-")
    rankings.axhline(25, color="grey", linewidth=0.8)  # what a random ranking has
    rankings.set(
        title="Attention of the answer on a layer's own top quarter", xlabel="layer", ylabel="%", ylim=(0, 103)
    )
    rankings.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(target, dpi=110)
