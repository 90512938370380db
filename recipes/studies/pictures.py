"""The two pictures of README.md and some of the results', from a shipped recipe and from the results' own files.

    python recipes/studies/pictures.py [FOLDER]

`method.png`: which tokens each layer works on. The counts are those of `llama-paper.yaml` at 16K tokens; which
tokens they are is drawn from made-up scores, since that depends on the prompt. `result.png`: SPTS and other methods in
one run, quality against measured speed-up, with 95% intervals and the range of the timed rounds, for two models.
`qwen2.5-coder-0.5b/updates.png`: free answers against FLOPs, with updates and without. FOLDER is `recipes/results` by
default.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from spts_compress.recipe import find, load

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
        scores[-1] = np.inf  # the last token asks
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


PEERS = {
    "qwen2.5-coder-0.5b/peers-8k.json": "Qwen2.5-Coder-0.5B, 8K tokens",
    "smollm2-135m/peers-4k.json": "SmolLM2-135M, 4K tokens",
}
SHIPPED, ALL_HEADS = {"color": BLUE, "marker": "o"}, {"color": SKY, "marker": "s"}
METHODS: dict[str, dict[str, Any]] = {
    "SPTS, main": {**SHIPPED, "label": "SPTS"},
    "SPTS, smol": SHIPPED,
    "SPTS, updates": {**ALL_HEADS, "label": "SPTS, ranked by all heads"},
    "SPTS, smolold": {"color": BLUE, "marker": "o", "mfc": "white", "label": "SPTS without updates"},
    "SPTS, early": {"color": BLUE, "marker": "d", "mfc": "white", "label": "SPTS from layer 6 on (60 prompts)"},
    "SPTS, filter": {"color": BLUE, "marker": "h", "label": "SPTS that filters in layer 5 (60 prompts)"},
    "POP": {"color": RED, "marker": "v", "label": "POP"},
    "FastKV": {"color": GREEN, "marker": "^", "label": "FastKV"},
    "GemFilter": {"color": ORANGE, "marker": "<", "label": "GemFilter"},
    "UniPrefill": {"color": PURPLE, "marker": "D", "label": "UniPrefill's rule"},
    "SnapKV": {"color": "#666666", "marker": "X", "label": "SnapKV"},
    "dense": {"color": "black", "marker": "*", "label": "dense"},
}


def methods(axis: Any, ways: list[dict[str, Any]], part: str, figure: str) -> None:
    """SPTS and other methods in one run, each at all its settings: a figure of its needles, or of its free answers."""
    for name, looks in METHODS.items():
        own = sorted((way for way in ways if way["method"] == name), key=lambda way: way["ttft"]["ratio"])
        if name == "dense" and figure == "kl":
            continue  # none, which no logarithm shows
        # scores are kept as shares of dense's
        whole = [fmean(t["dense"] for t in w[part]["tasks"].values()) if figure == "score" else 1.0 for w in own]
        points = [(w["ttft"]["ratio"], w[part][figure]["mean"] * of) for w, of in zip(own, whole, strict=True)]
        if len(own) > 1:
            axis.plot(*zip(*points, strict=True), color=looks["color"], alpha=0.3)
        for number, (way, (x, y), of) in enumerate(zip(own, points, whole, strict=True)):
            low, high = way[part][figure]["interval"] or (y / of, y / of)
            named = {**looks, "label": None if number else looks.get("label")}
            spread(
                axis,
                x,
                way["ttft"]["range"],
                y,
                (low * of, min(1.0, high * of) if figure == "score" else high),
                **named,
            )
    axis.set(xlabel="measured TTFT, dense / method")


def result(file: Path) -> None:
    """What is left of RULER's score and of free answers, against the time that is saved, on 2 CPU cores."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    (qwen, where), (smol, there) = ((read(name), name) for name in PEERS)
    for axis, found, name, part, measure in (
        (axes[0], qwen, where, "needles", "score"),
        (axes[1], qwen, where, "longbench", "kl"),
        (axes[2], smol, there, "longbench", "kl"),
    ):
        methods(axis, found["ways"], part, measure)
        prompts = found["ways"][0][part]["prompts"]
        what = "RULER's eleven tasks" if measure == "score" else "free answers"
        axis.set_title(f"{PEERS[name]}:\n{what}, {prompts} prompts", fontsize=10)
    for name in ("early", "filter"):
        methods(axes[2], read(f"smollm2-135m/{name}-4k.json")["ways"][1:], "longbench", "kl")
    axes[0].set(ylabel="score, up is better", ylim=(-0.04, 1.06))
    for axis in axes[1:]:
        axis.set(yscale="log", ylabel="KL to dense, nats (less is up)")
        axis.invert_yaxis()
    beside, [bench] = read("qwen2.5-coder-0.5b/updates.json"), read("qwen2.5-coder-0.5b/bench-1.25x.json")["rows"]
    row = next(row for row in beside if row["tokens"] == 8192 and row["counted"] == 1.25)
    speed = bench["spts"]["speedup"][0]
    spread(axes[1], speed["median"], speed["range"], row["kl"], row["kl_interval"], **ALL_HEADS)
    handles = dict(pair for axis in axes for pair in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle("95% intervals; TTFT on 2 CPU cores: right and up is better", fontsize=11)
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
