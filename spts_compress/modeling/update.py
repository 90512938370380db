"""Fitted maps: what a layer would add to a token that it skips, and what its probing queries are corrected by."""

import torch
from torch import nn
from torch.nn.functional import linear

UPDATES = ("attention_update", "ffn_update")  # names in a layer
QUERIES = "probe_update"


class LowRankUpdate(nn.Module):
    """`b + V U x`: an estimate (B, T, D) of what a layer's attention, or its feed-forward network, adds to residual
    states, from that part's own input `x` (B, T, D): the normed states, or the states themselves where the family has
    no norm before. What a norm after the part does is in the estimate. Or what is added to the normed states of the
    last tokens where they ask which candidates matter.

    `bias` (D) is `b`, `down` (r, D) is `U` and `up` (D, r) is `V`: 4 r D FLOPs a token. With rank 0
    there is the bias alone, one estimate (1, 1, D) for all tokens.
    """

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.rank = rank
        self.bias = nn.Parameter(torch.empty(hidden_size))
        if rank:
            self.down = nn.Parameter(torch.empty(rank, hidden_size))
            self.up = nn.Parameter(torch.empty(hidden_size, rank))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        if not self.rank:
            return self.bias.clone()[None, None]
        return linear(linear(normed, self.down), self.up, self.bias)
