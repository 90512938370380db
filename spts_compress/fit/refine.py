"""Refinement of a proxy: gradient steps that lessen the discrepancy between what it predicts and what the feed-forward
network does, with the base weights frozen (the objective of the paper's Eq. 7, which the paper does not optimise)."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..modeling.selection import FeedForwardProxy
from .descent import Pace, descend
from .ltp import FeedForward, Tokens, log_error

BATCH = 1024  # tokens
RATE = 0.03  # Adam's step, in units of each parameter's own root mean square
CHECKS = 8  # times the unseen tokens are looked at
WARM_UP = 30  # steps

Loss = Callable[[FeedForwardProxy, Tokens], torch.Tensor]


def log_norm_loss(proxy: FeedForwardProxy, tokens: Tokens) -> torch.Tensor:
    """Mean squared error of the log norm."""
    return (proxy(tokens.unit).log() - tokens.log_norm).square().mean()


def ranking_loss(threshold: float, width: float) -> Loss:
    """Log-norm error plus the cost of tokens on the wrong side of `threshold` (a log norm), `width` being how far from
    it a token counts as undecided."""

    def loss(proxy: FeedForwardProxy, tokens: Tokens) -> torch.Tensor:
        predicted = proxy(tokens.unit).log()
        above = (tokens.log_norm > threshold).float()
        wrong = torch.nn.functional.binary_cross_entropy_with_logits((predicted - threshold) / width, above)
        return (predicted - tokens.log_norm).square().mean() + width**2 * wrong

    return loss


def representation_loss(ffn: FeedForward, channels: torch.Tensor) -> Loss:
    """Error of `f(x)` against the activations of the `channels` (D_low), relative to their size."""
    gate, up = ffn.gate[channels], ffn.up[channels]

    def loss(proxy: FeedForwardProxy, tokens: Tokens) -> torch.Tensor:
        low_gate, low_up = torch.nn.functional.linear(tokens.unit, proxy.down[:-1]).chunk(2, dim=-1)
        predicted = proxy.activation(low_gate @ proxy.gate.T) * (low_up @ proxy.up.T)
        true = proxy.activation(tokens.unit @ gate.T) * (tokens.unit @ up.T)
        return (predicted - true).square().sum() / true.square().sum()

    return loss


def refine(
    proxy: FeedForwardProxy,
    loss: Loss,
    tokens: Tokens,
    check: Tokens,
    steps: int,
    seed: int,
    error: Callable[[FeedForwardProxy, Tokens], Any] = log_error,
) -> bool:
    """Take `steps` of Adam on `loss`, with a cosine schedule; the state that is best on `check` is kept.

    Args:
        tokens: to fit on. `check`: to stop on; nothing else may be judged by them.
        error: what is least at the best state.

    Returns:
        Whether any state was better than the one it began with.
    """

    @torch.no_grad()
    def unseen() -> float:
        return float(error(proxy, check))

    generator = torch.Generator().manual_seed(seed)

    def batch_loss(step: int) -> torch.Tensor:
        batch = torch.randint(len(tokens), (BATCH,), generator=generator).to(tokens.unit.device)
        return loss(proxy, tokens[batch])

    before, pace = unseen(), Pace(RATE, decay=0.98, warm_up=WARM_UP, checks=CHECKS, clip=math.inf)
    return descend([*proxy.parameters()], steps, pace, batch_loss, unseen, before) < before
