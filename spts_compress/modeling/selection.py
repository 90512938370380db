"""Which tokens: scores from attention (PAP) and from proxies of the feed-forward network (LTP), and the choice by them.

Shapes: B rows, T candidates, M chosen ones, H heads, G key/value heads, d head size, D hidden size, w probing queries.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN


def probe_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each head's last queries pay to every candidate, their mean (PAP).

    Args:
        query: rotated queries of the last w candidates, (B, H, w, d).
        key: rotated keys of all candidates, (B, G, T, d).
        scaling: factor of the attention logits.
        valid: which candidates are not padding, (B, T); None if all are.
        unseen: which candidates are outside the window of which query, (B or 1, w, T); None if there is no window.
        heads: numbers of those wanted, in place of all H.

    Returns:
        Scores (B, H, T) in float32, zero on padding and outside all windows.
    """
    if heads is not None:
        size = query.shape[1] // key.shape[1]
        query = query.index_select(1, heads)
        key = key.index_select(1, heads // size) if key.shape[1] > 1 else key
    batch, num_heads, window, _ = query.shape
    groups, candidates = key.shape[1:3]
    if groups > 1 and key.device.type == "cpu":  # group by group, so that the logits stay in its cache
        parts = zip(query.chunk(groups, dim=1), key.chunk(groups, dim=1), strict=True)
        return torch.cat([probe_scores(*part, scaling, valid, unseen) for part in parts], dim=1)
    grouped = query.float().reshape(batch, groups, num_heads // groups * window, -1) * scaling
    with torch.autocast(key.device.type, enabled=False):  # scores decide, so they stay in float32
        logits = torch.matmul(grouped, key.float().transpose(2, 3)).view(batch, num_heads, window, candidates)
    if window > 1:  # each query sees the tokens up to itself
        future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
        logits[..., -window:].masked_fill_(future, float("-inf"))
    if unseen is not None:
        logits.masked_fill_(unseen[:, None], float("-inf"))
    if valid is None:
        return torch.softmax(logits, dim=-1).mean(dim=2)
    logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
    real = valid[:, None, -window:, None]
    return (torch.softmax(logits, dim=-1) * real).sum(dim=2) / real.sum(dim=2) * valid[:, None]


def reduce_heads(raw: torch.Tensor, heads: str | torch.Tensor) -> torch.Tensor:
    """The "mean" or "max" (B, T) of all heads' scores (B, H, T), or the mean of those whose numbers `heads` holds."""
    if not isinstance(heads, str):
        raw = raw.index_select(1, heads)
    return raw.amax(dim=1) if heads == "max" else raw.mean(dim=1)


def pool_scores(raw: torch.Tensor, width: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The largest score among `width` neighbouring candidates, (B, T); zero on padding."""
    if width == 1:
        return raw
    pooled = nn.functional.max_pool1d(raw[:, None], width, stride=1, padding=width // 2)[:, 0]
    return pooled if valid is None else pooled * valid


def ranked(
    score: torch.Tensor,
    tie: torch.Tensor,
    first: int = 0,
    last: int = 0,
    rows: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices (B, T) of the candidates of each row, the highest score last; before all others padding.

    Equal scores are decided by `tie`, then by the later position, so that the result is the same on every device.

    Args:
        score: what to rank by, (B, T) float32, not negative.
        tie: decides between equal scores, (B, T) float32, not negative.
        first, last: how many tokens at a row's begin and end rank above all others.
        rows: tokens of each row, (B, 1), which has its padding on the left; None if there is no padding.
        valid: which candidates are not padding, (B, T); None if all are.
    """
    # The bits of a non-negative float32 sort like the number itself, so two are one 64-bit key, its lower half first.
    key = torch.stack([tie.float(), score.float()], dim=-1).view(torch.int64).squeeze(-1)
    above, width = torch.iinfo(key.dtype).max, key.shape[1]
    key[:, width - last :].fill_(above)
    if rows is None:
        key[:, :first].fill_(above)
    else:
        key.masked_fill_(torch.arange(width, device=key.device) < width - rows + first, above)
    if valid is not None:
        key.masked_fill_(~valid, -1)
    return key.sort(dim=1, stable=True).indices


def select(order: torch.Tensor, width: int, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Indices (B, `width`) of the last candidates of an `order` (B, T), in their original order. Where rows select
    unequally many, `counts` (B, 1), shorter rows are padded with 0 on the left. Nothing here waits for the device."""
    chosen = order[:, order.shape[1] - width :]
    if counts is None:
        return chosen.sort(dim=1).values
    unused = torch.arange(width, device=order.device) < width - counts
    return chosen.masked_fill(unused, -1).sort(dim=1).values.clamp_min(0)


def gather_tokens(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Gather along dimension 1: (B or 1, T, ...) and (B, M) give (B, M, ...); None: all of them."""
    if index is None:
        return states
    if index.shape[0] == 1:
        return states.index_select(1, index[0])
    if states.shape[0] == 1:
        return states[0][index]
    return states[torch.arange(index.shape[0], device=index.device)[:, None], index]


def gather_among(
    held: tuple[torch.Tensor, ...], index: torch.Tensor | None, fewer: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """From tensors (B, heads, K, .) of the tokens at `index` (B, K; None: all), those of `fewer` of them (B, M)."""
    if index is not None and fewer is not None:  # both rise, and their unused slots hold the same token
        fewer = torch.searchsorted(index.contiguous(), fewer.contiguous())
    return tuple(gather_tokens(part.transpose(1, 2), fewer).transpose(1, 2) for part in held)


def scatter_tokens(
    states: torch.Tensor, index: torch.Tensor, update: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """`states[b, index[b]] = update[b]` for all valid slots; in place if no gradient runs."""
    if torch.is_grad_enabled() and (states.requires_grad or update.requires_grad):
        states = states.clone()
    if valid is not None:  # unused slots hold index 0, which may be a real token: they repeat the last one, which is
        index = torch.where(valid, index, index[:, -1:])
        update = torch.where(valid[..., None], update, update[:, -1:].detach())
    if index.shape[0] == 1:
        states.index_copy_(1, index[0], update)
    else:
        states[torch.arange(index.shape[0], device=index.device)[:, None], index] = update
    return states


class FeedForwardProxy(nn.Module):
    """Low-rank Transformation Probing (LTP): predicts `||FFN(norm(x))||` from the residual state `x`.

    With `x' = x / rms(x)` the prediction is `exp(x' a + (x' * x') b + c) ||f(x)||^p`, where
    `f(x) = act(x' U_g V_g) * (x' U_u V_u)` has the width D_low, as in the paper, and the rest is a regression's.
    `U_g`, `U_u` of rank r and `a` (D) are one matrix, `down`; `square` (D) is `b`, `constants` are c and p. They hold
    the norm's weight too, so that candidates need not be normalised one by one. 4 r (D + D_low) + 7 D FLOPs a
    token; with rank 0 only the regression is left.
    """

    def __init__(self, hidden_size: int, channels: int, rank: int, activation: str, eps: float):
        super().__init__()
        self.eps, self.rank = eps, rank
        self.down = nn.Parameter(torch.empty(2 * rank + 1, hidden_size))
        self.square = nn.Parameter(torch.empty(hidden_size))
        self.constants = nn.Parameter(torch.empty(2))
        if rank:
            self.gate = nn.Parameter(torch.empty(channels, rank))
            self.up = nn.Parameter(torch.empty(channels, rank))
        self.activation = ACT2FN[activation]

    def forward(self, states: torch.Tensor, relative: bool = False) -> torch.Tensor:
        """Predicted norms in float32, (B, T), of residual states (B, T, D) before the feed-forward norm;
        `relative`: divided by the root mean square of the state itself."""
        unit = nn.functional.rms_norm(states, states.shape[-1:], eps=self.eps)
        low = nn.functional.linear(unit, self.down)
        squared = nn.functional.linear(unit.square(), self.square[None], self.constants[:1])[..., 0]
        precise = torch.promote_types(states.dtype, torch.float32)
        norm = torch.exp(low[..., -1].to(precise) + squared)
        if self.rank:
            gate, up = low[..., :-1].chunk(2, dim=-1)
            product = self.activation(nn.functional.linear(gate, self.gate)) * nn.functional.linear(up, self.up)
            norm = norm * torch.linalg.vector_norm(product, dim=-1, dtype=precise) ** self.constants[1].to(precise)
        if relative:
            mean = torch.linalg.vector_norm(states, dim=-1, dtype=precise).square() / states.shape[-1]
            norm = norm * torch.rsqrt(mean + self.eps)
        return norm.float().nan_to_num()  # a prediction out of range must not outrank the always active tokens
