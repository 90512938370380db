"""The sensitivity study of the proxies: what size, rho, calibration, init and objective do to their ranking.

spts-compress sweep RECIPE.yaml --output OUT [--layers 8,23] [--vary size] [--text papers=papers.jsonl]
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from spts_compress.calibrate import capture
from spts_compress.calibrate.base_model import resolve
from spts_compress.calibrate.data import Blocks, blocks, document_key, documents
from spts_compress.checkpoint.families import context_of, norms_of
from spts_compress.checkpoint.keys import environment
from spts_compress.cost import has_experts, proxy_flop_fraction
from spts_compress.fit import metrics
from spts_compress.fit.ltp import FeedForward, Tokens, fit_ridge
from spts_compress.fit.size import fit
from spts_compress.modeling.configuration_spts import Proxy
from spts_compress.plan import complete
from spts_compress.recipe import CalibrationSection, ProxySection, Recipe
from spts_compress.utils import tables
from spts_compress.utils.distributed import SINGLE_PROCESS
from spts_compress.utils.errors import UserError, some
from spts_compress.utils.store import Store, fingerprint
from spts_compress.utils.tables import PALETTE, Show, columns_table, has_matplotlib

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
    full = Proxy(section.channels or 1, section.rank) if section.rank else Proxy(1, 0)
    tried = [Variant("recipe", "as it is", full, section, own)]

    def change(factor: str, value: str, **changes: Any) -> None:
        tried.append(Variant(factor, value, full, section.model_copy(update=changes), own))

    if full.rank:  # of a regression alone nothing but its text can be varied
        tried.append(Variant("size", "regression", Proxy(1, 0), section, own))
        for number in (0.125, 0.25, 0.5, 2.0):
            size = Proxy(max(1, round(full.channels * number)), max(1, round(full.rank * number)))
            tried.append(Variant("size", f"{size.channels} channels, rank {size.rank}", size, section, own))
        for init in ("svd", "weighted-svd"):
            change("paper's, no step", init, init=init, regression=False, steps=0)
            if init != section.init:
                change("init", init, init=init)
        change("geometric mean", "no regression", regression=False)
        for objective in ("log-norm", "ranking", "representation"):
            if objective != section.objective:
                change("objective", objective, objective=objective)
        for top in (0.05, 0.2, 1.0):
            if top != section.saliency_quantile:
                change("rho", f"{top:g}", saliency_quantile=top)
    for part in (0.25, 0.5):
        tried.append(Variant("tokens", f"{part:g} of them", full, section, own, part))
    mixes = [(name,) for name in sources] + [tuple(sources)] if len(sources) > 1 else []
    mixes += [tuple(s for s in sources if s != left_out) for left_out in sources] if len(sources) > 2 else []
    tried += [Variant("fitted on", " + ".join(mix), full, section, mix) for mix in mixes if mix != own]
    return tried


@dataclass
class Study:
    """`rows`, one for each layer and variant, and the `setting` that they were measured with."""

    setting: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def sequences(recipe: Recipe, texts: dict[str, Path], tokenizer: Any) -> dict[str, Blocks]:
    """Token blocks of every source, each with as many tokens as the recipe calibrates on: what ships with Python, the
    recipe's own source, and the files `texts`.

    Raises:
        UserError: for a name that is taken, and where something is fitted on a document that another source has.
    """
    own = recipe.calibration.model_dump()
    sections = {name: {**own, "source": [name]} for name in ("python-docs", "python-code")}
    sections |= {name: {**own, "source": [name]} for name in recipe.calibration.source}
    if taken := sections.keys() & texts:
        raise UserError(f"--text {some(taken)}: there is a source of this name already; give another name")
    sections |= {name: {**own, "source": ["files"], "path": str(path), "column": None} for name, path in texts.items()}
    by_source, keys = dict[str, Blocks](), dict[str, set[str]]()
    for name, values in sections.items():
        [source] = values["source"]
        values["path"] = values["path"] if source == "files" else None
        values["dataset"] = values["dataset"] if source == "dataset" else None
        section = CalibrationSection.model_validate(values)
        [found] = documents(section)
        by_source[name] = blocks(section, [found], tokenizer)
        keys[name] = set(map(document_key, found))
    for fitted, other in permutations(by_source, 2):
        if seen := len(by_source[fitted].fitted & keys[other]):
            raise UserError(f"{fitted} and {other} share documents, {seen} of which one is fitted on: leave one out")
    return by_source


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
    if not has_matplotlib():  # said before the long work
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
        text_blocks = sequences(recipe, texts, base.tokenizer(recipe.calibration.chat_template))
        sources, own = list(text_blocks), tuple(recipe.calibration.source)
        tried = [v for v in variants(recipe.proxy, own, sources) if not vary or v.factor in ("recipe", *vary)]
        text = [[name, *(s.tolist() for s in b.fit + b.held_out)] for name, b in text_blocks.items()]  # in this order
        for name in vary:
            if not any(variant.factor == name for variant in tried):
                raise UserError(
                    f"--vary {name}: nothing of it can be varied in these proxies; give a proxy.rank above 0"
                )
        data = fingerprint(base.key, recipe.model.dtype, torch.device(device).type, text, environment())

        def unit(layer: int, variant: Variant) -> tuple[str, str]:
            return f"sweep-{layer}", fingerprint(data, variant.key())

        missing = [n for n in layers if not all(store.path(*unit(n, v), ".json").exists() for v in tried)]
        if missing:
            model = base.load(recipe.model.dtype, device)
            everything, places = [s for b in text_blocks.values() for s in b.fit + b.held_out], norms_of(base.family)
            for layer, states, norms in capture.feed_forward(
                model, everything, missing, store, data, SINGLE_PROCESS, places
            ):
                ffn = FeedForward.of(model.model.layers[layer], base.config, places)
                fitted, held_out = _split(text_blocks, ffn, states, norms)
                for variant in tqdm(tried, desc=f"layer {layer}", unit="fit", leave=False):
                    store.json(*unit(layer, variant), _judge(ffn, variant, fitted, held_out))
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
    text_blocks: dict[str, Blocks], ffn: FeedForward, states: torch.Tensor, norms: torch.Tensor
) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Tokens to fit on, and tokens to stop and judge on, by source."""
    fitted: dict[str, Tokens] = {}
    held_out: dict[str, Tokens] = {}
    place = 0
    for name, text in text_blocks.items():
        for part, target in ((text.fit, fitted), (text.held_out, held_out)):
            count = sum(map(len, part))
            target[name] = Tokens.of(ffn, states[place : place + count], norms[place : place + count])
            place += count
    return fitted, held_out


