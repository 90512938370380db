"""The proxy of one layer: candidates of several sizes are fitted, and the cheapest that ranks well enough is taken."""

from typing import Any

import torch

from ..cost import proxy_share
from ..modeling.configuration_spts import Proxy
from ..modeling.selection import FeedForwardProxy
from ..recipe import ProxySection
from . import metrics, refine
from .ltp import FeedForward, Regression, Tokens, blend, centre, log_error, low_rank, most_important, regress


def sizes(section: ProxySection, experts: bool = False) -> list[Proxy]:
    """Candidate sizes, cheapest first: the regression alone, a quarter of the recipe's size, and all of it. For experts
    the regression alone."""
    full = Proxy(section.channels, section.rank)
    if experts:
        return [Proxy(1, 0)]
    if not section.regression:
        return [full]
    small = Proxy(max(1, section.channels // 4), section.rank // 4)
    return [Proxy(1, 0), *([small] if small.rank else []), full]


def fit(
    ffn: FeedForward,
    size: Proxy,
    tokens: Tokens,
    check: Tokens,
    section: ProxySection,
    regressed: FeedForwardProxy | None,
    share: float,
) -> tuple[FeedForwardProxy, bool]:
    """A low-rank candidate: SVD, refined, blended with the regression. And whether refinement helped on `check`."""
    kept = most_important(ffn, tokens, size.channels, section.saliency_quantile)
    proxy = low_rank(ffn, kept, size.rank, tokens.unit if section.init == "weighted-svd" else None)
    centre(proxy, tokens)
    improved = False
    if section.steps:
        error: refine.Error = log_error
        loss: refine.Loss = refine.log_norm_loss
        if section.objective == "ranking":
            threshold = float(torch.quantile(check.log_norm, 1 - share))
            loss = refine.ranking_loss(threshold, max(log_error(proxy, check) ** 0.5, 1e-3))
        if section.objective == "representation":
            loss = refine.representation_loss(ffn, kept)
            error = refine.as_error(loss)
        improved = refine.refine(proxy, loss, tokens, check, section.steps, section.seed, error)
        centre(proxy, tokens)
    if regressed is not None:
        blend(proxy, regressed)
    return proxy, improved


def choose(
    ffn: FeedForward, tokens: Tokens, check: Tokens, section: ProxySection, share: float, relative: bool
) -> tuple[FeedForwardProxy, dict[str, Any]]:
    """The cheapest candidate whose recall of the true top `share` of `check` is at most `section.tolerance` below the
    best candidate's.

    Returns:
        The proxy, and what was tried: `candidates` (size, share of the dense network's operations, ranking of `check`),
        the number of the one `chosen`, and the `reason` in words.
    """
    regressed = regress(ffn, Regression(tokens.unit), tokens, check) if section.regression else None

    def rank(proxy: FeedForwardProxy) -> dict[str, float]:
        return metrics.of(metrics.norms(proxy, ffn, check), share, relative)["proxy"]

    made, rows = [], []
    for size in sizes(section, experts=not len(ffn.gate)):
        proxy, improved = regressed, False
        if proxy is None or size.rank:
            proxy, improved = fit(ffn, size, tokens, check, section, regressed, share)
        row = {"channels": size.channels if size.rank else 0, "rank": size.rank, "improved": improved}
        rows.append({**row, "cost": proxy_share(ffn.gate.shape[1], ffn.width, size), **rank(proxy)})
        made.append(proxy)
    best = max(row["recall"] for row in rows)
    number = next(i for i, row in enumerate(rows) if row["recall"] >= best - section.tolerance)
    chosen = rows[number]
    reason = f"recall {chosen['recall']:.3f}, best {best:.3f}"
    if chosen["rank"] and section.steps and not chosen["improved"]:
        reason += "; refinement did not help"
    return made[number], {"candidates": rows, "chosen": number, "reason": reason}
