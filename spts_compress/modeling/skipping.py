"""Self-Predictive Token Skipping (SPTS, arXiv 2601.13155) for stock transformers decoders: the method.

During the prefill, layers from `start` on work on a budget of *active* tokens; a token that is skipped keeps its hidden
state through the residual path and may be chosen again by a later layer:

- Partial Attention Probing (PAP): keys of all candidates and the queries of the last tokens give every candidate a
  score; attention runs among the top candidates, and only their keys and values enter the KV cache.
- Low-rank Transformation Probing (LTP): a small proxy predicts the norm of each candidate's feed-forward output; the
  feed-forward network runs on the candidates with the largest (predicted norm x attention score).
- Multi-Stage Delayed Pruning (MSDP): at the end of a stage, the lowest-scoring candidates leave the sequence for good.

Decoding runs densely on the shortened caches. The files beside this one: `configuration_spts.py` (which layers skip how
much), `selection.py` (scores, proxies, the choice), `cache.py`; and what is not the method: `stock_layer.py` (a stock
layer's steps), `calls.py` (when a call skips), `windows.py` (sliding windows), `families.py` and the family's own file.

Shapes: B rows, n prompt slots (with padding), T candidates, M active tokens, D hidden size. Rows have
their padding on the left.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import record_function
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .cache import SkippedCacheLayer
from .calls import DecoderCalls, SkipRequest
from .decoding import Pass, StockRuns
from .selection import FeedForwardProxy, gather_tokens, pool_scores, probe_scores, reduce_heads, scatter_tokens, select
from .stock_layer import StockLayer, activation_of, cos_sin_of, layer_kinds


@dataclass(frozen=True, eq=False)
class Count:
    """How many tokens of each row: `width` slots, and where rows differ `rows` (B, 1) and which slots are used."""

    width: int
    rows: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @classmethod
    def of(cls, counts: tuple[int, ...], device: torch.device) -> "Count":
        width = max(counts)
        if min(counts) == width:
            return cls(width)
        rows = torch.tensor(counts, device=device)[:, None]
        return cls(width, rows, torch.arange(width, device=device) >= width - rows)

    def to(self, device: Any) -> "Count":
        if self.rows is None or self.valid is None:
            return self
        return Count(self.width, self.rows.to(device), self.valid.to(device))


@dataclass(frozen=True)
class LayerPlan:
    """What one skipping layer does: candidates coming in, active ones in attention and in the feed-forward network,
    candidates going on to the next layer. `heads`: of the layer, that score. `window`: of attention, where it is
    shorter than the longest prompt."""

    candidates_in: Count
    active: Count
    ffn_tokens: Count
    candidates_out: Count
    schedule: Any
    heads: str | tuple[int, ...]
    window: int | None

    @property
    def ranks(self) -> bool:
        """Whether candidates are scored: for a choice here, or (in every row of a batch alike) for later layers."""
        counts = self.active, self.ffn_tokens, self.candidates_out
        return self.schedule.probe.carries or any(count is not self.candidates_in for count in counts)

    def to(self, device: Any, **_: Any) -> "LayerPlan":
        """The plan on a device; accelerate calls this where layers are on several."""
        names = ("candidates_in", "active", "ffn_tokens", "candidates_out")
        moved = {id(count): count.to(device) for count in (getattr(self, name) for name in names)}
        return replace(self, **{name: moved[id(getattr(self, name))] for name in names})  # equal ones stay one object

    def choose(self, count: Count, score: torch.Tensor | None, tie: torch.Tensor | None) -> torch.Tensor | None:
        """Places (B, `count`) of the candidates with the highest scores (B, T), see `select`; None: all of them."""
        if count is self.candidates_in or score is None or tie is None:
            return None
        with record_function("spts.selecting"):
            return select(self.protect(score), tie, count.width, count.rows, self.candidates_in.valid)

    def protect(self, score: torch.Tensor) -> torch.Tensor:
        """Scores (B, T) with those of the always active tokens raised above all others."""
        score, sink_tokens = score.clone(), self.schedule.sink_tokens
        score[:, -self.schedule.always_last :] = float("inf")
        if self.candidates_in.rows is None:
            score[:, :sink_tokens] = float("inf")
        else:
            slots = torch.arange(score.shape[1], device=score.device)
            score.masked_fill_(slots < score.shape[1] - self.candidates_in.rows + sink_tokens, float("inf"))
        return score


class SkippingDecoderLayer(StockLayer):
    """Mixed into a family's decoder layer: PAP and LTP. Without a `plan` the layer is the stock one."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, plan: LayerPlan | None = None, **kwargs: Any) -> Any:
        """Stock layer without `plan`; with it, four results: hidden states (B, T, D), places of the tokens active in
        attention (B, M), places of the candidates to go on with (B, T'), where None means all candidates, and their
        scores (B, T) before pooling, None if nothing was ranked."""
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self._skip(hidden_states, plan, **kwargs)

    def _skip(
        self,
        states: torch.Tensor,
        plan: LayerPlan,
        attention_mask: Any,
        position_embeddings: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        past_key_values: Any,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        cos_sin, selection = position_embeddings, plan.schedule.ffn_selection
        # PAP: keys of all candidates, the last queries, and from them one score a candidate.
        with record_function("spts.probing"):
            normed = self.normed("before_attention", states)
            key = self.keys(normed, *cos_sin)
            raw = self._scores(normed, key, cos_sin, slots, plan, carried) if plan.ranks else None
            score = self._pooled(raw, plan)
        attention_index = plan.choose(plan.active, score, raw)
        with record_function("spts.gathers"):
            if attention_index is not None:
                normed, slots = gather_tokens(normed, attention_index), gather_tokens(slots, attention_index)
                key = gather_tokens(key.transpose(1, 2), attention_index).transpose(1, 2)
                cos_sin = tuple(gather_tokens(table, attention_index) for table in cos_sin)

        # Attention among the active tokens, in their order and with their original positions.
        with record_function("spts.attention"):
            output = self.attend(*self.qkv(normed, key, past_key_values, *cos_sin), attention_mask, slots, plan)
            output = self.self_attn.o_proj(output.reshape(*output.shape[:2], -1))
            output = self.normed("after_attention", output)
        states = self._add(states, attention_index, output, plan.active)

        # LTP: the feed-forward network on the candidates with the largest (predicted norm x attention score).
        worth = score
        if plan.ffn_tokens is not plan.candidates_in and selection != "attention":
            with record_function("spts.probing"):
                worth = self.proxy(states, selection == "relative") * score
        ffn_index = plan.choose(plan.ffn_tokens, worth, raw)
        with record_function("spts.gathers"):
            ffn_states = states if ffn_index is None else gather_tokens(states, ffn_index)
        with record_function("spts.feed-forward"):
            output = self.feed_forward(ffn_states)
        states = self._add(states, ffn_index, output, plan.ffn_tokens)
        return states, attention_index, plan.choose(plan.candidates_out, score, raw), raw

    def _scores(
        self,
        normed: torch.Tensor,
        key: torch.Tensor,
        cos_sin: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        plan: LayerPlan,
        carried: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """PAP's scores (B, T), with those `carried` here from the layers before."""
        valid, probe = plan.candidates_in.valid, plan.schedule.probe
        if carried is not None and valid is not None:
            carried = carried * valid  # unused slots have taken a real token's along
        if not plan.heads:
            return carried
        window = min(probe.window_size, plan.candidates_in.width)
        query = self.probes(normed[:, -window:], *(table[:, -window:] for table in cos_sin))
        raw = probe_scores(query, key, self.self_attn.scaling, valid, self.hidden(slots, window, plan))
        # A fused projection gives every device all heads.
        raw = reduce_heads(raw, plan.heads, getattr(getattr(self.self_attn, self.by_heads, None), "weight", None))
        return raw + probe.score_carry * carried if probe.score_carry and carried is not None else raw

    @staticmethod
    def _pooled(raw: torch.Tensor | None, plan: LayerPlan) -> torch.Tensor | None:
        return None if raw is None else pool_scores(raw, plan.schedule.probe.kernel_size, plan.candidates_in.valid)

    def hidden(self, slots: torch.Tensor, count: int, plan: LayerPlan) -> torch.Tensor | None:
        """Which candidates the last `count` queries do not see, (B or 1, count, T): here none but later ones."""
        return None

    def attend(self, query: Any, key: Any, value: Any, mask: Any, slots: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """Causal attention (B, M, H, d) among the active tokens, which are at `slots` (B, M)."""
        return self.attention_function()(query, key, value, mask)[0]

    @staticmethod
    def _add(states: torch.Tensor, index: torch.Tensor | None, output: torch.Tensor, count: Count) -> torch.Tensor:
        """States (B, T, D) with the output of the chosen tokens, or of all, added to theirs."""
        if index is None:
            return states + output
        with record_function("spts.gathers"):
            return scatter_tokens(states, index, gather_tokens(states, index) + output, count.valid)


class SkippingModel(DecoderCalls, StockRuns):
    """Mixed into a family's decoder: runs the prefill stage by stage, and later tokens on caches of unequal length."""

    layer_class: Any
    output_class: Any = BaseModelOutputWithPast

    def __init__(self, config: Any):
        super().__init__(config)
        if config.spts is None:
            return
        schedule = config.schedule()
        for index, layer in enumerate(self.layers):
            layer.__class__ = self.layer_class  # the stock layer with the methods of a skipping one
            if index >= schedule.start:
                size = schedule.proxy_of(index)
                shape = config.hidden_size, size.channels, size.rank
                layer.proxy = FeedForwardProxy(*shape, activation_of(config), config.rms_norm_eps)
        self.post_init()

    @capture_outputs
    def _run(self, given: tuple, request: SkipRequest | None, lengths: list[int], **_: Any) -> BaseModelOutputWithPast:
        """A prompt of `lengths` tokens a row, or where it has none tokens after one; tokens of the pass that come after
        the prompt's end follow as a later chunk."""
        run = Pass(*given)
        if request is None:
            states = self._later(run)
        elif not request.suffix_length:
            states = self._prompt(run, request, lengths)
        else:
            cache = DynamicCache(config=self.config) if run.cache is None else run.cache
            prompt, suffix = replace(run, cache=cache).split(run.states.shape[1] - request.suffix_length)
            last = self._prompt(prompt, replace(request, last=1), lengths)
            self.end_pass(cache)
            states = torch.cat([last, self._later(suffix)], dim=1)
        return self.output_class(last_hidden_state=self.norm(states), past_key_values=run.cache)

    def _prompt(self, run: Pass, request: SkipRequest, lengths: list[int]) -> torch.Tensor:
        """States (B, 1 or n, D) behind the last layer, of a prompt that ends with the pass."""
        schedule, cache, slots, device = request.schedule, run.cache, run.states.shape[1], run.states.device
        plans = self._plans(schedule, lengths, device)
        if cache is not None:
            self._prepare_cache(cache, plans, slots, schedule)
        kinds, rotary = layer_kinds(self.config), self._rotary(run)
        states = self._dense(run, range(run.first_layer, schedule.start), rotary)
        full_states = states.clone() if request.last is None else None
        width, ends = max(lengths), torch.tensor(lengths, device=device)[:, None]
        candidates = torch.arange(slots - width, slots, device=device).expand(states.shape[0], -1)  # their slots
        # A copy, since skipping layers add in place and someone's hook may hold what the last dense layer returned.
        states = states[:, -width:].clone()
        rotary = {kind: tuple(table[:, -width:] for table in cos_sin_of(tables)) for kind, tables in rotary.items()}
        masks: dict[int, Any] = {}
        carried = None
        for index, plan in enumerate(plans, schedule.start):
            active = plan.active
            if plan.window is None and id(active) not in masks:  # not by width: rows may be filled differently
                shape = states.new_empty(states.shape[0], active.width, 0)
                masks = {id(active): create_causal_mask(self.config, shape, active.valid, None)}
            states, attention_index, next_index, scores = self.layers[index](
                states,
                plan=plan,
                attention_mask=masks.get(id(active)),
                position_embeddings=rotary[kinds[index]],
                slots=candidates,
                past_key_values=cache,
                carried=carried,
            )
            carried = carried if scores is None else scores
            if cache is not None and (request.positions or self.window_of(index) is not None):
                held = candidates if attention_index is None else gather_tokens(candidates, attention_index.to(device))
                cache.layers[index].note_positions(held - (slots - ends), ends, active.valid)
            if next_index is None:
                continue
            if full_states is not None:
                full_states = scatter_tokens(full_states, candidates, states.to(device), plan.candidates_in.valid)
            here = next_index.to(device)  # layers may be on several devices
            with record_function("spts.gathers"):
                states, candidates = gather_tokens(states, next_index), gather_tokens(candidates, here)
                rotary = {kind: tuple(gather_tokens(t, here) for t in tables) for kind, tables in rotary.items()}
                carried = None if carried is None else gather_tokens(carried, next_index)
        if full_states is None:
            return states[:, -1:]
        return scatter_tokens(full_states, candidates, states.to(device), plans[-1].candidates_out.valid)

    def _plans(self, schedule: Any, lengths: list[int], device: torch.device) -> list[LayerPlan]:
        """Plans of the skipping layers, for rows of `lengths` tokens. Equal counts share one `Count`."""
        known: dict[tuple[int, ...], Count] = {}
        plans = []
        for layer in range(schedule.start, len(self.layers)):
            columns = zip(*(schedule.counts(layer, length) for length in lengths), strict=True)
            four = (known.get(column) or known.setdefault(column, Count.of(column, device)) for column in columns)
            window = self.window_of(layer)
            window = window if window is not None and window < max(lengths) else None
            candidates_in, active, ffn_tokens, candidates_out = four
            counts = candidates_in, active, ffn_tokens, candidates_out
            plans.append(LayerPlan(*counts, schedule, schedule.probe.heads_of(layer), window))
        return plans

    def _prepare_cache(self, cache: Any, plans: list[LayerPlan], slots: int, schedule: Any) -> None:
        """Give the skipping layers' caches the class that knows which tokens they hold.

        Raises:
            ValueError: if the cache is of a kind that can't hold layers of unequal length.
        """
        while cache.layer_class_to_replicate is not None and len(cache.layers) < len(self.layers):
            cache.layers.append(cache.layer_class_to_replicate())
        for index, plan in enumerate(plans, schedule.start):
            old, active = cache.layers[index], plan.active
            if not isinstance(old, SkippedCacheLayer) and type(old) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"skipping needs a dynamic cache, this one has {type(old).__name__}; "
                    "leave cache_implementation unset, or pass spts=False"
                )
            protected, stage = min(schedule.always_last, active.width), schedule.stage_of(index)
            counts = slots, plan.candidates_in.width, active.width, active.valid, protected, stage
            cache.layers[index] = self.cache_layer(old, index, *counts)

    # What windows.py changes.

    def window_of(self, layer: int) -> int | None:
        """How many tokens back a layer's attention reaches, the own one counted; None: over the whole text."""
        return None

    def end_pass(self, cache: Any) -> None:
        """Called between the passes of one call."""

    def cache_layer(self, old: Any, layer: int, *counts: Any) -> SkippedCacheLayer:
        """What a layer's `old` cache is replaced by."""
        return SkippedCacheLayer(*counts)
