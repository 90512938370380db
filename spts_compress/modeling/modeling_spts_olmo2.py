"""OLMo 2 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

import torch
from transformers.models.olmo2 import modeling_olmo2

from .family_classes import skipping_classes
from .skipping import SkippingDecoderLayer
from .stock_layer import Norms, split_heads


class Olmo2DecoderLayer(SkippingDecoderLayer):
    norms = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries and keys are normed, all heads together."""
        projected = getattr(self.self_attn, f"{name}_proj")(states)
        if name != "v":
            projected = getattr(self.self_attn, f"{name}_norm")(projected)
        return split_heads(projected, self.self_attn.head_dim)


SptsOlmo2Config, SptsOlmo2DecoderLayer, SptsOlmo2Model, SptsOlmo2ForCausalLM = skipping_classes(
    __name__, "Olmo2", modeling_olmo2, layer=Olmo2DecoderLayer
)
