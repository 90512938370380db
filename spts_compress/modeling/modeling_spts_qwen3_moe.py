"""Qwen3 with experts and Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part of spts.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel

# Published checkpoints hold every expert's weights alone; transformers joins them, told so for each type of model.
JOINED = get_checkpoint_conversion_mapping("qwen3_moe")
register_checkpoint_conversion_mapping("spts_qwen3_moe", JOINED, overwrite=True)


class SptsQwen3MoeConfig(SptsConfigMixin, Qwen3MoeConfig):
    model_type = "spts_qwen3_moe"
    spts: dict | None = None


class SptsQwen3MoeDecoderLayer(SkippingDecoderLayer, modeling_qwen3_moe.Qwen3MoeDecoderLayer):
    rotate_half = staticmethod(modeling_qwen3_moe.rotate_half)
    eager_attention = staticmethod(modeling_qwen3_moe.eager_attention_forward)


class SptsQwen3MoeModel(SkippingModel, modeling_qwen3_moe.Qwen3MoeModel):
    config: SptsQwen3MoeConfig
    config_class = SptsQwen3MoeConfig
    layer_class = SptsQwen3MoeDecoderLayer
    output_class = MoeModelOutputWithPast
    _no_split_modules = ["Qwen3MoeDecoderLayer", "SptsQwen3MoeDecoderLayer"]


class SptsQwen3MoeForCausalLM(SkippingForCausalLM, modeling_qwen3_moe.Qwen3MoeForCausalLM):
    config: SptsQwen3MoeConfig
    config_class = SptsQwen3MoeConfig
    model_class = SptsQwen3MoeModel
    _no_split_modules = ["Qwen3MoeDecoderLayer", "SptsQwen3MoeDecoderLayer"]
