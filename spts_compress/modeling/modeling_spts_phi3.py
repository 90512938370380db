"""Phi3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from typing import Any

import torch
from torch import nn
from transformers.models.phi3 import modeling_phi3

from .family_classes import skipping_classes
from .stock_layer import is_plain, split_heads
from .windows import WindowedDecoderLayer, WindowedModel


def linear_rows(module: Any, states: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some `rows` of what a linear module makes of states (B, T, D), without the others where the module is plain."""
    if not is_plain(module):
        return module(states)[..., rows]
    return nn.functional.linear(states, module.weight[rows], None if module.bias is None else module.bias[rows])


class Phi3DecoderLayer(WindowedDecoderLayer):
    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values come from one matrix, of which only the rows asked for are used."""
        attention = self.self_attn
        queries = attention.o_proj.in_features
        keys = (attention.qkv_proj.out_features - queries) // 2
        rows = {"q": slice(queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}[name]
        return split_heads(linear_rows(attention.qkv_proj, states, rows), attention.head_dim)


SptsPhi3Config, SptsPhi3DecoderLayer, SptsPhi3Model, SptsPhi3ForCausalLM = skipping_classes(
    __name__, "Phi3", modeling_phi3, layer=Phi3DecoderLayer, model=WindowedModel
)
