"""Self-Predictive Token Skipping (SPTS, arXiv 2601.13155) for stock transformers decoders: the method.

During the prefill, layers from `start` on work on a budget of *active* tokens; a token that is skipped keeps its hidden
state through the residual path, or gets an estimate of what the layer would have added, and may be chosen again by a
later layer:

- Partial Attention Probing (PAP): keys of all candidates and the queries of the last tokens give every candidate a
  score; attention runs among the top candidates, and only their keys and values enter the KV cache, or those of a
  larger share of the candidates (`kv`).
- Low-rank Transformation Probing (LTP): a small proxy predicts the norm of each candidate's feed-forward output; the
  feed-forward network runs on the candidates with the largest (predicted norm x attention score).
- Multi-Stage Delayed Pruning (MSDP): at the end of a stage, the lowest-scoring candidates leave the sequence for good.

Decoding runs densely on the shortened caches: a layer's holds the tokens that were cached there, and what came after
the prompt. The method is this file, `configuration_spts.py` (which layers skip how much), `selection.py` (scores,
proxies, the choice) and `update.py` (the estimates); what one layer is told is a `LayerPlan`, see `layer_plan.py`. The
other files are bookkeeping, and where families differ; README.md says which is what.

Shapes: B rows, n prompt slots (with padding), T candidates, M active tokens, K cached ones, D hidden size. Rows have
their padding on the left.
"""

from functools import partial
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from .calls import SkipRequest
from .decoding import Pass
from .graphs import Graphs
from .layer_plan import Count, LayerPlan, PlannedRuns
from .profiling import part
from .selection import gather_among, gather_tokens, pool_scores, probe_scores, reduce_heads, scatter_tokens
from .stock_layer import NORM_PIECE, StockLayer, add_fitted, cos_sin_of, in_pieces, layer_kinds


