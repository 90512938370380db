"""The proxy of one layer: candidates of several sizes are fitted, and the cheapest that ranks well enough is taken."""

from typing import Any

import torch

from ..cost import proxy_flop_fraction
from ..modeling.configuration_spts import Proxy
from ..modeling.selection import FeedForwardProxy
from ..recipe import ProxySection
from . import metrics, refine
from .ltp import FeedForward, Tokens, centre, fit_ridge, geometric_mean, log_error, low_rank, most_important


def sizes(full: Proxy, regression: bool) -> list[Proxy]:
    """Candidate sizes, cheapest first: the regression alone, a quarter of the size `full`, and all of it."""
    if not full.rank:
        return [Proxy(1, 0)]
    if not regression:
        return [full]
    small = Proxy(max(1, full.channels // 4), full.rank // 4)
    return [Proxy(1, 0), *([small] if small.rank else []), full]


def fit(
    ffn: FeedForward,
    size: Proxy,
    tokens: Tokens,
    check: Tokens,
    section: ProxySection,
    ridge: FeedForwardProxy | None,
    share: float,
) -> tuple[FeedForwardProxy, bool]:
    """A low-rank candidate: SVD, refined, in the geometric mean with the regression `ridge`. And whether refinement
    helped on `check`."""
    channels = most_important(ffn, tokens, size.channels, section.saliency_quantile)
    proxy = low_rank(ffn, channels, size.rank, tokens.unit if section.init == "weighted-svd" else None)
    centre(proxy, tokens)
    improved = False
    if section.steps:
        loss: refine.Loss = refine.log_norm_loss
        if section.objective == "ranking":
            threshold = float(torch.quantile(check.log_norm, 1 - share))
            loss = refine.ranking_loss(threshold, max(log_error(proxy, check) ** 0.5, 1e-3))
        if section.objective == "representation":
            loss = refine.representation_loss(ffn, channels)
        error = loss if section.objective == "representation" else log_error
        improved = refine.refine(proxy, loss, tokens, check, section.steps, section.seed, error)
        centre(proxy, tokens)
    if ridge is not None:
        geometric_mean(proxy, ridge)
    return proxy, improved


def choose(
    ffn: FeedForward, full: Proxy, tokens: Tokens, check: Tokens, section: ProxySection, share: float, relative: bool
) -> tuple[FeedForwardProxy, dict[str, Any]]:
    """The cheapest candidate of size `full` or less whose recall of the true top `share` of `check` is at most
    `section.tolerance` below the best candidate's.

    Returns:
        The proxy, and what was tried: `candidates` (size, `cost` as a fraction of the dense network's FLOPs, ranking of
        `check`), the number of the one `chosen`, and the `reason` in words.
    """
    wanted = section.regression or not full.rank
    ridge = fit_ridge(ffn, tokens, check) if wanted else None
    proxies, rows = [], []
    for size in sizes(full, section.regression):
        proxy, improved = ridge, False
        if proxy is None or size.rank:
            proxy, improved = fit(ffn, size, tokens, check, section, ridge, share)
        ranking = metrics.fidelity(metrics.norms(proxy, ffn, check), share, relative)["proxy"]
        row = {"channels": size.channels if size.rank else 0, "rank": size.rank, "improved": improved}
        rows.append({**row, "cost": proxy_flop_fraction(ffn.gate.shape[1], ffn.width, size), **ranking})
        proxies.append(proxy)
    best = max(row["recall"] for row in rows)
    number = next(i for i, row in enumerate(rows) if row["recall"] >= best - section.tolerance)
    chosen = rows[number]
    reason = f"recall {chosen['recall']:.3f}, best {best:.3f}"
    if chosen["rank"] and section.steps and not chosen["improved"]:
        reason += "; refinement did not help"
    return proxies[number], {"candidates": rows, "chosen": number, "reason": reason}
