"""Mistral with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.mistral import modeling_mistral

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsMistralConfig, SptsMistralDecoderLayer, SptsMistralModel, SptsMistralForCausalLM = skipping_classes(
    __name__, "Mistral", modeling_mistral, layer=WindowedDecoderLayer, model=WindowedModel
)
