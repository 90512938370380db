"""Phi3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from typing import Any

import torch
from torch.nn.functional import linear
from transformers.models.phi3 import modeling_phi3

from .family_classes import skipping_classes
from .stock_layer import is_plain, split_heads
from .windows import WindowedDecoderLayer, WindowedModel


class Phi3DecoderLayer(WindowedDecoderLayer):
    def whole(self, states: torch.Tensor, **given: Any) -> torch.Tensor:
        """Not in steps where the projection is not plain, which then would be called three times."""
        return (super().whole if is_plain(self.self_attn.qkv_proj) else super().forward)(states, **given)

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values come from one matrix, of which only the rows asked for are used if it is plain."""
        attention, made = self.self_attn, self.self_attn.qkv_proj
        queries = attention.o_proj.in_features
        keys = (made.out_features - queries) // 2
        rows = {"q": slice(queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}[name]
        if is_plain(made):
            some = linear(states, made.weight[rows], None if made.bias is None else made.bias[rows])
        else:
            some = made(states)[..., rows]
        return split_heads(some, attention.head_dim)


SptsPhi3Config, SptsPhi3DecoderLayer, SptsPhi3Model, SptsPhi3ForCausalLM = skipping_classes(
    __name__, "Phi3", modeling_phi3, layer=Phi3DecoderLayer, model=WindowedModel
)
