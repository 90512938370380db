"""Ministral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part of spts.py."""

from transformers.models.ministral import modeling_ministral
from transformers.models.ministral.configuration_ministral import MinistralConfig

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsMinistralConfig(SptsConfigMixin, MinistralConfig):
    model_type = "spts_ministral"
    spts: dict | None = None


class SptsMinistralDecoderLayer(SkippingDecoderLayer, modeling_ministral.MinistralDecoderLayer):
    rotate_half = staticmethod(modeling_ministral.rotate_half)
    eager_attention = staticmethod(modeling_ministral.eager_attention_forward)


class SptsMinistralModel(SkippingModel, modeling_ministral.MinistralModel):
    config: SptsMinistralConfig
    config_class = SptsMinistralConfig
    layer_class = SptsMinistralDecoderLayer
    _no_split_modules = ["MinistralDecoderLayer", "SptsMinistralDecoderLayer"]


class SptsMinistralForCausalLM(SkippingForCausalLM, modeling_ministral.MinistralForCausalLM):
    config: SptsMinistralConfig
    config_class = SptsMinistralConfig
    model_class = SptsMinistralModel
    _no_split_modules = ["MinistralDecoderLayer", "SptsMinistralDecoderLayer"]
