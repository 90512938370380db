"""Mixtral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.mixtral import modeling_mixtral

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsMixtralConfig, SptsMixtralDecoderLayer, SptsMixtralModel, SptsMixtralForCausalLM = skipping_classes(
    __name__, "Mixtral", modeling_mixtral, layer=WindowedDecoderLayer, experts=True, model=WindowedModel
)
