"""Phi3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

import torch
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.configuration_phi3 import Phi3Config

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel, linear_rows, split_heads


class SptsPhi3Config(SptsConfigMixin, Phi3Config):
    model_type = "spts_phi3"
    spts: dict | None = None


class SptsPhi3DecoderLayer(SkippingDecoderLayer, modeling_phi3.Phi3DecoderLayer):
    rotate_half = staticmethod(modeling_phi3.rotate_half)
    eager_attention = staticmethod(modeling_phi3.eager_attention_forward)

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values come from one matrix, of which only the rows asked for are used."""
        attention = self.self_attn
        queries = attention.o_proj.in_features
        keys = (attention.qkv_proj.out_features - queries) // 2
        rows = {"q": slice(queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}[name]
        return split_heads(linear_rows(attention.qkv_proj, states, rows), attention.head_dim)


class SptsPhi3Model(SkippingModel, modeling_phi3.Phi3Model):
    config: SptsPhi3Config
    config_class = SptsPhi3Config
    layer_class = SptsPhi3DecoderLayer
    _no_split_modules = ["Phi3DecoderLayer", "SptsPhi3DecoderLayer"]


class SptsPhi3ForCausalLM(SkippingForCausalLM, modeling_phi3.Phi3ForCausalLM):
    config: SptsPhi3Config
    config_class = SptsPhi3Config
    model_class = SptsPhi3Model
    _no_split_modules = ["Phi3DecoderLayer", "SptsPhi3DecoderLayer"]
