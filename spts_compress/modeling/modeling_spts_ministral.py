"""Ministral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.ministral import modeling_ministral

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsMinistralConfig, SptsMinistralDecoderLayer, SptsMinistralModel, SptsMinistralForCausalLM = skipping_classes(
    __name__, "Ministral", modeling_ministral, layer=WindowedDecoderLayer, model=WindowedModel
)
