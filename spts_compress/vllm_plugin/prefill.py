"""The method's prefill over vLLM's layers: the modelling code's own, which sees vLLM's modules as stock ones."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import rotate_half
from vllm._custom_ops import rms_norm
from vllm.distributed import tensor_model_parallel_all_gather

from ..modeling.calls import SkipRequest
from ..modeling.configuration_spts import Counts, Probe, Schedule
from ..modeling.decoding import Pass
from ..modeling.layer_plan import Count, LayerPlan
from ..modeling.skipping import SkippingDecoderLayer, SkippingModel
from ..modeling.stock_layer import layer_kinds, split_heads

PIECE = 256  # tokens


class BlockCache:
    """vLLM's cache, as a prefill writes it: keys and values of a prompt's tokens go to their `slots` (n) in the blocks
    of every layer."""

    def __init__(self, layers: list["PagedLayer"], slots: torch.Tensor):
        self.attentions, self.slots = [layer.self_attn.attn for layer in layers], slots
        self.layers = [self] * len(layers)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        """Keys and values (1, heads, n, d) of all tokens."""
        attention = self.attentions[layer]
        key, value = (part[0].transpose(0, 1).contiguous() for part in (key, value))
        attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, self.slots)

    def note_positions(self, *_: Any) -> None:
        """Of no use: every layer holds every token."""


class PagedLayer(SkippingDecoderLayer):
    """One of vLLM's decoder layers, as a stock layer of which some tokens run; one prompt at a time (B = 1). It is made
    once the weights are loaded and before vLLM packs them, which on a CPU leaves nothing to take rows of."""

    rotate_half = staticmethod(rotate_half)
    eager_attention = None

    def __init__(self, layer: Any, index: int):
        self.layer, attention = layer, layer.self_attn
        sizes, made = [attention.q_size, attention.kv_size, attention.kv_size], attention.qkv_proj
        biases = (None,) * 3 if made.bias is None else made.bias.split(sizes)
        self.rows = dict(zip("qkv", zip(made.weight.split(sizes), biases, strict=True), strict=True))
        self.self_attn = SimpleNamespace(
            attn=attention.attn,
            config=SimpleNamespace(_attn_implementation="sdpa"),
            is_causal=True,
            layer_idx=index,
            num_key_value_groups=attention.num_heads // attention.num_kv_heads,
            o_proj=lambda states: attention.o_proj(states)[0],
            scaling=attention.scaling,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)  # norms, the feed-forward network, what was fitted

    def __call__(self, states: torch.Tensor, **given: Any) -> Any:
        return self._skip(states, **given)

    def normed(self, place: str, states: torch.Tensor) -> torch.Tensor:
        """As stock; vLLM's kernel, since its norm's own call is made for compiled graphs."""
        if (name := getattr(self.norms, place)) is None:
            return states
        norm, made = getattr(self.layer, name), torch.empty_like(states)
        rms_norm(made, states, norm.weight, norm.variance_epsilon)
        return made

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """vLLM makes queries, keys and values by one matrix, of which only the rows asked for are used."""
        return split_heads(linear(states, *self.rows[name]), self.layer.self_attn.head_dim)

    def transformed(self, normed: torch.Tensor) -> torch.Tensor:
        """On a CPU in pieces, so that what is between the network's two products stays in its cache."""
        if normed.shape[1] <= PIECE or normed.is_cuda:
            return self.layer.mlp(normed)
        made = torch.empty_like(normed)
        for piece, place in zip(normed.split(PIECE, dim=1), made.split(PIECE, dim=1), strict=True):
            place.copy_(self.layer.mlp(piece))
        return made

    def all_heads(self, scores: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_gather(scores, dim=1)


class PagedDecoder(SkippingModel):
    """One of vLLM's decoders."""

    def __init__(self, decoder: Any, config: Any, schedule: Schedule):
        self.decoder, self.config, self.schedule = decoder, config, schedule
        self.layers = [PagedLayer(layer, index) for index, layer in enumerate(decoder.layers)]

    def prefill(self, input_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """State (1, D) after the last token of one prompt, whose tokens (n) vLLM has given these `slots`."""
        states = self.decoder.embed_input_ids(input_ids)[None]
        run = Pass(states, None, positions[None], BlockCache(self.layers, slots), 0, {})
        return self.decoder.norm(self._prompt(run, SkipRequest(self.schedule, last=1), [len(input_ids)])[0])

    def _prepare_cache(self, *_: Any) -> None:
        """vLLM has done so."""

    def _rotary(self, run: Pass) -> dict[str, Any]:
        table = self.decoder.layers[0].self_attn.rotary_emb.cos_sin_cache[run.position_ids].to(run.states.dtype)
        cos_sin = tuple(torch.cat([half, half], dim=-1) for half in table.chunk(2, dim=-1))
        return dict.fromkeys(layer_kinds(self.config), cos_sin)

    def _dense(self, run: Pass, layers: range, rotary: dict[str, Any]) -> torch.Tensor:
        counts: dict[str, Any] = dict.fromkeys(Counts._fields, Count(run.states.shape[1]))
        plan = LayerPlan(**counts, schedule=replace(self.schedule, probe=Probe()), heads="mean", window=None)
        given = {"plan": plan, "attention_mask": None, "slots": run.position_ids, "carried": None}
        states, kinds = run.states, layer_kinds(self.config)
        for index in layers:
            tables = rotary[kinds[index]]
            states, *_ = self.layers[index](states, position_embeddings=tables, past_key_values=run.cache, **given)
        return states
