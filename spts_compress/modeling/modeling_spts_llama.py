"""Llama with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel


class SptsLlamaConfig(SptsConfigMixin, LlamaConfig):
    model_type = "spts_llama"
    spts: dict | None = None


class SptsLlamaDecoderLayer(SkippingDecoderLayer, modeling_llama.LlamaDecoderLayer):
    rotate_half = staticmethod(modeling_llama.rotate_half)
    eager_attention = staticmethod(modeling_llama.eager_attention_forward)


class SptsLlamaModel(SkippingModel, modeling_llama.LlamaModel):
    config: SptsLlamaConfig
    config_class = SptsLlamaConfig
    layer_class = SptsLlamaDecoderLayer
    _no_split_modules = ["LlamaDecoderLayer", "SptsLlamaDecoderLayer"]


class SptsLlamaForCausalLM(SkippingForCausalLM, modeling_llama.LlamaForCausalLM):
    config: SptsLlamaConfig
    config_class = SptsLlamaConfig
    model_class = SptsLlamaModel
    _no_split_modules = ["LlamaDecoderLayer", "SptsLlamaDecoderLayer"]
