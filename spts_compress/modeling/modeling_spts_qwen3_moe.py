"""Qwen3 with experts with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.qwen3_moe import modeling_qwen3_moe

from .family_classes import skipping_classes
from .windows import WindowedDecoderLayer, WindowedModel

SptsQwen3MoeConfig, SptsQwen3MoeDecoderLayer, SptsQwen3MoeModel, SptsQwen3MoeForCausalLM = skipping_classes(
    __name__, "Qwen3Moe", modeling_qwen3_moe, layer=WindowedDecoderLayer, experts=True, model=WindowedModel
)
