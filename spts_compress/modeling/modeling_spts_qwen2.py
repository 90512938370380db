"""Qwen2 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsQwen2Config(SptsConfigMixin, Qwen2Config):
    model_type = "spts_qwen2"
    spts: dict | None = None


class SptsQwen2DecoderLayer(SkippingDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    rotate_half = staticmethod(modeling_qwen2.rotate_half)
    eager_attention = staticmethod(modeling_qwen2.eager_attention_forward)


class SptsQwen2Model(SkippingModel, modeling_qwen2.Qwen2Model):
    config: SptsQwen2Config
    config_class = SptsQwen2Config
    layer_class = SptsQwen2DecoderLayer
    _no_split_modules = ["Qwen2DecoderLayer", "SptsQwen2DecoderLayer"]


class SptsQwen2ForCausalLM(SkippingForCausalLM, modeling_qwen2.Qwen2ForCausalLM):
    config: SptsQwen2Config
    config_class = SptsQwen2Config
    model_class = SptsQwen2Model
    _no_split_modules = ["Qwen2DecoderLayer", "SptsQwen2DecoderLayer"]
