"""The classes that vLLM runs the exported families by: its own, which skip where a pass holds a whole prompt."""

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..modeling.stock_layer import Stock, add_fitted
from .prefill import PagedDecoder
from .setup import NewPrompts, schedule_of

logger = init_logger("vllm.spts")
# Those that write keys and values apart from attention, and whose metadata is of one shape.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


@dataclass(frozen=True)
class Part:
    """Tokens of one request in a pass: `count` of them from the batch's token `first` on. `row`: the request's place in
    the batch, `seen`: tokens of its text up to the last of them."""

    row: int
    first: int
    count: int
    seen: int


class SkippingForCausalLM(Stock):
    """Mixed into one of vLLM's causal language models."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        add_fitted(self.model.layers, config, schedule_of(config))
        self.vllm_config = vllm_config
        self.new_prompts: Any = NewPrompts.of_engine()
        self.skipped = {"prompts": 0, "tokens": 0, "active": 0}  # active: of a skipping layer, on average
        self.paged: Any = None
        self.builder: Any = None

    def load_weights(self, weights: Any) -> set[str]:
        loaded = super().load_weights(weights)
        backend = self.model.layers[0].self_attn.attn.attn_backend.get_name()
        if self.new_prompts is not None and backend in BACKENDS:
            self.paged = PagedDecoder(self.model, self.config, schedule_of(self.config))
        elif self.new_prompts is not None:
            logger.warning("SPTS: prompts run dense: attention is %s's, not %s's", backend, " or ".join(BACKENDS))
        return loaded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """As stock, but for prompts that skip; of those only the last token gets its state (n, D), which is all that
        vLLM samples from."""
        context = get_forward_context()
        prompts, others = self._parts(context)
        if not prompts or input_ids is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        states = positions.new_zeros(len(positions), self.config.hidden_size, dtype=self.vllm_config.model_config.dtype)
        slots = next(iter(context.slot_mapping.values()))
        for part in prompts:
            own = slice(part.first, part.first + part.count)
            first = cache(partial(self._first, context, part))
            states[own.stop - 1] = self.paged.prefill(input_ids[own], positions[own], slots[own], first)
            self._count(part.count)
        if others:  # after the prompts, since they may go on after one
            tokens = torch.cat([torch.arange(part.first, part.first + part.count) for part in others])
            with override_forward_context(self._restricted(context, others, tokens)):
                states[tokens] = super().forward(input_ids[tokens], positions[tokens])
        return states

    def _parts(self, context: ForwardContext) -> tuple[list[Part], list[Part]]:
        """The prompts of a pass that skip, and all other tokens; none and none if no prompt does."""
        new = self.new_prompts.take() if self.paged is not None else {}
        if not new or not isinstance(context.attn_metadata, dict):
            return [], []
        metadata = next(iter(context.attn_metadata.values()))
        prompts, others, starts = [], [], metadata.query_start_loc.tolist()
        spans = zip(pairwise(starts), metadata.seq_lens.tolist(), strict=True)
        for row, ((first, end), seen) in enumerate(spans):
            length = new.get(row, 0)
            # From its first token on, and to its end: one that was preempted goes on with what was generated.
            if seen == end - first >= length > 0 and self.paged.schedule.skips(length):
                prompts.append(Part(row, first, length, length))
                first += length
            if first < end:
                others.append(Part(row, first, end - first, seen))
        return prompts, others

    def _first(self, context: ForwardContext, part: Part, count: int) -> ForwardContext:
        """A pass's context with the first `count` tokens of a prompt alone."""
        tokens = torch.arange(part.first, part.first + count)
        return self._restricted(context, [replace(part, count=count, seen=count)], tokens)

    def _restricted(self, context: ForwardContext, parts: list[Part], tokens: torch.Tensor) -> ForwardContext:
        """A pass's context with these `parts` alone, which are these `tokens` of it."""
        names, attention = list(context.attn_metadata), self.model.layers[0].self_attn.attn
        metadata = context.attn_metadata[names[0]]
        device, counts = metadata.seq_lens.device, [part.count for part in parts]
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        seen = torch.tensor([part.seen for part in parts], dtype=torch.int32)
        slots = context.slot_mapping[names[0]][tokens.to(device)]
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seen.to(device),
            seq_lens_cpu_upper_bound=seen,
            num_reqs=len(parts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=int(seen.max()),
            block_table_tensor=metadata.block_table[[part.row for part in parts]],
            slot_mapping=slots,
        )
        if self.builder is None:
            spec = attention.get_kv_cache_spec(self.vllm_config)
            self.builder = attention.attn_backend.get_builder_cls()(spec, names, self.vllm_config, device)
        return replace(
            context,
            attn_metadata=dict.fromkeys(names, self.builder.build(0, common)),
            slot_mapping=dict.fromkeys(names, slots),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=None,
        )

    def _count(self, length: int) -> None:
        schedule, layers = self.paged.schedule, range(self.paged.schedule.start, len(self.model.layers))
        active = sum(schedule.counts(layer, length).active for layer in layers) // len(layers)
        if not self.skipped["prompts"]:
            logger.info("SPTS: the first prompt that skips has %d tokens, %d in a skipping layer", length, active)
        for name, count in (("prompts", 1), ("tokens", length), ("active", active)):
            self.skipped[name] += count


class SptsLlamaForCausalLM(SkippingForCausalLM, LlamaForCausalLM):
    """Llama."""


class SptsQwen2ForCausalLM(SkippingForCausalLM, Qwen2ForCausalLM):
    """Qwen2."""
