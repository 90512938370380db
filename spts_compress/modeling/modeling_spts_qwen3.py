"""Qwen3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsQwen3Config(SptsConfigMixin, Qwen3Config):
    model_type = "spts_qwen3"
    spts: dict | None = None


class SptsQwen3DecoderLayer(SkippingDecoderLayer, modeling_qwen3.Qwen3DecoderLayer):
    rotate_half = staticmethod(modeling_qwen3.rotate_half)
    eager_attention = staticmethod(modeling_qwen3.eager_attention_forward)


class SptsQwen3Model(SkippingModel, modeling_qwen3.Qwen3Model):
    config: SptsQwen3Config
    config_class = SptsQwen3Config
    layer_class = SptsQwen3DecoderLayer
    _no_split_modules = ["Qwen3DecoderLayer", "SptsQwen3DecoderLayer"]


class SptsQwen3ForCausalLM(SkippingForCausalLM, modeling_qwen3.Qwen3ForCausalLM):
    config: SptsQwen3Config
    config_class = SptsQwen3Config
    model_class = SptsQwen3Model
    _no_split_modules = ["Qwen3DecoderLayer", "SptsQwen3DecoderLayer"]
