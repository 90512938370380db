"""DeepSeek V2 and V3 with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): the families' part; the method is in
skipping.py.

Their attention is multi-head latent attention: of a token the stock layers cache one latent of R numbers, out of which
`kv_b_proj` makes keys and values of all heads, and one key of r rotated numbers that all heads share.
"""

from typing import Any

import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from .family_classes import skipping_classes
from .skipping import SkippingDecoderLayer, SkippingModel
from .stock_layer import is_plain, rms_norm, split_heads


class LatentDecoderLayer(SkippingDecoderLayer):
    """Multi-head latent attention: candidates are scored by their latents, and only active ones get keys and values."""

    by_heads = "kv_b_proj"
    self_attn: Any

    def keys(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Latents and rotated keys, as one key head: (B, 1, T, R + r)."""
        attention = self.self_attn
        made = attention.kv_a_proj_with_mqa(normed)
        latent, key = made.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1)
        latent = rms_norm(attention.kv_a_layernorm, latent)
        return torch.cat([latent.unsqueeze(1), self.rotate(key.unsqueeze(1), *cos_sin)], dim=-1)

    def query_parts(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Parts of the queries without positions, (B, H, T, d - r), and with them, (B, H, T, r)."""
        attention = self.self_attn
        if attention.q_lora_rank is None:
            made = attention.q_proj(normed)
        else:
            made = attention.q_b_proj(rms_norm(attention.q_a_layernorm, attention.q_a_proj(normed)))
        heads = split_heads(made, attention.qk_head_dim)
        still, turning = heads.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], dim=-1)
        return still, self.rotate(turning, *cos_sin)

    def probes(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, w, R + r) for the latents themselves: the matrix that would make a head's keys of them is
        applied to its few queries instead, which gives the same products. In float32, as all of scoring."""
        attention = self.self_attn
        still, turned = self.query_parts(normed, *cos_sin)
        if is_plain(attention.kv_b_proj):
            weight = attention.kv_b_proj.weight
        else:  # what the module, whatever it is, makes of the unit vectors; a bias, alike for all tokens, cancels out
            unit = torch.eye(attention.kv_lora_rank, dtype=still.dtype, device=still.device)
            made, opposite = attention.kv_b_proj(torch.cat([unit, -unit])).chunk(2)
            weight = ((made - opposite) / 2).T
        heads = weight.unflatten(0, (-1, attention.qk_nope_head_dim + attention.v_head_dim))
        with torch.autocast(still.device.type, enabled=False):
            moved = torch.matmul(still.float(), heads[:, : attention.qk_nope_head_dim].float())
        return torch.cat([moved, turned.float()], dim=-1)

    def queries(self, normed: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.query_parts(normed, *cos_sin), dim=-1)

    def cached(self, normed: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 1, K, R) and rotated keys (B, 1, K, r), as by stock."""
        latent, turned = key.split([self.self_attn.kv_lora_rank, self.self_attn.qk_rope_head_dim], dim=-1)
        return latent, turned

    def keys_values(self, *cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, H, M, d) and values (B, H, M, v)."""
        return self.self_attn.expand_kv(*cached)


class V2DecoderLayer(LatentDecoderLayer):
    tables = 1

    def rotate(self, states: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Neighbouring numbers are one complex number, which the table's (B or 1, T, r / 2) turns."""
        pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * cos_sin[0].unsqueeze(1)).flatten(-2).type_as(states)


class V3DecoderLayer(LatentDecoderLayer):
    def rotate(self, states: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        """Where neighbouring numbers turn together, all first ones are moved before all second ones."""
        if self.self_attn.config.rope_interleave:
            states = states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return super().rotate(states, *cos_sin)


class V3Model(SkippingModel):
    def __init__(self, config: Any):
        super().__init__(config)
        # Layers that predict further tokens: in published checkpoints, and in no stock model.
        extra = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        ignored: Any = self._keys_to_ignore_on_load_unexpected
        ignored.update(rf"layers\.{number}\." for number in extra)


SptsDeepseekV2Config, SptsDeepseekV2DecoderLayer, SptsDeepseekV2Model, SptsDeepseekV2ForCausalLM = skipping_classes(
    __name__, "DeepseekV2", modeling_deepseek_v2, layer=V2DecoderLayer, experts=True
)
SptsDeepseekV3Config, SptsDeepseekV3DecoderLayer, SptsDeepseekV3Model, SptsDeepseekV3ForCausalLM = skipping_classes(
    __name__, "DeepseekV3", modeling_deepseek_v3, layer=V3DecoderLayer, model=V3Model, experts=True
)
