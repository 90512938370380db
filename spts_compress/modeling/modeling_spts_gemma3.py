"""Gemma 3 (text) with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.gemma3 import modeling_gemma3

from .family_classes import skipping_classes
from .stock_layer import Norms
from .windows import WindowedDecoderLayer, WindowedModel


class Gemma3DecoderLayer(WindowedDecoderLayer):
    norms = Norms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )


SptsGemma3Config, SptsGemma3DecoderLayer, SptsGemma3Model, SptsGemma3ForCausalLM = skipping_classes(
    __name__, "Gemma3", modeling_gemma3, text="Text", layer=Gemma3DecoderLayer, model=WindowedModel
)
