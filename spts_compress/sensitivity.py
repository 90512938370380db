"""The sensitivity study of the proxies: what size, rho, calibration, start and objective do to their ranking."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from .calibrate import capture
from .calibrate.base_model import resolve
from .calibrate.data import Blocks, blocks, documents
from .checkpoint.families import context_of, norms_of
from .checkpoint.keys import environment
from .cost import has_experts, proxy_flop_fraction
from .fit import metrics
from .fit.ltp import FeedForward, Regression, Tokens, fit_ridge
from .fit.size import fit
from .modeling.configuration_spts import Proxy
from .plan import complete
from .recipe import CalibrationSection, ProxySection, Recipe
from .utils.distributed import SINGLE_PROCESS
from .utils.errors import UserError
from .utils.store import Store, fingerprint
from .utils.tables import table

SHARE = 0.25  # of the tokens, for recall
FACTORS = ("size", "paper's, no step", "init", "geometric mean", "objective", "rho", "tokens", "fitted on")


@dataclass(frozen=True)
class Variant:
    """One way to make a proxy: `factor` is what is varied, `value` how; fitted on `part` of the tokens of `sources`."""

    factor: str
    value: str
    size: Proxy
    section: ProxySection
    sources: tuple[str, ...]
    part: float = 1.0

    def key(self) -> list:
        size = [self.size.channels, self.size.rank]
        return [self.factor, self.value, size, self.section.model_dump(), self.sources, self.part]


def variants(section: ProxySection, own: tuple[str, ...], sources: list[str]) -> list[Variant]:
    """Everything that is tried: one thing at a time is changed from the recipe's own proxies."""
    full = Proxy(section.channels or 1, section.rank or 1)
    made = [Variant("recipe", "as it is", full, section, own), Variant("size", "regression", Proxy(1, 0), section, own)]

    def size(number: float) -> Proxy:
        return Proxy(max(1, round(full.channels * number)), max(1, round(full.rank * number)))

    def change(factor: str, value: str, **changes: Any) -> None:
        made.append(Variant(factor, value, full, section.model_copy(update=changes), own))

    for number in (0.125, 0.25, 0.5, 2.0):
        found = size(number)
        made.append(Variant("size", f"{found.channels} channels, rank {found.rank}", found, section, own))
    for start in ("svd", "weighted-svd"):
        change("paper's, no step", start, init=start, regression=False, steps=0)
        if start != section.init:
            change("init", start, init=start)
    change("geometric mean", "no regression", regression=False)
    for objective in ("log-norm", "ranking", "representation"):
        if objective != section.objective:
            change("objective", objective, objective=objective)
    for top in (0.05, 0.2, 1.0):
        if top != section.saliency_quantile:
            change("rho", f"{top:g}", saliency_quantile=top)
    for part in (0.25, 0.5):
        made.append(Variant("tokens", f"{part:g} of them", full, section, own, part))
    mixes = [(name,) for name in sources] + [tuple(sources)] if len(sources) > 1 else []
    mixes += [tuple(s for s in sources if s != left_out) for left_out in sources] if len(sources) > 2 else []
    made += [Variant("fitted on", " + ".join(mix), full, section, mix) for mix in mixes if mix != own]
    return made


@dataclass
class Study:
    """What was found: `rows`, one for each layer and variant, and what they were found with."""

    setting: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def sequences(recipe: Recipe, texts: dict[str, Path], tokenizer: Any) -> dict[str, Blocks]:
    """Token blocks of every source, each with as many tokens as the recipe calibrates on: what ships with Python, the
    recipe's own source, and the files `texts`."""
    own = recipe.calibration.model_dump()
    sections = {name: {**own, "source": [name]} for name in ("python-docs", "python-code")}
    sections |= {name: {**own, "source": [name]} for name in recipe.calibration.source}
    sections |= {name: {**own, "source": ["files"], "path": str(path), "column": None} for name, path in texts.items()}
    made = {}
    for name, values in sections.items():
        [source] = values["source"]
        values["path"] = values["path"] if source == "files" else None
        values["dataset"] = values["dataset"] if source == "dataset" else None
        section = CalibrationSection.model_validate(values)
        made[name] = blocks(section, documents(section), tokenizer)
    return made