class SkippingDecoderLayer(StockLayer):
    """Mixed into a family's decoder layer: PAP and LTP. Without a `plan` the layer is the stock one."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, plan: LayerPlan | None = None, **kwargs: Any) -> Any:
        """Stock layer without `plan`; with it, four results: hidden states (B, T, D), indices (B, K) of the candidates
        whose keys and values are cached and (B, T') of those to go on with, and scores (B, T) of the candidates before
        pooling; None instead of all indices, and of scores where nothing was ranked."""
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self._skip(hidden_states, plan, **kwargs)

    def _skip(
        self,
        states: torch.Tensor,
        plan: LayerPlan,
        attention_mask: Any,
        position_embeddings: torch.Tensor,
        slots: torch.Tensor,
        past_key_values: Any,
        carried: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        # A count that `is plan.candidates_in` means all candidates: nothing to choose, and None in place of indices.
        # PAP: keys of all candidates, the last queries, and from them one score a candidate.
        cos_sin, raw = position_embeddings.chunk(self.tables, dim=-1), None
        score: Any = None
        with part("probing"):
            normed = self.normed("before_attention", states)
            key = self.keys(normed, *cos_sin)
            if plan.ranks:
                raw = self._scores(normed, key, cos_sin, slots, plan, carried)
                score = pool_scores(raw, plan.schedule.probe.kernel_size, plan.candidates_in.valid)
        by_attention = [] if plan.weighs else [plan.ffn_tokens]
        order = plan.order(score, raw, plan.active, plan.cached, plan.candidates_out, *by_attention)
        attention_index = plan.choose(plan.active, order)
        cached_index = attention_index if plan.cached is plan.active else plan.choose(plan.cached, order)
        with part("gathers"):
            active = gather_tokens(normed, attention_index)
            to_cache = active if cached_index is attention_index else gather_tokens(normed, cached_index)
            key = gather_tokens(key.transpose(1, 2), cached_index).transpose(1, 2)
            cos_sin = gather_tokens(position_embeddings, attention_index).chunk(self.tables, dim=-1)
            at = slots if plan.window is None else gather_tokens(slots, attention_index)

        # Attention among the active tokens, in their order and with their original positions.
        with part("attention"):
            held: tuple[torch.Tensor, ...] = self.cached(to_cache, key)
            if past_key_values is not None:
                past_key_values.update(*held, self.self_attn.layer_idx)
            if cached_index is not attention_index:
                held = gather_among(held, cached_index, attention_index)
            qkv = self.queries(active, *cos_sin), *self.keys_values(*held)
            output = self.attend(*qkv, attention_mask, at, plan)
            output = self.self_attn.o_proj(output.reshape(*output.shape[:2], -1))
            output = self.normed("after_attention", output)
        estimate = None
        if plan.schedule.update and attention_index is not None:
            with part("updates"):
                estimate = self.attention_update(normed)
        states = self._add(states, attention_index, output, plan.active, estimate)
        del normed, active, to_cache  # as large as the states, and done with

        # LTP: the feed-forward network on the candidates with the largest (predicted norm x attention score).
        if plan.weighs:
            with part("probing"):
                proxy = partial(self.proxy, relative=plan.schedule.ffn_selection == "relative")
                worth = in_pieces(proxy, states, NORM_PIECE) * score
            ffn_index = plan.choose(plan.ffn_tokens, plan.order(worth, raw, plan.ffn_tokens))
        else:
            ffn_index = attention_index if plan.ffn_tokens is plan.active else plan.choose(plan.ffn_tokens, order)
        run: Any = self.feed_forward
        inputs, estimate = states, None
        if plan.schedule.update and ffn_index is not None:
            with part("updates"):
                inputs, run = self.normed("before_feed_forward", states), self.transformed
                estimate = self.ffn_update(inputs)
        with part("gathers"):
            inputs = gather_tokens(inputs, ffn_index)
        with part("feed-forward"):
            output = run(inputs)
        states = self._add(states, ffn_index, output, plan.ffn_tokens, estimate)
        return states, cached_index, plan.choose(plan.candidates_out, order), raw

    @torch.no_grad()  # which only order tokens
    def _scores(
        self,
        normed: torch.Tensor,
        key: torch.Tensor,
        cos_sin: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        plan: LayerPlan,
        carried: torch.Tensor | None,
    ) -> torch.Tensor:
        """PAP's scores (B, T), with those `carried` here from the layers before. (The search's choice of heads scores
        one layer after another by the same functions, in `retrieval_heads.py`.)"""
        valid, probe = plan.candidates_in.valid, plan.schedule.probe
        if carried is not None and valid is not None:
            carried = carried * valid  # unused slots have taken a real token's along
        if plan.heads is None and carried is not None:
            return carried
        window = min(probe.window_size, plan.candidates_in.width)
        query = self.asked(plan.last(normed, window), *(plan.last(table, window) for table in cos_sin), rank=probe.rank)
        named = None if isinstance(plan.heads, str) or self.shares_heads() else plan.heads
        heads = probe_scores(query, key, self.self_attn.scaling, valid, self.unseen(slots, window, plan), named)
        raw = reduce_heads(self.all_heads(heads), plan.heads if named is None else "mean")
        return raw + probe.score_carry * carried if probe.score_carry and carried is not None else raw

    def asked(self, normed: torch.Tensor, *cos_sin: torch.Tensor, rank: int) -> torch.Tensor:
        """The probing queries (B, H, w, d) of the last tokens' normed states (B, w, D)."""
        return self.probes(normed + self.probe_update(normed) if rank else normed, *cos_sin)

    def unseen(self, slots: torch.Tensor, count: int, plan: LayerPlan) -> torch.Tensor | None:
        """Which candidates the last `count` queries do not see, (B or 1, count, T); None: later ones alone."""
        return plan.unseen(count)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, slots: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """Causal attention (B, M, H, d) among the active tokens; with a window, they are at `slots` (B, M)."""
        return self.attention_function(**plan.options)(query, key, value, mask)[0]

    @staticmethod
    def _add(
        states: torch.Tensor,
        index: torch.Tensor | None,
        output: torch.Tensor,
        count: Count,
        estimate: torch.Tensor | None,
    ) -> torch.Tensor:
        """States (B, T, D) with the output of the chosen tokens, or of all, added to theirs, and to the others' what is
        estimated of them all, (B, T, D) or (1, 1, D)."""
        if index is None:
            return states + output
        with part("gathers"):
            if estimate is not None and estimate.shape == states.shape:
                return states + scatter_tokens(estimate.to(output.dtype), index, output, count.valid)
            others = states if estimate is None else states + estimate.to(output.dtype)
            return scatter_tokens(others, index, gather_tokens(states, index) + output, count.valid)


