"""Mixtral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the family's part; the method is in spts.py."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from .configuration_spts import SptsConfigMixin
from .spts import SkippingDecoderLayer, SkippingForCausalLM, SkippingModel

# Published checkpoints hold every expert's weights alone; transformers joins them, told so for each type of model.
JOINED = get_checkpoint_conversion_mapping("mixtral")
register_checkpoint_conversion_mapping("spts_mixtral", JOINED, overwrite=True)


class SptsMixtralConfig(SptsConfigMixin, MixtralConfig):
    model_type = "spts_mixtral"
    spts: dict | None = None


class SptsMixtralDecoderLayer(SkippingDecoderLayer, modeling_mixtral.MixtralDecoderLayer):
    rotate_half = staticmethod(modeling_mixtral.rotate_half)
    eager_attention = staticmethod(modeling_mixtral.eager_attention_forward)


class SptsMixtralModel(SkippingModel, modeling_mixtral.MixtralModel):
    config: SptsMixtralConfig
    config_class = SptsMixtralConfig
    layer_class = SptsMixtralDecoderLayer
    output_class = MoeModelOutputWithPast
    _no_split_modules = ["MixtralDecoderLayer", "SptsMixtralDecoderLayer"]


class SptsMixtralForCausalLM(SkippingForCausalLM, modeling_mixtral.MixtralForCausalLM):
    config: SptsMixtralConfig
    config_class = SptsMixtralConfig
    model_class = SptsMixtralModel
    _no_split_modules = ["MixtralDecoderLayer", "SptsMixtralDecoderLayer"]
