"""OLMo 2 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

import torch
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from .configuration_spts import SptsConfigMixin
from .spts import Norms, SkippingDecoderLayer, SkippingForCausalLM, SkippingModel, split_heads


class SptsOlmo2Config(SptsConfigMixin, Olmo2Config):
    model_type = "spts_olmo2"
    spts: dict | None = None


class SptsOlmo2DecoderLayer(SkippingDecoderLayer, modeling_olmo2.Olmo2DecoderLayer):
    rotate_half = staticmethod(modeling_olmo2.rotate_half)
    eager_attention = staticmethod(modeling_olmo2.eager_attention_forward)
    norms = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries and keys are normed, all heads together."""
        projected = getattr(self.self_attn, f"{name}_proj")(states)
        if name != "v":
            projected = getattr(self.self_attn, f"{name}_norm")(projected)
        return split_heads(projected, self.self_attn.head_dim)


class SptsOlmo2Model(SkippingModel, modeling_olmo2.Olmo2Model):
    config: SptsOlmo2Config
    config_class = SptsOlmo2Config
    layer_class = SptsOlmo2DecoderLayer
    _no_split_modules = ["Olmo2DecoderLayer", "SptsOlmo2DecoderLayer"]


class SptsOlmo2ForCausalLM(SkippingForCausalLM, modeling_olmo2.Olmo2ForCausalLM):
    config: SptsOlmo2Config
    config_class = SptsOlmo2Config
    model_class = SptsOlmo2Model
    _no_split_modules = ["Olmo2DecoderLayer", "SptsOlmo2DecoderLayer"]