def _judge(
    ffn: FeedForward, variant: Variant, fitted: dict[str, Tokens], held_out: dict[str, Tokens]
) -> Callable[[], dict]:
    """Fits one variant and ranks the second half of every source's held-out tokens."""

    def judge() -> dict:
        begin = perf_counter()
        names = variant.sources
        tokens = Tokens.cat([fitted[n][:: round(len(names) / variant.part)] for n in names])
        check = Tokens.cat([held_out[n][: len(held_out[n]) // 2] for n in names])
        needed = variant.section.regression or not variant.size.rank
        regressed = fit_ridge(ffn, tokens, check) if needed else None
        proxy = regressed
        if proxy is None or variant.size.rank:
            proxy, _ = fit(ffn, variant.size, tokens, check, variant.section, regressed, SHARE)
        seconds, ranked = perf_counter() - begin, {}
        for name, part in held_out.items():
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
    by_variant: dict[tuple[str, str], list[dict]] = {}
    for row in study.rows:
        by_variant.setdefault((row["factor"], row["value"]), []).append(row)

    def summary(name: tuple[str, str], rows: list[dict], who: str, cost: float, seconds: float) -> dict[str, Any]:
        result: dict[str, Any] = {"factor": name[0], "value": name[1], "cost": cost, "seconds": seconds}
        for group, inside in (("own", True), ("other", False)):
            ranked = [r["ranked"][s][kind][who] for r in rows for s in r["ranked"] if (s in r["sources"]) == inside]
            for what in ("spearman", "recall"):
                result[f"{group}_{what}"] = median(x[what] for x in ranked) if ranked else None
        return result

    result = [
        summary(name, rows, "proxy", rows[0]["cost"], median(r["seconds"] for r in rows))
        for name, rows in by_variant.items()
    ]
    result.insert(1, summary(("free", "norm of the input"), next(iter(by_variant.values())), "input_norm", 0.0, 0.0))
    return result


def recommended(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any] | None:
    """The cheapest size whose recall, on own and on other sources, is within `tolerance` of the best one's; None if
    there is one size alone."""
    sizes = sorted((r for r in rows if r["factor"] in ("size", "recipe")), key=lambda r: r["cost"])
    if len(sizes) < 2:
        return None
    judged = [r["own_recall"] + (r["other_recall"] or 0) for r in sizes]
    enough = max(judged) - tolerance * (1 if sizes[0]["other_recall"] is None else 2)
    return next(r for r, value in zip(sizes, judged, strict=True) if value >= enough)


def _number(name: str) -> Show:
    return lambda row: "" if row[name] is None else f"{row[name]:.3f}"


def as_table(rows: list[dict[str, Any]], best: dict[str, Any] | None) -> str:
    """The medians as a Markdown table."""
    columns: dict[str, Show] = {
        "varied": "{factor}",
        "value": lambda row: row["value"] + (" (recommended)" if row is best else ""),
        "of dense FLOPs": "{cost:.2%}",
        "Spearman": _number("own_spearman"),
        f"recall of top {SHARE:.0%}": _number("own_recall"),
        "Spearman, other sources": _number("other_spearman"),
        f"recall of top {SHARE:.0%}, other sources": _number("other_recall"),
        "fit": "{seconds:.1f} s",
    }
    return columns_table(columns, rows)


def by_source(study: Study, kind: str = "norm") -> str:
    """Median Spearman and recall for each source fitted on (rows) and judged on (columns)."""
    variants: dict[str, list[dict]] = {}
    for row in study.rows:
        if row["factor"] in ("recipe", "fitted on"):
            variants.setdefault(row["value"], []).append(row)

    def judged_on(source: str) -> Show:
        def show(rows: list[dict]) -> str:
            ranked = [row["ranked"][source][kind]["proxy"] for row in rows]
            both = " / ".join(f"{median(x[what] for x in ranked):.3f}" for what in ("spearman", "recall"))
            return both + ("" if source in rows[0]["sources"] else " (unseen)")

        return show

    columns: dict[str, Show] = {"fitted on": lambda rows: " + ".join(rows[0]["sources"])}
    columns |= {f"judged on {source}": judged_on(source) for source in study.setting["sources"]}
    return columns_table(columns, variants.values())


def draw(rows: list[dict[str, Any]], best: dict[str, Any] | None, title: str, figure: Any) -> None:
    """Fidelity against probing cost as a picture."""
    figure.suptitle(title)
    sizes = sorted((r for r in rows if r["factor"] in ("size", "recipe")), key=lambda r: r["cost"])
    single = [r for r in rows if r["factor"] in ("free", "paper's, no step", "geometric mean")]

    def cost(row: dict) -> float:
        return max(row["cost"], 1e-4) * 100

    for axes, what in zip(figure.subplots(1, 2), ("spearman", "recall"), strict=True):
        for group, style, colour in (("own", "o-", PALETTE[0]), ("other", "s--", PALETTE[1])):
            name = f"{group}_{what}"
            if sizes[0][name] is None:
                continue
            axes.plot([cost(r) for r in sizes], [r[name] for r in sizes], style, color=colour, label=f"{group} sources")
            if best is not None:
                axes.plot(cost(best), best[name], "k*", markersize=12, label="recommended" if group == "own" else None)
            axes.plot([cost(r) for r in single], [r[name] for r in single], "x", color="#666666")
        for row in single:
            axes.annotate(row["value"], (cost(row), row[f"own_{what}"]), fontsize=7)
        axes.set(xscale="log", xlabel="% of the dense FLOPs (free ones at 0.01)")
        axes.set_ylabel("Spearman correlation" if what == "spearman" else f"recall of the top {SHARE:.0%}")
        axes.legend()


def save(study: Study, output: Path) -> str:
    """Write `sweep.json`, `sweep.md` and `sweep.png` into `output`, and return the tables; earlier ones stay."""
    tolerance = study.setting["proxy"]["tolerance"]
    title = f"{study.setting['model']}: layers {', '.join(map(str, study.setting['layers']))}, medians"
    rows, relative = medians(study), medians(study, "relative")
    best = recommended(rows, tolerance)
    parts = [title, as_table(rows, best), "Spearman / recall by source:", by_source(study)]
    parts += ["The same for norms relative to the state's own (`ffn_selection: relative`):"]
    parts += [as_table(relative, recommended(relative, tolerance))]
    result = {"setting": study.setting, "rows": study.rows}
    tables.keep_earlier(output, tables.files("sweep"))
    return tables.save(result, "\n\n".join(parts), output, "sweep", lambda figure: draw(rows, best, title, figure))
