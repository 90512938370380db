"""Qwen3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.qwen3 import modeling_qwen3

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsQwen3Config, SptsQwen3DecoderLayer, SptsQwen3Model, SptsQwen3ForCausalLM = skipping_classes(
    __name__, "Qwen3", modeling_qwen3, layer=WindowedDecoderLayer, model=WindowedModel
)
