"""The two pictures of README.md and some of the results', from a shipped recipe and from the results' own files.

    python recipes/studies/pictures.py [FOLDER]

`method.png`: which tokens each layer works on. The counts are those of `llama-paper.yaml` at 16K tokens; which
tokens they are is drawn from made-up scores, since that depends on the prompt. `result.png`: quality against measured
speed-up, with 95% intervals and the range of the timed pairs. `qwen2.5-coder-0.5b/updates.png`: free answers against
FLOPs, with updates and without; `peers.png` beside it, where `peers.json` is: SPTS and other methods. FOLDER is
`recipes/results` by default.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from spts_compress.recipe import find, load
from spts_compress.tasks.recovery import interval

RESULTS = Path(__file__).parent.parent / "results"
ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"  # Okabe, Ito
LAYERS, TOKENS, BLOCK = 32, 16384, 128
STATES = {
    "pruned for good": "#FFFFFF",
    "skipped in this layer": "#D9D9D9",
    "attention alone": SKY,
    "feed-forward alone": ORANGE,
    "both": BLUE,
}


def states() -> tuple[np.ndarray, list[int]]:
    """What each layer does to each block of tokens, as an index into STATES: (layers, blocks); and the tokens that
    attention runs on, layer by layer."""
    schedule = load(find("llama-paper.yaml")).read_schedule(LAYERS)
    assert schedule is not None
    blocks, rng = TOKENS // BLOCK, np.random.default_rng(3)
    worth = np.convolve(rng.gumbel(size=blocks + 4), np.ones(5) / 5, "valid")  # what matters is found in runs
    there, shown, active_counts = np.arange(blocks), np.zeros((LAYERS, blocks), int), []
    for layer in range(LAYERS):
        _, active, changed, leaving, _ = schedule.counts(layer, TOKENS)
        active_counts.append(active)
        scores = worth + 0.25 * rng.normal(size=blocks)
        scores[-1] = math.inf  # the last token asks
        amounts = scores[there], (scores + 0.3 * rng.normal(size=blocks))[there]
        attention, network = (
            there[np.argsort(-values)[: round(count / BLOCK)]]
            for values, count in zip(amounts, (active, changed), strict=True)
        )
        shown[layer, there] = 1
        shown[layer, attention] = 2
        shown[layer, network] = np.where(np.isin(network, attention), 4, 3)
        there = there[np.argsort(-scores[there])[: round(leaving / BLOCK)]]
    return shown, active_counts


def method(file: Path) -> None:
    """Layers times tokens, and beside it how many tokens each layer's attention runs on."""
    shown, active = states()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, width_ratios=[5, 1], layout="constrained")
    left.imshow(
        shown, aspect="auto", cmap=ListedColormap(list(STATES.values())), vmin=-0.5, vmax=4.5, interpolation="nearest",
        extent=(0, TOKENS / 1024, LAYERS - 0.5, -0.5),
    )  # fmt: skip
    left.set(
        xlabel="position in the prompt, thousand tokens",
        ylabel="layer",
        title="Llama-3.1-8B, 16K tokens: what each layer works on",
    )
    right.barh(range(LAYERS), [n / 1024 for n in active], color=BLUE, height=1.0)
    right.set(xlabel="thousand tokens", title="in attention")
    for axis in (left, right):
        axis.axhline(9.5, color="black", linewidth=1, linestyle="--")
    left.text(0.3, 8.9, "layers before start are dense", color="white", fontsize=9)
    handles = [Patch(facecolor=colour, edgecolor="#808080", label=name) for name, colour in STATES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def spread(axis: Any, x: float, xs: list[float], y: float, ys: tuple[float, float], **looks: Any) -> None:
    """A point with its two intervals."""
    errors = {"xerr": [[max(0, x - xs[0])], [max(0, xs[1] - x)]], "yerr": [[max(0, y - ys[0])], [max(0, ys[1] - y)]]}
    axis.errorbar(x, y, **errors, linestyle="none", capsize=2, elinewidth=1, markersize=7, **looks)


def score_kept(tasks: list[dict]) -> tuple[float, tuple[float, float]]:
    """The part of the dense score that is kept over several tasks; their intervals are joined as independent."""
    dense = sum(task["dense"] for task in tasks)
    mean = sum(task["spts"] for task in tasks) / dense
    below, above = (
        math.sqrt(sum((task["dense"] * abs(task["interval"][side] - task["recovery"])) ** 2 for task in tasks)) / dense
        for side in (0, 1)
    )
    return mean, (mean - below, mean + above)


def shipped(axis: Any) -> None:
    """The three shipped recipes of Qwen2.5-Coder-0.5B at 8K tokens."""
    folder = "qwen2.5-coder-0.5b"
    half, heads = read(f"{folder}/evaluation-2.0x.json")["evaluations"], read(f"{folder}/evaluation-retrieval.json")
    [front] = [r for r in read(f"{folder}/front-late.json")["8192"]["rows"] if round(r["cost"]["speedup"], 2) == 1.25]
    free = [prompt["top1"] for prompt in heads["2.40"]["fidelity"]["prompts"]]
    needles = {
        "2.0x": score_kept([task for task in half[0]["tasks"] if task["task"].startswith("niah")]),
        "retrieval": score_kept(heads["2.40"]["tasks"]),
    }
    answers = {
        "quality": front["lengths"]["8192"],
        "2.0x": [(row := half[3]["fidelity"][0])["top1"], row["interval"]],
        "retrieval": [sum(free) / len(free), interval([1.0] * len(free), free)],
    }
    for found, label, looks in (
        (needles, "needle score kept (RULER's eight NIAH tasks)", {"color": BLUE, "marker": "o"}),
        (answers, "next tokens as dense, free answers", {"color": RED, "marker": "s"}),
    ):
        for number, (name, (mean, ends)) in enumerate(found.items()):
            timed = read(f"{folder}/main-{name}.json")["speed"][-1]
            named = {"label": label} if number == 0 else {}
            spread(axis, timed["speedup"], timed["speedup_range"], mean, ends, **looks, **named)
    for x, name in ((1.28, "…-quality"), (2.07, "…-0.5b"), (2.50, "…-retrieval")):
        axis.text(x, 0.42, name, ha="center", fontsize=8.5)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(title="Three shipped recipes, 8K tokens", xlim=(0.9, 2.8), ylim=(0.38, 1.18))
    axis.set(xlabel="measured TTFT, dense / SPTS", ylabel="share of dense")
    axis.legend(loc="lower left", fontsize=8, frameon=False, bbox_to_anchor=(0, 0.09))


def beside(axis: Any) -> None:
    """SPTS and other methods at 4K tokens, one run."""
    looks = {
        "dense": {"color": "black", "marker": "*"},
        "SPTS": {"color": BLUE, "marker": "o"},
        "GemFilter": {"color": ORANGE, "marker": "^"},
        "FastKV": {"color": GREEN, "marker": "v"},
        "kvpress, SnapKV": {"color": PURPLE, "marker": "D"},
        "kvpress, expected attention": {"color": "#666666", "marker": "P"},
    }
    rows, named = read("qwen2.5-coder-0.5b/peers-2.0x.json")["rows"], set()
    flat = {name: [s for scores in row["scores"].values() for s in scores] for name, row in rows.items()}
    for name, row in rows.items():
        kind = next(kind for kind in sorted(looks, key=len, reverse=True) if name.startswith(kind))
        timed, scores = row["ttft"]["4096"], flat[name]
        mean = sum(scores) / sum(flat["dense"])
        ends = interval(flat["dense"], scores) or (mean, mean)
        label = {} if kind in named else {"label": kind}
        named.add(kind)
        spread(axis, timed["ratio"], timed["range"], mean, ends, **looks[kind], **label)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(title="Beside other methods, 4K tokens", xlim=(0.8, 2.8), ylim=(-0.05, 1.12))
    axis.set(xlabel="measured TTFT, dense / method", ylabel="needle score, share of dense")
    axis.legend(loc="lower left", fontsize=8, frameon=False)


def result(file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    shipped(left)
    beside(right)
    figure.suptitle("Qwen2.5-Coder-0.5B, TTFT on 2 CPU cores: right and up is better", fontsize=11)
    figure.savefig(file, dpi=150, metadata={"Software": None})


PEERS = "qwen2.5-coder-0.5b/peers.json"
METHODS: dict[str, dict[str, Any]] = {
    "SPTS, main": {"color": BLUE, "marker": "o", "label": "SPTS, …-0.5b"},
    "SPTS, updates": {"color": SKY, "marker": "s", "label": "SPTS, …-updates"},
    "POP": {"color": RED, "marker": "v"},
    "FastKV": {"color": GREEN, "marker": "^"},
    "GemFilter": {"color": ORANGE, "marker": "<"},
    "UniPrefill": {"color": PURPLE, "marker": "D"},
    "draft model": {"color": "#666666", "marker": "P", "mfc": "white", "label": "speculative prefill"},
    "SnapKV": {"color": "#666666", "marker": "X"},
    "dense": {"color": "black", "marker": "*"},
}


def methods(axis: Any, part: str, figure: str) -> None:
    """SPTS and other methods in one run, each at all its settings: a figure of its needles, or of its free answers."""
    ways = read(PEERS)["ways"]
    for name, looks in METHODS.items():
        own = sorted((way for way in ways if way["method"] == name), key=lambda way: way["ttft"]["ratio"])
        points = [(way["ttft"]["ratio"], way[part][figure]["mean"]) for way in own]
        if len(own) > 1:
            axis.plot(*zip(*points, strict=True), color=looks["color"], alpha=0.3)
        for number, (way, (x, y)) in enumerate(zip(own, points, strict=True)):
            ends = way[part][figure]["interval"] or (y, y)
            named = {"label": None if number else looks.get("label", name)}
            spread(axis, x, way["ttft"]["range"], y, ends, **{**looks, **named})
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="measured TTFT, dense / method", ylim=(-0.04, 1.1))


def peers(file: Path) -> None:
    """What is kept of dense's needles and free answers, against the time that is saved."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained")
    methods(left, "needles", "score")
    methods(right, "longbench", "top1")
    left.set(title="Needles found", ylabel="score, share of dense")
    right.set(title="Free answers", ylabel="next tokens as dense")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    where = f"Qwen2.5-Coder-0.5B, {read(PEERS)['length'] // 1024}K tokens on 2 CPU cores"
    figure.suptitle(f"{where}, 95% intervals: right and up is better", fontsize=11)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def updates(file: Path) -> None:
    """KL of free answers against the counted speed-up: the schedules with updates, pooled over 31 neighbours, and the
    one without."""
    rows = read("qwen2.5-coder-0.5b/updates.json")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, length in zip(axes, (4096, 8192), strict=True):
        own = [row for row in rows if row["tokens"] == length]
        front = [row for row in own if row["way"].split(" (")[0] in ("start 4", "start 5") or row["counted"] < 1.3]
        front = sorted(front, key=lambda row: row["counted"])
        axis.plot([row["counted"] for row in front], [row["kl"] for row in front], color=BLUE, alpha=0.3)
        before = [row for row in own if row["way"] == "without updates"]
        for shown, label, looks in (
            (front, "with updates", {"color": BLUE, "marker": "o"}),
            (before, "without", {"color": RED, "marker": "s"}),
        ):
            for number, row in enumerate(shown):
                x = row["counted"]
                spread(axis, x, [x, x], row["kl"], row["kl_interval"], **looks, label=None if number else label)
        axis.set(title=f"{length // 1024}K tokens", xlabel="FLOPs, dense / SPTS", yscale="log")
    axes[0].set_ylabel("KL to dense, nats")
    axes[1].legend(loc="lower right", fontsize=8, frameon=False)
    figure.suptitle("Qwen2.5-Coder-0.5B, free answers on LongBench: down and right is better", fontsize=11)
    figure.savefig(file, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    folder = parser.parse_args().folder
    method(folder / "method.png")
    result(folder / "result.png")
    updates(folder / "qwen2.5-coder-0.5b/updates.png")
    if (RESULTS / PEERS).exists():
        peers(folder / "qwen2.5-coder-0.5b/peers.png")