class SkippingModel(PlannedRuns):
    """Mixed into a family's decoder: runs the prefill stage by stage."""

    layer_class: Any

    def __init__(self, config: Any):
        super().__init__(config)
        if config.spts is None:
            return
        for layer in self.layers:
            layer.__class__ = self.layer_class  # the stock layer with the methods of a skipping one
        add_fitted(self.layers, config, config.schedule())
        self.graphs = Graphs()
        self.post_init()

    def _prompt(self, run: Pass, request: SkipRequest, lengths: list[int]) -> torch.Tensor:
        """States (B, 1 or n, D) after the last layer, of a prompt that ends with the pass."""
        if request.graphs and (last := self.graphs.run(self, run, request, lengths)) is not None:
            return last
        plans = self._plans(request.schedule, lengths, run)
        if run.cache is not None:
            self._prepare_cache(run, plans, lengths, request.positions)
        return self._stages(run, plans, max(lengths), every=request.last is None)

    def _stages(self, run: Pass, plans: list[LayerPlan], width: int, every: bool) -> torch.Tensor:
        """States (B, 1 or, if `every` one is wanted, n, D) after the last layer, of rows of up to `width` tokens."""
        schedule, cache, prompt_length, device = plans[0].schedule, run.cache, run.states.shape[1], run.states.device
        kinds, rotary = layer_kinds(self.config), self._rotary(run)
        states = self._dense(run, range(run.first_layer, schedule.start), rotary)
        full_states = states.clone() if every else None
        slots = torch.arange(prompt_length - width, prompt_length, device=device).expand(states.shape[0], -1)
        # A copy, since skipping layers add in place and someone's hook may hold what the last dense layer returned.
        states = states[:, -width:].clone()
        rotary = {kind: torch.cat(cos_sin_of(tables), dim=-1)[:, -width:] for kind, tables in rotary.items()}
        masked, mask, carried = None, None, None
        for index, plan in enumerate(plans, schedule.start):
            if plan.window is None and plan.active is not masked:  # not by width: rows may be filled differently
                masked = plan.active
                shape = states.new_empty(states.shape[0], masked.width, 0)
                mask = None if run.causal else create_causal_mask(self.config, shape, masked.valid, None)
            states, cached_index, next_index, scores = self.layers[index](
                states,
                plan=plan,
                attention_mask=mask if plan.window is None else None,
                position_embeddings=rotary[kinds[index]],
                slots=slots,
                past_key_values=cache,
                carried=carried,
            )
            if schedule.probe.carries and scores is not None:
                carried = scores
            if cache is not None and getattr(cache.layers[index], "ends", None) is not None:
                cached = None if cached_index is None else cached_index.to(device)  # layers may be on several devices
                cache.layers[index].note_positions(gather_tokens(slots, cached), plan.cached.valid)
            if next_index is None:
                continue
            here = next_index.to(device)
            if full_states is not None:
                full_states = scatter_tokens(full_states, slots, states.to(device), plan.candidates_in.valid)
            with part("gathers"):
                states, slots = gather_tokens(states, next_index), gather_tokens(slots, here)
                rotary = {kind: gather_tokens(tables, here) for kind, tables in rotary.items()}
                carried = None if carried is None else gather_tokens(carried, next_index)
        if full_states is None:
            return plans[-1].last(states, 1)
        return scatter_tokens(full_states, slots, states.to(device), plans[-1].candidates_out.valid)
