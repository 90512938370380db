"""Qwen2 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.qwen2 import modeling_qwen2

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsQwen2Config, SptsQwen2DecoderLayer, SptsQwen2Model, SptsQwen2ForCausalLM = skipping_classes(
    __name__, "Qwen2", modeling_qwen2, layer=WindowedDecoderLayer, model=WindowedModel
)
