"""The method's prefill over vLLM's layers: the modelling code's own, which sees vLLM's modules as stock ones."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear
from vllm._custom_ops import fused_add_rms_norm, rms_norm, rotary_embedding
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import ForwardContext, override_forward_context

from ..modeling.calls import SkipRequest
from ..modeling.configuration_spts import Counts, Probe, Schedule
from ..modeling.decoding import Pass
from ..modeling.layer_plan import Count, LayerPlan
from ..modeling.skipping import SkippingDecoderLayer, SkippingModel
from ..modeling.stock_layer import in_pieces, layer_kinds, split_heads

PIECE = 256  # tokens


def by_token(heads: torch.Tensor) -> torch.Tensor:
    """(1, heads, T, d) as (T, heads, d), without a copy where a projection has made them."""
    return heads[0].transpose(0, 1).contiguous()


class BlockCache:
    """vLLM's cache, as a prefill writes it: keys and values of a prompt's tokens go to their `slots` (n) in the blocks
    of every layer. `context` makes a forward context in which the prompt is no longer than so many tokens."""

    def __init__(self, layers: list["PagedLayer"], slots: torch.Tensor, context: Callable[[int], ForwardContext]):
        self.held: tuple[torch.Tensor, ...] = ()
        self.attentions, self.slots, self.context = [layer.self_attn.attn for layer in layers], slots, context
        self.layers = [self] * len(layers)
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.next_norms = iter(norms[1:])  # after each sum; none after the last, of which one token goes on
        self.normed: torch.Tensor | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        """Keys and values (1, heads, n, d) of all tokens, held until attention has run."""
        self.held = by_token(key), by_token(value)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention (1, M, H * d) among M active tokens by vLLM's kernel, which reads keys and values from blocks:
        theirs go to the first slots, until those of all tokens are written."""
        attention, count = self.attentions[layer], query.shape[2]
        with override_forward_context(self.context(count)):
            output = attention(*(by_token(part).flatten(1) for part in (query, key, value)))
        if count < len(self.slots):
            attention.impl.do_kv_cache_update(attention, *self.held, attention.kv_cache, self.slots)
        self.held = ()
        return output[None]


class PagedLayer(SkippingDecoderLayer):
    """One of vLLM's decoder layers, as a stock layer of which some tokens run; one prompt at a time (B = 1). It is made
    once the weights are loaded and before vLLM packs them, which on a CPU leaves nothing to take rows of."""

    tables = 1

    def __init__(self, layer: Any, index: int):
        self.layer, attention = layer, layer.self_attn
        sizes, made = [attention.q_size, attention.kv_size, attention.kv_size], attention.qkv_proj
        biases = (None,) * 3 if made.bias is None else made.bias.split(sizes)
        self.rows = dict(zip("qkv", zip(made.weight.split(sizes), biases, strict=True), strict=True))
        self.self_attn = SimpleNamespace(
            attn=attention.attn,
            layer_idx=index,
            o_proj=lambda states: attention.o_proj(states)[0],
            scaling=attention.scaling,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)  # norms, the feed-forward network, what was fitted

    def __call__(self, states: torch.Tensor, **given: Any) -> Any:
        self.blocks = given["past_key_values"]
        return self._skip(states, **given)

    def normed(self, place: str, states: torch.Tensor) -> torch.Tensor:
        """As stock; vLLM's kernel, since its norm's own call is made for compiled graphs."""
        if (name := getattr(self.norms, place)) is None:
            return states
        if (made := self.blocks.normed) is not None:
            self.blocks.normed = None
            return made
        norm, made = getattr(self.layer, name), torch.empty_like(states)
        rms_norm(made, states, norm.weight, norm.variance_epsilon)
        return made

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """vLLM makes queries, keys and values by one matrix, of which only the rows asked for are used."""
        return split_heads(linear(states, *self.rows[name]), self.layer.self_attn.head_dim)

    def rotate(self, states: torch.Tensor, *positions: torch.Tensor) -> torch.Tensor:
        """As stock, from positions (1, T): vLLM's kernel has the tables, and works in place."""
        rotary, flat = self.layer.self_attn.rotary_emb, states[0].transpose(0, 1).view(states.shape[2], -1)
        table = rotary.cos_sin_cache.to(states.dtype)
        rotary_embedding(positions[0][0], flat, None, rotary.head_size, table, rotary.is_neox_style)
        return states

    def attend(self, query: Any, key: Any, value: Any, mask: Any, slots: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        return self.blocks.attend(self.self_attn.layer_idx, query, key, value)

    def transformed(self, normed: torch.Tensor) -> torch.Tensor:
        """On a CPU in pieces, so that what is between the network's two products stays in its cache."""
        return in_pieces(self.layer.mlp, normed, PIECE)

    def _add(self, states: torch.Tensor, index: Any, output: torch.Tensor, _: Any, estimate: Any) -> torch.Tensor:  # type: ignore[override]
        """As in modeling, in place, by vLLM's kernel that makes the next norm with the sum; `normed` then has it."""
        added = output
        if index is not None:
            added = estimate.to(output.dtype).expand_as(states).contiguous().index_copy_(1, index[0], output)
        if (norm := next(self.blocks.next_norms, None)) is None:
            return states + added
        fused_add_rms_norm(added, states, norm.weight, norm.variance_epsilon)
        self.blocks.normed = added
        return states

    def shares_heads(self) -> bool:
        return get_tensor_model_parallel_world_size() > 1

    def all_heads(self, scores: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_gather(scores, dim=1)


class PagedDecoder(SkippingModel):
    """One of vLLM's decoders."""

    def __init__(self, decoder: Any, config: Any, schedule: Schedule):
        self.decoder, self.config, self.schedule = decoder, config, schedule
        self.layers = [PagedLayer(layer, index) for index, layer in enumerate(decoder.layers)]

    def prefill(self, input_ids: torch.Tensor, positions: torch.Tensor, *blocks: Any) -> torch.Tensor:
        """State (1, D) after the last of one prompt's tokens (n), which vLLM has given `blocks`: see `BlockCache`."""
        states = self.decoder.embed_input_ids(input_ids)[None]
        run = Pass(states, None, positions[None], BlockCache(self.layers, *blocks), 0, {})
        return self.decoder.norm(self._prompt(run, SkipRequest(self.schedule, last=1), [len(input_ids)])[0])

    def _prepare_cache(self, *_: Any) -> None:
        """vLLM has done so."""

    def _rotary(self, run: Pass) -> dict[str, Any]:
        """Positions (1, n) in place of tables, which vLLM's kernel has."""
        return dict.fromkeys(layer_kinds(self.config), run.position_ids)

    def _dense(self, run: Pass, layers: range, rotary: dict[str, Any]) -> torch.Tensor:
        counts: dict[str, Any] = dict.fromkeys(Counts._fields, Count(run.states.shape[1]))
        schedule = replace(self.schedule, probe=Probe())
        plan = LayerPlan(**counts, schedule=schedule, heads="mean", window=None, options={})
        given = {"plan": plan, "attention_mask": None, "slots": run.position_ids, "carried": None}
        states, kinds = run.states, layer_kinds(self.config)
        for index in layers:
            given["position_embeddings"] = rotary[kinds[index]]
            states, *_ = self.layers[index](states, past_key_values=run.cache, **given)
        return states
