"""Self-Predictive Token Skipping (SPTS, arXiv 2601.13155) for stock transformers decoders.

During the prefill, layers from `start` on work on a budget of *active* tokens; a token that is skipped keeps its hidden
state through the residual path and may be chosen again by a later layer:

- Partial Attention Probing (PAP): keys of all candidates and the queries of the last tokens give every candidate a
  score; attention runs among the top candidates, and only their keys and values enter the KV cache.
- Low-rank Transformation Probing (LTP): a small proxy predicts the norm of each candidate's feed-forward output; the
  feed-forward network runs on the candidates with the largest (predicted norm x attention score).
- Multi-Stage Delayed Pruning (MSDP): at the end of a stage, the lowest-scoring candidates leave the sequence for good.

A window of a layer's attention is counted in places of the prompt, however many of the tokens inside it are skipped.

Decoding runs densely on the shortened caches. This file travels with every exported checkpoint; it says what the method
does, once, for all model families. The family's own file mixes it into the stock classes.

Shapes: B rows, n prompt slots (with padding), T candidates, M active tokens, H heads, G key/value heads, d head size,
D hidden size. Rows are padded on the left, everywhere.
"""

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

TRANSFORMERS = ("5.17", "5.24")  # tested from the first on and below the second
if not Version(TRANSFORMERS[0]) <= Version(Version(transformers.__version__).base_version) < Version(TRANSFORMERS[1]):
    raise ImportError(
        f"this model's code is tested with transformers {TRANSFORMERS[0]} up to, not including, {TRANSFORMERS[1]}; "
        f"you have {transformers.__version__}"
    )

NORM_PIECE = 512  # tokens
WINDOW_PIECE = 256  # tokens, or half a window if that is more

# ---------------------------------------------------------------------------------------------------------------------
# Scores and selections
# ---------------------------------------------------------------------------------------------------------------------