def run(
    recipe: Recipe,
    layers: list[int] | None,
    texts: dict[str, Path],
    work: Path,
    device: str = "cpu",
    vary: tuple[str, ...] = (),
) -> Study:
    """Fit and judge every variant on some layers (by default four, spread over the skipping ones).

    Args:
        texts: further sources by name.
        work: folder for finished work.
        vary: only these factors; none: all.

    Raises:
        UserError: for bad input.
    """
    if importlib.util.find_spec("matplotlib") is None:  # said before the long work
        raise UserError("the study draws with matplotlib: pip install 'spts-compress[plot]'")
    for name in vary:
        if name not in FACTORS:
            raise UserError(f"--vary {name}: give one of {', '.join(FACTORS)}")
    store = Store(work)
    with store.lock():
        base = resolve(recipe.model, store)
        if has_experts(base.config):
            raise UserError(
                f"{base.name}: the study varies low-rank proxies, and experts share no matrices to make one of"
            )
        recipe, depth = complete(recipe, base.config, context_of(base.config)), base.config.num_hidden_layers
        schedule = recipe.read_schedule(depth, base.config.num_attention_heads)
        skipping = list(range(schedule.start if schedule else depth // 3, depth))
        layers = sorted(layers or {skipping[round(i * (len(skipping) - 1) / 3)] for i in range(4)})
        if not set(layers) <= set(range(1, depth)):
            raise UserError(f"--layers: give numbers from 1 to {depth - 1}")
        found = sequences(recipe, texts, base.tokenizer(recipe.calibration.chat_template))
        sources, own = list(found), tuple(recipe.calibration.source)
        tried = [v for v in variants(recipe.proxy, own, sources) if not vary or v.factor in ("recipe", *vary)]
        text = {name: [s.tolist() for s in b.fit + b.held_out] for name, b in found.items()}
        data = fingerprint(base.key, recipe.model.dtype, torch.device(device).type, text, environment())

        def unit(layer: int, variant: Variant) -> tuple[str, str]:
            return f"sweep-{layer}", fingerprint(data, variant.key())

        missing = [n for n in layers if not all(store.path(*unit(n, v), ".json").exists() for v in tried)]
        if missing:
            model = base.load(recipe.model.dtype, device)
            everything, places = [s for b in found.values() for s in b.fit + b.held_out], norms_of(base.family)
            for layer, states, norms in capture.feed_forward(
                model, everything, missing, store, data, SINGLE_PROCESS, places
            ):
                ffn = FeedForward.of(model.model.layers[layer], base.config, places)
                fitted, kept = _split(found, ffn, states, norms)
                for variant in tqdm(tried, desc=f"layer {layer}", unit="fit", leave=False):
                    store.json(*unit(layer, variant), _judge(ffn, variant, fitted, kept))
        rows = []
        for layer in layers:
            for variant in tried:
                row = {"layer": layer, "factor": variant.factor, "value": variant.value}
                row |= {"sources": list(variant.sources), **store.json(*unit(layer, variant), dict)}
                rows.append(row)
        setting = {"model": base.title, "layers": layers, "share": SHARE, "sources": sources, "own": list(own)}
        setting |= {"tokens": recipe.calibration.tokens, "proxy": recipe.proxy.model_dump()}
        return Study(setting, rows)


def _split(
    found: dict[str, Blocks], ffn: FeedForward, states: torch.Tensor, norms: torch.Tensor
) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Tokens to fit on, and tokens to stop and judge on, by source."""
    fitted: dict[str, Tokens] = {}
    kept: dict[str, Tokens] = {}
    place = 0
    for name, made in found.items():
        for part, target in ((made.fit, fitted), (made.held_out, kept)):
            count = sum(map(len, part))
            target[name] = Tokens.of(ffn, states[place : place + count], norms[place : place + count])
            place += count
    return fitted, kept


def _judge(
    ffn: FeedForward, variant: Variant, fitted: dict[str, Tokens], kept: dict[str, Tokens]
) -> Callable[[], dict]:
    """Fits one variant and ranks the second half of every source's held-out tokens."""

    def judge() -> dict:
        begin = perf_counter()
        names = variant.sources
        tokens = Tokens.cat([fitted[n][:: round(len(names) / variant.part)] for n in names])
        check = Tokens.cat([kept[n][: len(kept[n]) // 2] for n in names])
        ridge = fit_ridge(ffn, Regression(tokens.unit), tokens, check) if variant.section.regression else None
        proxy = ridge
        if proxy is None or variant.size.rank:
            proxy, _ = fit(ffn, variant.size, tokens, check, variant.section, ridge, SHARE)
        seconds, ranked = perf_counter() - begin, {}
        for name, part in kept.items():
            norms = metrics.norms(proxy, ffn, part[len(part) // 2 :])
            ranked[name] = {kind: metrics.fidelity(norms, SHARE, kind == "relative") for kind in ("norm", "relative")}
        return {
            "cost": proxy_flop_fraction(ffn.gate.shape[1], ffn.width, variant.size),
            "seconds": seconds,
            "ranked": ranked,
        }

    return judge


def medians(study: Study, kind: str = "norm") -> list[dict[str, Any]]:
    """Per variant, over the layers: median Spearman and recall on the `own` sources it was fitted on and on `other`
    ones, its cost and seconds; then the same of the input norm, which costs nothing."""
    made = []

    def add(name: tuple[str, str], rows: list[dict], who: str, cost: float, seconds: float) -> None:
        row: dict[str, Any] = {"factor": name[0], "value": name[1], "cost": cost, "seconds": seconds}
        for group, inside in (("own", True), ("other", False)):
            ranked = [r["ranked"][s][kind][who] for r in rows for s in r["ranked"] if (s in r["sources"]) == inside]
            for what in ("spearman", "recall"):
                row[f"{group}_{what}"] = median(x[what] for x in ranked) if ranked else None
        made.append(row)

    names = list(dict.fromkeys((r["factor"], r["value"]) for r in study.rows))
    for name in names:
        rows = [r for r in study.rows if (r["factor"], r["value"]) == name]
        add(name, rows, "proxy", rows[0]["cost"], median(r["seconds"] for r in rows))
        if name == names[0]:
            add(("free", "norm of the input"), rows, "input_norm", 0.0, 0.0)
    return made


def recommended(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """The cheapest size whose recall, on own and on other sources, is within `tolerance` of the best one's."""
    sizes = sorted((r for r in rows if r["factor"] in ("size", "recipe")), key=lambda r: r["cost"])
    judged = [r["own_recall"] + (r["other_recall"] or 0) for r in sizes]
    enough = max(judged) - tolerance * (1 if sizes[0]["other_recall"] is None else 2)
    return next(r for r, value in zip(sizes, judged, strict=True) if value >= enough)


def as_table(rows: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """The medians as a Markdown table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    columns = ("own_spearman", "own_recall", "other_spearman", "other_recall")
    lines = [
        [
            row["factor"],
            row["value"] + (" (recommended)" if row is best else ""),
            f"{row['cost']:.2%}",
            *(number(row[c]) for c in columns),
            f"{row['seconds']:.1f} s",
        ]
        for row in rows
    ]
    heads = ["Spearman", f"recall of top {SHARE:.0%}"]
    names = [*heads, *(f"{head}, other sources" for head in heads)]
    return table(["varied", "", "of dense FLOPs", *names, "fit"], lines)


def by_source(study: Study, kind: str = "norm") -> str:
    """Median Spearman and recall for each source fitted on (rows) and judged on (columns)."""
    sources = study.setting["sources"]
    lines = []
    for factor, value in dict.fromkeys((r["factor"], r["value"]) for r in study.rows):
        rows = [r for r in study.rows if (r["factor"], r["value"]) == (factor, value)]
        if factor not in ("recipe", "fitted on"):
            continue
        cells = []
        for source in sources:
            ranked = [r["ranked"][source][kind]["proxy"] for r in rows]
            both = (median(x[what] for x in ranked) for what in ("spearman", "recall"))
            cells.append(" / ".join(f"{x:.3f}" for x in both) + ("" if source in rows[0]["sources"] else " (unseen)"))
        lines.append([" + ".join(rows[0]["sources"]), *cells])
    return table(["fitted on", *(f"judged on {s}" for s in sources)], lines)


def draw(rows: list[dict[str, Any]], best: dict[str, Any], title: str, target: Path) -> None:
    """Fidelity against probing cost as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    sizes = sorted((r for r in rows if r["factor"] in ("size", "recipe")), key=lambda r: r["cost"])
    single = [r for r in rows if r["factor"] in ("free", "paper's, no step", "geometric mean")]
    for axes, what in zip(figure.subplots(1, 2), ("spearman", "recall"), strict=True):
        for group, style in (("own", "o-"), ("other", "s--")):
            if sizes[0][f"{group}_{what}"] is None:
                continue
            x = [max(r["cost"], 1e-4) * 100 for r in sizes]
            axes.plot(x, [r[f"{group}_{what}"] for r in sizes], style, label=f"{group} sources")
            axes.plot(max(best["cost"], 1e-4) * 100, best[f"{group}_{what}"], "k*", markersize=12)
            for row in single:
                axes.plot(max(row["cost"], 1e-4) * 100, row[f"{group}_{what}"], "x", color="gray")
                if group == "own":
                    axes.annotate(row["value"], (max(row["cost"], 1e-4) * 100, row[f"{group}_{what}"]), fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("% of the dense FLOPs (free ones at 0.01)")
        axes.set_ylabel("Spearman correlation" if what == "spearman" else f"recall of the top {SHARE:.0%}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=150)


def save(study: Study, output: Path) -> str:
    """Write `sweep.json`, `sweep.md` and `sweep.png` into `output`, and return the tables."""
    rows = medians(study)
    best = recommended(rows, study.setting["proxy"]["tolerance"])
    title = f"{study.setting['model']}: layers {', '.join(map(str, study.setting['layers']))}, medians"
    parts = [title, as_table(rows, best), "Spearman / recall by source:", by_source(study)]
    relative = medians(study, "relative")
    again = recommended(relative, study.setting["proxy"]["tolerance"])
    parts += ["The same for norms relative to the state's own (`ffn_selection: relative`):", as_table(relative, again)]
    text = "\n\n".join(parts)
    draw(rows, best, title, output / "sweep.png")
    (output / "sweep.json").write_text(json.dumps({"setting": study.setting, "rows": study.rows}, indent=1) + "\n")
    (output / "sweep.md").write_text(text + "\n")
    return text
