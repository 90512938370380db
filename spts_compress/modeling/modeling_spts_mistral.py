"""Mistral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.configuration_mistral import MistralConfig

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsMistralConfig(SptsConfigMixin, MistralConfig):
    model_type = "spts_mistral"
    spts: dict | None = None


class SptsMistralDecoderLayer(SkippingDecoderLayer, modeling_mistral.MistralDecoderLayer):
    rotate_half = staticmethod(modeling_mistral.rotate_half)
    eager_attention = staticmethod(modeling_mistral.eager_attention_forward)


class SptsMistralModel(SkippingModel, modeling_mistral.MistralModel):
    config: SptsMistralConfig
    config_class = SptsMistralConfig
    layer_class = SptsMistralDecoderLayer
    _no_split_modules = ["MistralDecoderLayer", "SptsMistralDecoderLayer"]


class SptsMistralForCausalLM(SkippingForCausalLM, modeling_mistral.MistralForCausalLM):
    config: SptsMistralConfig
    config_class = SptsMistralConfig
    model_class = SptsMistralModel
    _no_split_modules = ["MistralDecoderLayer", "SptsMistralDecoderLayer"]