def probe_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each head's last queries pay to every candidate, their mean (PAP).

    Args:
        query: rotated queries of the last w candidates, (B, H, w, d).
        key: rotated keys of all candidates, (B, G, T, d).
        scaling: factor of the attention logits.
        valid: which candidates are not padding, (B, T); None if all are.
        unseen: which candidates are outside the window of which query, (B or 1, w, T); None if there is no window.

    Returns:
        Scores (B, H, T) in float32, zero on padding and outside all windows.
    """
    batch, num_heads, asking, _ = query.shape
    groups, candidates = key.shape[1:3]
    grouped = query.float().reshape(batch, groups, num_heads // groups * asking, -1) * scaling
    with torch.autocast(key.device.type, enabled=False):  # scores decide, so they stay in float32
        logits = torch.matmul(grouped, key.float().transpose(2, 3)).view(batch, num_heads, asking, candidates)
    if asking > 1:  # each query sees the tokens up to itself
        future = torch.ones(asking, asking, dtype=torch.bool, device=key.device).triu(1)
        logits[..., -asking:].masked_fill_(future, float("-inf"))
    if unseen is not None:
        logits.masked_fill_(unseen[:, None], float("-inf"))
    if valid is None:
        return torch.softmax(logits, dim=-1).mean(dim=2)
    logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
    real = valid[:, None, -asking:, None]
    return (torch.softmax(logits, dim=-1) * real).sum(dim=2) / real.sum(dim=2) * valid[:, None]


def reduce_heads(raw: torch.Tensor, heads: str | tuple[int, ...], weight: Any = None) -> torch.Tensor:
    """The "mean" or "max" (B, T) of all heads' scores (B, H, T), or the mean of those that `heads` names.

    Where tensor parallelism has given each device some of the heads, `weight` is a tensor sharded over the devices, all
    of which must choose the same tokens.
    """
    shards = [number for number, placement in enumerate(getattr(weight, "placements", ())) if placement.is_shard()]
    device = 0
    for dimension in shards:
        device = device * weight.device_mesh.size(dimension) + weight.device_mesh.get_local_rank(dimension)
    if isinstance(heads, str):
        made = raw.amax(dim=1) if heads == "max" else raw.mean(dim=1)
    else:
        count = raw.shape[1]
        own = (raw[:, head % count] for head in heads if head // count == device)
        made = sum(own, torch.zeros_like(raw[:, 0])) / len(heads)
    for dimension in shards:
        how = torch.distributed.ReduceOp.MAX if heads == "max" else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(made, how, group=weight.device_mesh.get_group(dimension))
        made = made / weight.device_mesh.size(dimension) if heads == "mean" else made
    return made


def pool_scores(raw: torch.Tensor, width: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The largest score among `width` neighbouring candidates, (B, T); zero on padding."""
    if width == 1:
        return raw
    pooled = nn.functional.max_pool1d(raw[:, None], width, stride=1, padding=width // 2)[:, 0]
    return pooled if valid is None else pooled * valid


def select(
    score: torch.Tensor,
    tie: torch.Tensor,
    width: int,
    counts: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices of the top candidates of each row, in their original order.

    Equal scores are decided by `tie`, then by the later position, so that the result is the same on every device.
    Nothing here waits for the device: all shapes are known beforehand.

    Args:
        score: what to rank by, (B, T) float32, not negative.
        tie: decides between equal scores, (B, T) float32, not negative.
        width: number of indices a row, the largest of the rows' counts.
        counts: number of tokens to select in each row, (B, 1); None if `width` in every row.
        valid: which candidates are not padding, (B, T); None if all are.

    Returns:
        Indices into the candidates, (B, width), padded with 0 on the left where a row selects fewer.
    """
    # The bits of a non-negative float32 sort like the number itself, so one 64-bit key ranks by score, then by tie.
    high, low = (values.float().contiguous().view(torch.int32).long() for values in (score, tie))
    rank = (high << 32) | low
    if valid is not None:
        rank = rank.masked_fill(~valid, -1)
    top = rank.topk(width, dim=-1).values
    wanted = width if counts is None else counts
    threshold = top[:, -1:] if counts is None else top.gather(1, counts - 1)
    above, level = rank > threshold, rank == threshold
    from_the_right = level.flip(1).cumsum(1).flip(1)
    chosen = above | (level & (from_the_right <= wanted - above.sum(1, keepdim=True)))
    # Chosen candidates go to consecutive slots, all others to a spare slot behind the last.
    slot = torch.where(chosen, chosen.cumsum(1) - 1 + width - wanted, width)
    source = torch.arange(score.shape[1], device=score.device).expand_as(slot)
    return torch.zeros_like(slot[:, :1]).repeat(1, width + 1).scatter_(1, slot, source)[:, :width]


def split_heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    """(B, T, heads * d) as (B, heads, T, d), for heads of d = `size`."""
    return projected.view(*projected.shape[:2], -1, size).transpose(1, 2)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear module is no more than its matrix: not quantised, offloaded, hooked, sharded or adapted."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and not hasattr(module, "_hf_hook")
    return plain and not any(hooks)


def linear_rows(module: nn.Module, states: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some `rows` of what a linear module makes of states (B, T, D), without the others where the module is plain."""
    if not is_plain(module):
        return module(states)[..., rows]
    return nn.functional.linear(states, module.weight[rows], None if module.bias is None else module.bias[rows])


def tables_of(rotary: Any) -> tuple[torch.Tensor, ...]:
    """What a rotary embedding gives, (B or 1, T, ...) each, as a tuple: mostly cosines and sines."""
    return rotary if isinstance(rotary, tuple) else (rotary,)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather along dimension 1: (B or 1, T, ...) and (B, M) give (B, M, ...)."""
    if index.shape[0] == 1:
        return states.index_select(1, index[0])
    if states.shape[0] == 1:
        return states[0][index]
    return states[torch.arange(index.shape[0], device=index.device)[:, None], index]


def normalise(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`norm(states)` for an RMS norm, which the stock module computes in many passes over memory: in one kernel on a
    GPU, and on a CPU in pieces that stay in its cache (there with the very same result)."""
    weight, hooks = norm.weight, (norm._forward_hooks, norm._forward_pre_hooks)
    # An offloaded weight, a hook, an adapter or mixed types need the module's own call.
    plain = hasattr(norm, "variance_epsilon") and not hasattr(norm, "_hf_hook") and not any(hooks)
    if plain and states.is_cuda and weight.is_cuda and weight.dtype == states.dtype:
        return nn.functional.rms_norm(states, weight.shape, weight, norm.variance_epsilon)
    if states.shape[1] <= NORM_PIECE or states.is_cuda:
        return norm(states)
    return torch.cat([norm(piece) for piece in states.split(NORM_PIECE, dim=1)], dim=1)


def put(states: torch.Tensor, index: torch.Tensor, update: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`states[b, index[b]] = update[b]` for all valid slots; in place if no gradient runs."""
    if torch.is_grad_enabled() and (states.requires_grad or update.requires_grad):
        states = states.clone()
    if valid is not None:  # unused slots hold index 0, which may be a real token
        rows, slots = valid.nonzero(as_tuple=True)
        states[rows, index[rows, slots]] = update[rows, slots]
    elif index.shape[0] == 1:
        states.index_copy_(1, index[0], update)
    else:
        states[torch.arange(index.shape[0], device=index.device)[:, None], index] = update
    return states


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of attention, and windows
# ---------------------------------------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"
MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def layer_kinds(config: Any) -> list[str]:
    """Each layer's kind of attention, by the name that transformers has for it."""
    if kinds := getattr(config, "layer_types", None):
        return kinds
    # A family without windows may have been given one in its config, and ignores it.
    sliding = hasattr(type(config), "sliding_window") and config.sliding_window is not None
    return [SLIDING if sliding else FULL] * config.num_hidden_layers


def layer_windows(config: Any) -> list[int | None]:
    """How many tokens back each layer's attention reaches, the own one counted; None: over the whole text."""
    return [config.sliding_window if kind == SLIDING else None for kind in layer_kinds(config)]


def position_tables(rotary: nn.Module, config: Any, states: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
    """Cosines and sines (B or 1, T, d) for each kind of attention, some of which have rotary positions of their own."""
    kinds = set(layer_kinds(config))
    if kinds <= set(config.rope_parameters):
        return {kind: rotary(states, position_ids, kind) for kind in kinds}
    return dict.fromkeys(kinds, rotary(states, position_ids))


def outside(places: torch.Tensor, asking: int, window: int | None) -> torch.Tensor | None:
    """Which tokens at `places` (B, T) are before the windows of the last `asking` ones, (B, asking, T)."""
    return None if window is None else places[:, -asking:, None] - places[:, None] >= window


def within(places: torch.Tensor, window: int) -> Callable[..., torch.Tensor]:
    """For `create_causal_mask`: a token sees those at most `window` - 1 `places` (B, T) before it."""
    return lambda row, head, query, key: places[row, query] - places[row, key] < window


def windowed(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    window: int,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention (B, M, H, d) of tokens at rising `places` (B, M), each of which sees those less than `window`
    before it: piece by piece, with the few keys that a piece can see, where a mask of all pairs would take more time
    and memory than the attention that it leaves."""
    made, size = [], max(WINDOW_PIECE, window // 2)
    for first in range(0, places.shape[1], size):
        seen = slice(max(0, first - window + 1), first + size)  # tokens are no nearer to each other than their numbers
        distance = places[:, first : first + size, None] - places[:, None, seen]
        hidden = (distance < 0) | (distance >= window)
        if valid is not None:
            hidden |= ~valid[:, None, seen]
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, torch.finfo(query.dtype).min)
        part = query[:, :, first : first + size], key[:, :, seen], value[:, :, seen], mask[:, None]
        made.append(attend(*part)[0])
    return torch.cat(made, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Proxies
# ---------------------------------------------------------------------------------------------------------------------


class FeedForwardProxy(nn.Module):
    """Low-rank Transformation Probing (LTP): predicts `||FFN(norm(x))||` from the residual state `x`.

    With `x' = x / rms(x)` the prediction is `exp(x' a + (x' * x') b + c) ||f(x)||^p`, where
    `f(x) = act(x' U_g V_g) * (x' U_u V_u)` has the width D_low, as in the paper, and the rest is a regression's.
    `U_g`, `U_u` of rank r and `a` (D) are one matrix, `down`; `square` (D) is `b`, `constants` are c and p. They hold
    the norm's weight too, so that candidates need not be normalised one by one. 4 r (D + D_low) + 5 D floating-point
    operations a token; with rank 0 only the regression is left.
    """

    def __init__(self, hidden_size: int, channels: int, rank: int, activation: str, eps: float):
        super().__init__()
        self.eps, self.rank = eps, rank
        self.down = nn.Parameter(torch.empty(2 * rank + 1, hidden_size))
        self.square = nn.Parameter(torch.empty(hidden_size))
        self.constants = nn.Parameter(torch.empty(2))
        if rank:
            self.gate = nn.Parameter(torch.empty(channels, rank))
            self.up = nn.Parameter(torch.empty(channels, rank))
        self.activation = ACT2FN[activation]

    def forward(self, states: torch.Tensor, relative: bool = False) -> torch.Tensor:
        """Predicted norms in float32, (B, T), of residual states (B, T, D) in front of the feed-forward norm;
        `relative`: divided by the root mean square of the state itself."""
        squares = states.float().square() if states.dtype == torch.float16 else states.square()
        sums = nn.functional.linear(squares, torch.stack([torch.ones_like(self.square), self.square]).to(squares))
        mean, squared = (sums.double() if sums.dtype == torch.float64 else sums.float()).unbind(-1)
        mean = mean / states.shape[-1] + self.eps
        scale = torch.rsqrt(mean)
        if states.dtype == torch.float16:  # whose range a large residual state would leave
            low = nn.functional.linear(states * scale[..., None].to(states.dtype), self.down)
        else:
            low = nn.functional.linear(states, self.down) * scale[..., None].to(states.dtype)
        constant, power = self.constants.to(mean)
        norm = torch.exp(low[..., -1].to(mean) + squared / mean + constant)
        if self.rank:
            gate, up = low[..., :-1].chunk(2, dim=-1)
            product = self.activation(nn.functional.linear(gate, self.gate)) * nn.functional.linear(up, self.up)
            norm = norm * torch.linalg.vector_norm(product, dim=-1, dtype=mean.dtype) ** power
        if relative:
            norm = norm * scale
        return norm.float().nan_to_num()  # a prediction out of range must not outrank the always active tokens


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


class SkippedCacheLayer(DynamicLayer):
    """KV cache of a layer that skipped prompt tokens: shorter than the prompt, and its rows may start with padding.

    `prompt_length`: slots of the prompt, with padding. `active`: slots its attention ran on. `kept`: those still held.
    `entering`: candidates it chose them from. `tail`: how many of the prompt's last tokens every layer holds. `stage`:
    layers of one stage run on equally many tokens. `later`: tokens that came after the prompt.
    What goes by rows and moves with them: `valid`: which of the kept slots are not padding, (B, kept), None if all are.
    `positions`: on request, the places in the row's prompt that the active tokens came from, (B, active), -1 for
    padding, and `ends`, the place behind it, (B, 1).
    """

    def __init__(self, prompt_length: int, entering: int, active: "Count", tail: int, stage: int):
        super().__init__()
        self.prompt_length, self.entering, self.active = prompt_length, entering, active.width
        self.tail, self.stage, self.kept, self.later = tail, stage, active.width, 0
        self.valid: torch.Tensor | None = active.valid
        self.positions: torch.Tensor | None = None
        self.ends: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.get_seq_length() > 0 or self.prompt_length == 0:
            self.later += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def _move_rows(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("valid", "positions", "ends"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, move(rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._move_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._move_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._move_rows(lambda rows: rows[indices, ...])

    def reset(self) -> None:
        super().reset()
        self.prompt_length = self.entering = self.active = self.kept = self.tail = self.later = 0
        self.valid = self.positions = self.ends = None

    def attention_mask(self, attention_mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor | None:
        """Which of the tokens held here, then of the new `states`, are not padding; None if all are.

        `attention_mask` (B, all tokens so far) is the caller's; None if it holds no padding.
        """
        if attention_mask is None and self.valid is None:
            return None
        held = self.valid
        if held is None:
            held = torch.ones(states.shape[0], self.kept, dtype=torch.bool, device=states.device)
        later = self.get_seq_length() - self.kept + states.shape[1]
        if attention_mask is None:
            tail = torch.ones(states.shape[0], later, dtype=torch.bool, device=states.device)
        else:
            tail = attention_mask[:, attention_mask.shape[1] - later :].to(states.device, torch.bool)
        return torch.cat([held.to(states.device), tail], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        count = abs(tokens_to_remove)
        of_prompt = max(0, count - self.later)
        if of_prompt > self.tail:
            raise ValueError(
                f"cannot crop {count} tokens: {self.later} came after the prompt, and every layer holds "
                f"only the last {self.tail} of the prompt (keep_last). Run the prompt again instead."
            )
        super().crop(tokens_to_remove)
        self.later -= count - of_prompt
        if of_prompt:
            self.prompt_length, self.tail = self.prompt_length - of_prompt, self.tail - of_prompt
            self.active, self.kept = self.active - of_prompt, self.kept - of_prompt
            ends = None if self.ends is None else self.ends - of_prompt
            self._move_rows(lambda rows: rows[:, : rows.shape[1] - of_prompt])
            self.ends = ends


class WindowCacheLayer(SkippedCacheLayer):
    """The same of a layer whose attention has a `window`: it holds no more tokens than that window, or one that begins
    `tail` tokens before, still sees; all of them while the past is recorded, as assisted decoding asks for."""

    def __init__(self, window: int, *counts: Any):
        super().__init__(*counts)
        self.window: int = window
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        every = super().update(key_states, value_states, *args, **kwargs)
        spare = self.get_seq_length() - (self.window - 1 + self.tail)
        if spare > 0 and not self.record_past:
            self.keys, self.values = (states[:, :, spare:].contiguous() for states in every)
            gone = min(spare, self.kept)
            self.kept -= gone
            self.valid = None if self.valid is None else self.valid[:, gone:]
        return every

    def crop(self, tokens_to_remove: int) -> None:
        held, was = self.get_seq_length(), self.active + self.later
        if held < was and held - abs(tokens_to_remove) < self.window - 1:
            raise ValueError(
                f"cannot crop {abs(tokens_to_remove)} tokens: the window behind them is gone. Call the cache's "
                "activate_past_recording() before the prompt, or run the prompt again."
            )
        super().crop(tokens_to_remove)

    def window_masks(
        self, attention_mask: torch.Tensor | None, states: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor] | None]:
        """As `attention_mask`, of what the first of the new `states` (B, new, D) sees through the window; and for
        `create_causal_mask`, if there are more, that the others see less."""
        new, held = states.shape[1], self.get_seq_length() - self.kept
        later = torch.arange(self.later - held, self.later + new, device=states.device)
        places = (0 if self.ends is None else self.ends.to(states.device)) + later.expand(states.shape[0], -1)
        if self.positions is not None and self.kept:  # none after a reset
            places = torch.cat([self.positions[:, -self.kept :].to(states.device), places], dim=1)
        inside = places > places[:, places.shape[1] - new, None] - self.window
        seen = self.attention_mask(attention_mask, states)
        return inside if seen is None else seen & inside, within(places, self.window) if new > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# One prefill
# ---------------------------------------------------------------------------------------------------------------------


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
    """What one skipping layer does: candidates coming in, active ones in attention and in the feed-forward network
    (`changed`), candidates going on to the next layer."""

    entering: Count
    active: Count
    changed: Count
    leaving: Count
    keep_first: int
    keep_last: int
    probe: Any
    heads: str | tuple[int, ...]  # of the layer, that score
    feed_forward: str
    window: int | None  # of attention, where it is shorter than the longest prompt

    @property
    def skips(self) -> bool:
        return self.active is not self.entering

    @property
    def prunes(self) -> bool:
        return self.leaving is not self.entering

    @property
    def ranks(self) -> bool:
        """Whether candidates are scored: for a choice here, or (in every row of a batch alike) for later layers."""
        return self.skips or self.prunes or self.changed is not self.entering or self.probe.carries

    def to(self, device: Any, **_: Any) -> "LayerPlan":
        """The plan on a device; accelerate calls this where layers are on several."""
        names = ("entering", "active", "changed", "leaving")
        moved = {id(count): count.to(device) for count in (getattr(self, name) for name in names)}
        return replace(self, **{name: moved[id(getattr(self, name))] for name in names})  # equal ones stay one object

    def pin(self, score: torch.Tensor) -> torch.Tensor:
        """Scores (B, T) with those of the always active tokens raised above all others."""
        score = score.clone()
        score[:, -self.keep_last :] = float("inf")
        if self.entering.rows is None:
            score[:, : self.keep_first] = float("inf")
        else:
            slots = torch.arange(score.shape[1], device=score.device)
            score.masked_fill_(slots < score.shape[1] - self.entering.rows + self.keep_first, float("inf"))
        return score


@dataclass(frozen=True)
class Skip:
    """A request to skip.

    `last`: how many last positions to return; None: all, with the dense shape. `behind`: how many of the tokens given
    come after the prompt's end. `positions`: whether the caches note the positions of the tokens they keep.
    """

    schedule: Any
    last: int | None = None
    behind: int = 0
    positions: bool = False

    @classmethod
    def of(cls, config: Any, spts: Any, last: int | None) -> "Skip":
        """Read the `spts` argument of a call."""
        if not isinstance(spts, bool | dict):
            raise TypeError(f"spts must be None, True, False or a dict of schedule changes, not {type(spts).__name__}")
        if config.spts is None:
            raise ValueError("this model's config has no spts block, so it can't skip tokens")
        changes = dict(spts) if isinstance(spts, dict) else {}
        positions = changes.pop("positions", False)
        fixed = {"start", "proxy"} & set(changes)
        if fixed:
            raise ValueError(
                f"{', '.join(sorted(fixed))} can't be changed for one call: the proxies were fitted for it"
            )
        return cls(config.schedule(**changes), last, 0 if last is None else last - 1, positions)

    def prompt_lengths(self, attention_mask: torch.Tensor | None, batch: int, slots: int) -> list[int]:
        """Prompt tokens of each row, without padding; empty if there is nothing to skip.

        Raises:
            ValueError: if the mask is anything but padding on the left.
        """
        if slots - self.behind < 1 or not self.schedule.skips(slots - self.behind):
            return []
        if attention_mask is None:
            return [slots - self.behind] * batch
        advice = "pad on the left (tokenizer.padding_side = 'left'), or pass spts=False"
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise ValueError(f"skipping needs an attention mask of 2 dimensions: {advice}")
        if attention_mask.shape[1] != slots:
            raise ValueError(f"the attention mask has {attention_mask.shape[1]} columns for {slots} tokens")
        real = attention_mask.bool()
        left_padded = (real[:, 1:] >= real[:, :-1]).all() & real[:, -1:].all()
        counted = torch.cat([real.sum(1) - self.behind, left_padded.long()[None]])
        *lengths, fine = counted.tolist()  # the one time this waits for the device
        if not fine:
            raise ValueError(f"skipping can't handle padding on the right or inside a prompt: {advice}")
        if min(lengths) < 1:
            raise ValueError(f"a row has no more than logits_to_keep = {self.behind + 1} tokens; pass spts=False")
        return lengths if any(map(self.schedule.skips, lengths)) else []


@dataclass(frozen=True)
class Norms:
    """Names of a decoder layer's norms, by where they stand; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None


class SkippingDecoderLayer:
    """Mixed into a family's decoder layer: adds PAP and LTP. Without a `plan` the layer is the stock one.

    This is where families differ: `rotate_half` and `eager_attention` are the family's own functions, `norms` says
    which norms there are, `project` how queries, keys and values are made, and `rotate` how they get their positions; a
    family whose attention does so in another way overrides it. One that caches something else than keys and values
    overrides `keys`, `probes` and `attended`. `by_heads` names a projection whose rows tensor parallelism may share
    among devices, head by head.
    """

    norms = Norms()
    by_heads = "k_proj"

    # From the family's own module.
    rotate_half: Any
    eager_attention: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, plan: LayerPlan | None = None, **kwargs: Any) -> Any:
        """Stock layer without `plan`; with it, four results: hidden states (B, T, D), places of the tokens active in
        attention (B, M), places of the candidates to go on with (B, T'), where None means all candidates, and their
        scores (B, T) before pooling, None if nothing was ranked."""
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self._skip(hidden_states, plan=plan, **kwargs)

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Queries ("q"), keys ("k") or values ("v") of normed states (B, T, D), not rotated yet: (B, heads, T, d);
        normed head by head where attention has such a norm."""
        heads = split_heads(getattr(self.self_attn, f"{name}_proj")(states), self.self_attn.head_dim)
        norm = getattr(self.self_attn, f"{name}_norm", None)
        return heads if norm is None else norm(heads)

    def rotate(self, states: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        """Rotary positions for queries or keys (B, heads, T, d); cosines and sines (B or 1, T, d, or less than d: the
        rest of each head keeps its place)."""
        cos, sin = (table.unsqueeze(1) for table in tables)
        turned, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
        turned = (turned * cos + type(self).rotate_half(turned) * sin).to(states.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def keys(self, normed: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        """What candidates are scored by, (B, G, T, d), from normed states (B, T, D) and their rotary tables."""
        return self.rotate(self.project("k", normed), *tables)

    def probes(self, normed: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, w, d) that score such keys."""
        return self.rotate(self.project("q", normed), *tables)

    def attended(
        self, normed: torch.Tensor, key: torch.Tensor, cache: Cache | None, *tables: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (B, heads, M, .) of the active tokens, which are cached, from their normed states
        (B, M, D), their `keys` and their rotary tables."""
        query, value = self.rotate(self.project("q", normed), *tables), self.project("v", normed)
        if cache is not None:
            cache.update(key, value, self.self_attn.layer_idx)
        return query, key, value

    def normed(self, place: str, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) after the norm at a place, see `Norms`; as they are if there is none."""
        name = getattr(self.norms, place)
        return states if name is None else normalise(getattr(self, name), states)

    def feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        """What the feed-forward network adds to residual states (B, T, D)."""
        return self.normed("after_feed_forward", self.mlp(self.normed("before_feed_forward", states)))

    def _skip(
        self,
        hidden_states: torch.Tensor,
        plan: LayerPlan,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        past_key_values: Cache | None,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        attention = self.self_attn
        tables = position_embeddings
        entering, active, changed = plan.entering, plan.active, plan.changed

        # PAP: keys of all candidates, the last queries, and from them one score a candidate.
        normed = self.normed("before_attention", hidden_states)
        key = self.keys(normed, *tables)
        chosen = score = raw = None
        if plan.ranks:
            if carried is not None and entering.valid is not None:
                carried = carried * entering.valid  # unused slots have taken a real token's along
            raw = carried
            if plan.heads:
                asking = min(plan.probe.queries, entering.width)
                query = self.probes(normed[:, -asking:], *(table[:, -asking:] for table in tables))
                unseen = outside(slots, asking, plan.window)
                # a fused projection gives every device all heads
                shared = getattr(attention, self.by_heads).weight if hasattr(attention, self.by_heads) else None
                raw = probe_scores(query, key, attention.scaling, entering.valid, unseen)
                raw = reduce_heads(raw, plan.heads, shared)
                if plan.probe.carry and carried is not None:
                    raw = raw + plan.probe.carry * carried
            score = pool_scores(raw, plan.probe.pool, entering.valid)
            ranked = plan.pin(score)
        if plan.skips:
            chosen = select(ranked, raw, active.width, active.rows, entering.valid)
            normed, key = take(normed, chosen), take(key.transpose(1, 2), chosen).transpose(1, 2)
            tables = tuple(take(table, chosen) for table in tables)

        # Attention among the active tokens, in their order and with their original positions.
        query, key, value = self.attended(normed, key, past_key_values, *tables)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, type(self).eager_attention
        )
        attend = partial(attend, attention, dropout=0.0, scaling=attention.scaling)
        if plan.window is None:
            output, _ = attend(query, key, value, attention_mask)
        else:
            places = slots if chosen is None else take(slots, chosen)
            output = windowed(attend, query, key, value, places, plan.window, active.valid)
        output = self.normed("after_attention", attention.o_proj(output.reshape(*output.shape[:2], -1)))
        if chosen is None:
            hidden_states = hidden_states + output
        else:
            hidden_states = put(hidden_states, chosen, take(hidden_states, chosen) + output, active.valid)

        # LTP: the feed-forward network on the candidates with the largest (predicted norm x attention score).
        if changed is entering:
            hidden_states = hidden_states + self.feed_forward(hidden_states)
        else:
            change = ranked
            if plan.feed_forward != "attention":
                change = plan.pin(self.proxy(hidden_states, plan.feed_forward == "relative") * score)
            where = select(change, raw, changed.width, changed.rows, entering.valid)
            states = take(hidden_states, where)
            hidden_states = put(hidden_states, where, states + self.feed_forward(states), changed.valid)

        keep = None
        if plan.prunes:
            keep = select(ranked, raw, plan.leaving.width, plan.leaving.rows, entering.valid)
        return hidden_states, chosen, keep, raw


class SkippingPreTrainedModel:
    """Mixed into both model classes of a family: how proxies without trained weights are initialised."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, FeedForwardProxy):
            for parameter in module.parameters():
                init.normal_(parameter, std=self.config.initializer_range)  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the stock class; transformers reads it from a class's own file, and this family's experts are stock."""
        stock: Any = next(kind for kind in cls.__mro__ if kind.__module__.startswith("transformers.models."))
        return stock._can_set_experts_implementation()

    @staticmethod
    def skipped(cache: Cache) -> list[dict[str, Any]]:
        """What a prefill did, read from its cache, for each layer: `candidates`, `active` (tokens that attention ran
        on; the feed-forward network ran on as many), `cached` (those a window still sees, and the tokens since),
        `bytes` of keys and values, and `positions` of the active tokens if the call asked for them with
        `spts={"positions": True}`. In a padded batch the counts are the longest row's."""
        rows = []
        for held in cache.layers:
            skipping = isinstance(held, SkippedCacheLayer)
            tensors = (held.keys, held.values) if held.is_initialized else ()
            rows.append(
                {
                    "candidates": held.entering if skipping else held.get_seq_length(),
                    "active": held.active if skipping else held.get_seq_length(),
                    "cached": held.keys.shape[-2] if held.is_initialized else 0,
                    "bytes": sum(t.numel() * t.element_size() for t in tensors),
                    "positions": held.positions if skipping else None,
                }
            )
        return rows


class SkippingModel(SkippingPreTrainedModel):
    """Mixed into a family's decoder: runs the prefill stage by stage, and later tokens on caches of unequal length."""

    layer_class: Any
    output_class: Any = BaseModelOutputWithPast

    def __init__(self, config: Any):
        super().__init__(config)
        if config.spts is not None:
            schedule = config.schedule()
            for index in range(schedule.start, config.num_hidden_layers):
                layer = self.layer_class(config, index)
                size = schedule.proxy_of(index)
                shape = config.hidden_size, size.channels, size.rank
                layer.proxy = FeedForwardProxy(*shape, activation_of(config), config.rms_norm_eps)
                self.layers[index] = layer
            self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        spts: "bool | dict | Skip | None" = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As stock. `spts`: True, or a dict of schedule changes, skips tokens in the prefill. All positions are
        returned here, so the default is not to skip; a skipped token shows the state it kept.

        Raises:
            ValueError: for inputs that skipping can't handle, with the way round it.
        """
        cache_empty = past_key_values is None or past_key_values.get_seq_length() == 0
        if not cache_empty:
            check_cache(past_key_values, self.config.num_hidden_layers)
        if cache_empty and spts not in (None, False):
            request = spts if isinstance(spts, Skip) else self.request(spts, last=None)
            if self.training:
                raise ValueError("tokens are skipped in inference only; call model.eval(), or pass spts=False")
            if wants_every_layer(self.config, kwargs):
                raise ValueError("hidden states, attentions and routing of every layer need spts=False")
            if not all(hasattr(layer, "proxy") for layer in self.layers[request.schedule.start :]):
                raise ValueError("the spts block was set or changed after this model was built; load it again")
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
            if is_packed(position_ids, attention_mask, past_key_values, kwargs):
                raise ValueError("skipping can't handle several sequences packed into one row; pass spts=False")
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            lengths = request.prompt_lengths(attention_mask, *inputs_embeds.shape[:2])
            if lengths:
                return self._prefill(
                    request, lengths, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, **kwargs
                )
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        if not cache_empty and any(isinstance(held, SkippedCacheLayer) for held in past_key_values.layers):
            return self._continue(**inputs, **kwargs)
        return super().forward(**inputs, **kwargs)

    def request(self, spts: bool | dict, last: int | None) -> Skip:
        """Read the `spts` argument of a call, of which the `last` positions are to be returned.

        Raises:
            TypeError, ValueError: if it is not valid, or the model is run without some of its layers.
        """
        self._check_depth()
        return Skip.of(self.config, spts, last)

    def _check_depth(self) -> None:
        """Raises ValueError if the model is run without some of its layers."""
        if (depth := self.config.num_hidden_layers) != len(self.layers):
            raise ValueError(
                f"the config says {depth} layers and the model has {len(self.layers)}, as where it exits early; "
                "run the prompt with spts=False"
            )

    @capture_outputs
    def _prefill(
        self,
        request: Skip,
        lengths: list[int],
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Prefill of a prompt of `lengths` tokens a row; tokens behind the prompt's end follow as a later chunk."""
        schedule, slots = request.schedule, inputs_embeds.shape[1]
        device = inputs_embeds.device
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(slots, device=device)[None]
        if request.behind:
            end = slots - request.behind
            cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            prompt = self._prefill(
                replace(request, last=1, behind=0),
                lengths,
                inputs_embeds[:, :end],
                None if attention_mask is None else attention_mask[:, :end],
                position_ids[:, :end],
                cache,
                use_cache,
                **kwargs,
            )
            for held in cache.layers:
                if isinstance(held, DynamicSlidingWindowLayer) and held.record_past:
                    held.crop(0)  # as `generate` does after every pass: what is recorded is of one pass
            rest = self._continue(
                inputs_embeds=inputs_embeds[:, end:],
                attention_mask=attention_mask,
                position_ids=position_ids[:, end:],
                past_key_values=cache,
                **kwargs,
            )
            prompt.past_key_values = past_key_values
            prompt.last_hidden_state = torch.cat([prompt.last_hidden_state, rest.last_hidden_state], dim=1)
            return prompt

        kinds, windows = layer_kinds(self.config), layer_windows(self.config)
        plans = layer_plans(schedule, windows, lengths, device)
        if any(plan.window for plan in plans):
            self._check_windows()
        if past_key_values is not None:
            prepare_cache(past_key_values, plans, slots, schedule, windows)
        rotary = position_tables(self.rotary_emb, self.config, inputs_embeds, position_ids)
        masks: dict[Any, Any] = {}
        states = inputs_embeds
        for index, layer in enumerate(self.layers[: schedule.start]):
            if (kind := kinds[index]) not in masks:
                seen = attention_mask, past_key_values, position_ids
                masks[kind] = MASKS[kind](self.config, states, *seen, layer_idx=index)
            states = layer(
                states,
                attention_mask=masks[kind],
                position_embeddings=rotary[kind],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        width = max(lengths)
        every = states.clone() if request.last is None else None
        where = torch.arange(slots - width, slots, device=device).expand(states.shape[0], -1)  # the candidates' slots
        # A copy, since skipping layers add in place and someone's hook may hold what the last dense layer returned.
        states = states[:, -width:].clone()
        rotary = {kind: tuple(table[:, -width:] for table in tables_of(made)) for kind, made in rotary.items()}
        masks, carried, ends = {}, None, torch.tensor(lengths, device=device)[:, None]
        for index, plan in enumerate(plans, schedule.start):
            layer, active = self.layers[index], plan.active
            if plan.window is None and id(active) not in masks:  # not by width: rows may be filled differently
                shape = states.new_empty(states.shape[0], active.width, 0)
                masks = {id(active): create_causal_mask(self.config, shape, active.valid, None)}
            states, chosen, keep, scores = layer(
                states,
                plan=plan,
                attention_mask=masks.get(id(active)),
                position_embeddings=rotary[kinds[index]],
                slots=where,
                past_key_values=past_key_values,
                carried=carried,
            )
            carried = carried if scores is None else scores
            if past_key_values is not None and (request.positions or windows[index] is not None):
                held = where if chosen is None else take(where, chosen.to(device))
                note_positions(past_key_values.layers[index], held, slots, ends, active)
            if keep is not None:
                if every is not None:
                    every = put(every, where, states.to(device), plan.entering.valid)
                here = keep.to(device)  # layers may be on several devices
                states, where = take(states, keep), take(where, here)
                rotary = {kind: tuple(take(table, here) for table in tables) for kind, tables in rotary.items()}
                carried = None if carried is None else take(carried, keep)
        states = states[:, -1:] if every is None else put(every, where, states.to(device), plan.leaving.valid)
        return self.output_class(last_hidden_state=self.norm(states), past_key_values=past_key_values)

    @capture_outputs
    def _continue(
        self,
        past_key_values: Cache,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens after a skipped prefill: the stock layers, each with a mask for what its own cache holds."""
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + states.shape[1], device=states.device)[None]
        self._check_depth()
        total = past_key_values.get_seq_length() + states.shape[1]
        if attention_mask is not None and attention_mask.shape != (states.shape[0], total):
            raise ValueError(
                f"after a skipped prefill the attention mask must have the shape {(states.shape[0], total)} (rows, all "
                f"tokens so far), not {tuple(attention_mask.shape)}; or prefill with spts=False"
            )
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        kinds, rotary = layer_kinds(self.config), position_tables(self.rotary_emb, self.config, states, position_ids)
        masks: dict[Any, Any] = {}
        for index, layer in enumerate(self.layers):
            held, kind = past_key_values.layers[index], kinds[index]
            if not isinstance(held, SkippedCacheLayer):
                if (group := kind) not in masks:
                    masks[group] = MASKS[kind](self.config, states, attention_mask, past_key_values, layer_idx=index)
            elif isinstance(held, WindowCacheLayer) and held.window < total:
                self._check_windows(alone=states.shape[1] == 1)
                group = f"layer {index}"  # such layers each hold other tokens
                seen, less = held.window_masks(attention_mask, states)
                masks[group] = create_causal_mask(
                    self.config, states, seen, past_key_values, and_mask_function=less, layer_idx=index
                )
            elif (group := f"stage {held.stage}, {held.get_seq_length()} tokens") not in masks:
                if states.shape[1] == 1 and masks.get(FULL, 0) is None and held.valid is None:
                    masks[group] = None  # one new token and no padding: if a dense layer needs no mask, no layer does
                else:
                    seen = held.attention_mask(attention_mask, states)
                    masks[group] = create_causal_mask(self.config, states, seen, past_key_values, layer_idx=index)
            states = layer(
                states,
                attention_mask=masks[group],
                position_embeddings=rotary[kind],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return self.output_class(last_hidden_state=self.norm(states), past_key_values=past_key_values)

    def _check_windows(self, alone: bool = False) -> None:
        """Raises ValueError if attention can't be told windows in places of the prompt; a new token `alone` needs no
        more than a mask of padding."""
        if self.config._attn_implementation not in ("sdpa", "eager") and not alone:
            raise ValueError("skipping in layers with windows needs attn_implementation='sdpa' (or 'eager')")


class SkippingForCausalLM(SkippingPreTrainedModel):
    """Mixed into a family's causal language model: decides when a forward pass is a prompt's prefill."""

    model_class: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        spts: bool | dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock, and tokens are skipped when this is the prefill of a prompt whose end is known: the cache is empty
        and `logits_to_keep` = k > 0, as `generate` asks for; the last k - 1 tokens are then no part of the prompt.

        `spts` (accepted by `generate` too): False never skips; a dict changes top-level keys of the config's `spts`
        block for this call; True skips even where every position's logits are asked for, and then a skipped token
        shows the state it kept.
        """
        last = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None
        cached = past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache)
        if spts is None:
            one_prompt = last is not None and cached and labels is None and not self.training
            whole = self.config.num_hidden_layers == len(self.model.layers)  # not where it exits early
            able = whole and self.config.spts is not None
            spts = one_prompt and able and not wants_every_layer(self.config, kwargs)
        if spts is not False and (past_key_values is None or past_key_values.get_seq_length() == 0):
            spts = self.model.request(spts, last)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            spts=spts,
            **kwargs,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As stock. `spts` goes for every prompt that the call runs. Where it is not given, all of them run dense if
        there is guidance (whose negative prompt is no part of the cache), an early exit (which runs without some of
        the layers) or a prompt in chunks (which don't show where it ends)."""
        outer, depth = ASKED.get(), self.config.num_hidden_layers
        if outer is not None and outer.model is self:  # token healing asks for a token within a call
            kwargs.setdefault("spts", outer.spts)
        token = ASKED.set(Asked(self, kwargs.get("spts")))
        try:
            return super().generate(*args, **kwargs)
        finally:
            ASKED.reset(token)
            self.config.num_hidden_layers = depth  # an early exit changes it, and leaves it so after an error

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        """As stock; decides whether the call's prompts all run dense."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        several = config.guidance_scale not in (None, 1) or config.assistant_early_exit is not None
        if config.prefill_chunk_size is not None or (several and model_kwargs.get("spts") is None):
            model_kwargs["spts"] = False
        if (asked := ASKED.get()) is not None and asked.model is self:
            asked.spts = model_kwargs.get("spts")
        return config, model_kwargs

    def _get_logits_processor(self, *args: Any, model_kwargs: dict | None = None, **kwargs: Any) -> LogitsProcessorList:
        """As stock; has a negative prompt, which guidance runs by itself, skipped if the prompt is."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        if model_kwargs is None:
            return processors
        for index, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                if model_kwargs.get("spts") is None:  # the caller's own
                    model_kwargs["spts"] = False
                elif isinstance(processor.model, nn.Module) and any(part is self for part in processor.model.modules()):
                    processors[index] = guide = copy.copy(processor)
                    guide.model = partial(processor.model, spts=model_kwargs["spts"], logits_to_keep=1)
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; an assistant is told not to skip, or nothing: changes of the schedule are this model's."""
        assistant, told = kwargs.get("assistant_model"), dict(kwargs["model_kwargs"])
        spts = told.pop("spts", None)
        if assistant is None or (spts is False and "spts" in inspect.signature(assistant.forward).parameters):
            told["spts"] = False
        return super()._get_candidate_generator(*args, **{**kwargs, "model_kwargs": told})


@dataclass
class Asked:
    """The `spts` of the call of `generate` that runs on a model."""

    model: Any
    spts: bool | dict | None


ASKED: ContextVar[Asked | None] = ContextVar("ASKED", default=None)


def activation_of(config: Any) -> str:
    """Name of the feed-forward network's activation function."""
    return getattr(config, "hidden_act", None) or config.hidden_activation


def wants_every_layer(config: Any, kwargs: dict) -> bool:
    """Whether a call asks for hidden states, attentions or routing of every layer, which only a dense pass has."""
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


def is_packed(position_ids: torch.Tensor | None, mask: Any, cache: Cache | None, kwargs: dict) -> bool:
    """Whether a call means several sequences in one row, by what the stock model takes as a sign of it."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    if position_ids is None or mask is not None or cache is not None:
        return False
    return bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())


def layer_plans(schedule: Any, windows: list[int | None], lengths: list[int], device: torch.device) -> list[LayerPlan]:
    """Plans of the skipping layers, for rows of `lengths` tokens. Equal counts share one `Count`."""
    known: dict[tuple[int, ...], Count] = {}
    plans = []
    for layer in range(schedule.start, len(windows)):
        columns = zip(*(schedule.counts(layer, length) for length in lengths), strict=True)
        counts = [known.get(column) or known.setdefault(column, Count.of(column, device)) for column in columns]
        kept = schedule.keep_first, schedule.always_last
        window = windows[layer]
        window = window if window is not None and window < max(lengths) else None
        heads = schedule.probe.heads_of(layer)
        plans.append(LayerPlan(*counts, *kept, schedule.probe, heads, schedule.feed_forward, window))
    return plans


def check_cache(cache: Cache, depth: int) -> None:
    """Raises ValueError if the first `depth` layers of a cache do not tell of equally many tokens: a layer's length is
    no longer known after keys and values were moved into another cache, or if it alone was cropped or changed."""
    first = None
    for index, held in enumerate(getattr(cache, "layers", ())[:depth]):
        if not isinstance(held, DynamicLayer):
            continue
        skipped = isinstance(held, SkippedCacheLayer)
        count = held.prompt_length + held.later if skipped else held.get_seq_length()
        first = count if first is None else first
        if count != first:
            raise ValueError(
                f"layer {index} of the cache does not fit the others ({count} tokens, the first has {first}); after a "
                "skipped prefill use the cache itself or a deep copy, not one made of its keys and values, or run the "
                "prompt again, with spts=False if it has to be rebuilt"
            )


def note_positions(held: SkippedCacheLayer, slots: torch.Tensor, width: int, ends: torch.Tensor, active: Count) -> None:
    """Keep with a cache layer which tokens of each row's prompt, of `ends` (B, 1) tokens, were active there; `slots`
    (B, active) of `width`."""
    held.ends = ends
    positions = slots - (width - ends)
    held.positions = positions if active.valid is None else positions.masked_fill(~active.valid, -1)


def prepare_cache(cache: Cache, plans: list[LayerPlan], slots: int, schedule: Any, windows: list[int | None]) -> None:
    """Give the skipping layers' caches the class that knows which tokens they hold.

    Raises:
        ValueError: if the cache is of a kind that can't hold layers of unequal length.
    """
    last_layer = schedule.start + len(plans)
    while cache.layer_class_to_replicate is not None and len(cache.layers) < last_layer:
        cache.layers.append(cache.layer_class_to_replicate())
    for index, plan in enumerate(plans, schedule.start):
        old, window = cache.layers[index], windows[index]
        if type(old) not in (DynamicLayer, DynamicSlidingWindowLayer, SkippedCacheLayer, WindowCacheLayer):
            raise ValueError(
                f"skipping needs a dynamic cache, this one has {type(old).__name__}; "
                "leave cache_implementation unset, or pass spts=False"
            )
        stage = schedule.stage_of(index)
        tail = min(plan.keep_last, plan.active.width)
        counts = slots, plan.entering.width, plan.active, tail, stage
        cache.layers[index] = made = SkippedCacheLayer(*counts) if window is None else WindowCacheLayer(window, *counts)
        if isinstance(made, WindowCacheLayer) and getattr(old, "record_past", False):
            made.activate_past_recording()
