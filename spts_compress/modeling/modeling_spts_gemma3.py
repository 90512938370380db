"""Gemma 3 (text) with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part of spts.py."""

from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

from .configuration_spts import SptsConfigMixin
from .spts import Norms, SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsGemma3Config(SptsConfigMixin, Gemma3TextConfig):
    model_type = "spts_gemma3_text"
    spts: dict | None = None


class SptsGemma3DecoderLayer(SkippingDecoderLayer, modeling_gemma3.Gemma3DecoderLayer):
    rotate_half = staticmethod(modeling_gemma3.rotate_half)
    eager_attention = staticmethod(modeling_gemma3.eager_attention_forward)
    norms = Norms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )


class SptsGemma3Model(SkippingModel, modeling_gemma3.Gemma3TextModel):
    config: SptsGemma3Config
    config_class = SptsGemma3Config
    layer_class = SptsGemma3DecoderLayer
    _no_split_modules = ["Gemma3DecoderLayer", "SptsGemma3DecoderLayer"]


class SptsGemma3ForCausalLM(SkippingForCausalLM, modeling_gemma3.Gemma3ForCausalLM):
    config: SptsGemma3Config
    config_class = SptsGemma3Config
    model_class = SptsGemma3Model
    _no_split_modules = ["Gemma3DecoderLayer", "SptsGemma3DecoderLayer"]
