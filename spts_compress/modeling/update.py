"""Fitted maps: what a layer would add to a token that it skips, and what its probing queries are corrected by."""

import torch
from torch import nn
from torch.nn.functional import linear

UPDATES = ("attention_update", "ffn_update")  # names in a layer
QUERIES = "probe_update"


class LowRankUpdate(nn.Module):
    """`y + b + V U x`: residual states `y` (B, T, D) with an estimate of what a layer's attention, or its feed-forward
    network, adds to them, from that part's own input `x` (B, T, D): the normed states, or the states themselves where
    the family has no norm before. What a norm after the part does is in the estimate. Or, where the last tokens ask
    which candidates matter, their normed states, `y` and `x` alike, with what is added there.

    `bias` (D) is `b`, `down` (r, D) is `U` and `up` (D, r) is `V`: 4 r D FLOPs a token. With rank 0
    there is the bias alone.
    """

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.rank = rank
        self.bias = nn.Parameter(torch.empty(hidden_size))
        if rank:
            self.down = nn.Parameter(torch.empty(rank, hidden_size))
            self.up = nn.Parameter(torch.empty(hidden_size, rank))

    def forward(self, normed: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if not self.rank:
            return states + self.bias.to(states.dtype)
        low = nn.functional.pad(linear(normed, self.down), (0, 1), value=1.0)
        up = torch.cat([self.up, self.bias[:, None]], dim=1)  # one product, which reads and writes the states once
        low, up = (part.flatten(0, -2).to(states.dtype) for part in (low, up))
        return torch.addmm(states.flatten(0, 1), low, up.T).view_as(states)
