"""The stock layers run one by one: those before the first skipping layer, and all of them for tokens after the
prompt, each with a mask for what its own cache holds."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .cache import SkippedCacheLayer
from .calls import DecoderCalls, SkipRequest, check_depth, has_steps
from .profiling import part
from .static import StaticKeptLayer, is_static, to_dynamic, to_static
from .stock_layer import FULL, MASKS, layer_kinds, position_tables

STOCK_ON = ("cpu",)  # where fewer passes over memory save no time: small models there took up to a tenth more


@dataclass(frozen=True)
class Pass:
    """What a forward pass runs on: `states` (B, n, D) before `first_layer`; `mask`, which of the tokens so far are not
    padding (B, tokens so far; None: all are); their positions, the cache, and what the caller gave beside. `causal`:
    attention's own causality is all that has to be masked."""

    states: torch.Tensor
    mask: Any
    position_ids: torch.Tensor
    cache: Any
    first_layer: int
    options: dict[str, Any]
    causal: bool = False

    def split(self, end: int) -> "tuple[Pass, Pass]":
        """The tokens before `end`, and those from there on, which come later and so have the whole mask."""
        mask = None if self.mask is None else self.mask[:, :end]
        first = replace(self, states=self.states[:, :end], mask=mask, position_ids=self.position_ids[:, :end])
        return first, replace(self, states=self.states[:, end:], position_ids=self.position_ids[:, end:])


class StockRuns(DecoderCalls):
    """Mixed into a family's decoder."""

    output_class: Any = BaseModelOutputWithPast

    @capture_outputs
    def _run(self, given: tuple, request: SkipRequest | None, lengths: list[int], **_: Any) -> BaseModelOutputWithPast:
        """Run a prompt of `lengths` tokens a row as its `request` says, and tokens of the pass that come after its end
        as a later chunk. Without a request, all tokens come after a prompt."""
        run = Pass(*given)
        single = run.states.shape[1] == 1 and is_static(run.cache)  # a step, which may be compiled
        static = isinstance(run.cache, StaticCache) and not single
        if static:
            to_dynamic(run.cache, self.config, run.states.shape[1])
            request = None if request is None else replace(request, graphs="graphs" in vars(run.cache))
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
        if static:
            to_static(run.cache, run.mask)
        return self.output_class(last_hidden_state=self.norm(states), past_key_values=run.cache)

    def end_pass(self, cache: Any) -> None:
        """Called between the passes of one call; windows.py has something to do then."""

    def _rotary(self, run: Pass) -> dict[str, Any]:
        """Rotary tables by the kind of attention."""
        return position_tables(self.rotary_emb, self.config, run.states, run.position_ids)

    def _dense(self, run: Pass, layers: range, rotary: dict[str, Any]) -> torch.Tensor:
        """States (B, n, D) of a whole prompt after some layers; on a GPU in steps, but for those with windows and those
        that someone changed."""
        kinds, masks, states = layer_kinds(self.config), dict[str, Any](), run.states
        with part("dense layers"):
            for index in layers:
                if (kind := kinds[index]) not in masks:
                    seen = run.mask, run.cache, run.position_ids
                    masks[kind] = None if run.causal else MASKS[kind](self.config, states, *seen, layer_idx=index)
                steps = kind == FULL and states.device.type not in STOCK_ON and has_steps(self.layers[index])
                how = {"in_steps": True} if steps else {}
                states = self._stock(run, index, states, masks[kind], rotary[kind], **how)
        return states

    def _stock(self, run: Pass, index: int, states: torch.Tensor, mask: Any, tables: Any, **how: Any) -> torch.Tensor:
        return self.layers[index](
            states,
            attention_mask=mask,
            position_embeddings=tables,
            position_ids=run.position_ids,
            past_key_values=run.cache,
            **how,
            **run.options,
        )

    def _later(self, run: Pass) -> torch.Tensor:
        """States (B, m, D) of tokens after the prompt: the stock layers, each with a mask for what its cache holds."""
        check_depth(self)
        states, total = run.states, run.cache.get_seq_length(run.first_layer) + run.states.shape[1]
        static = is_static(run.cache)  # whose layers know what is padding: nothing here may wait for the device
        first = next((held for held in run.cache.layers if isinstance(held, SkippedCacheLayer)), None)
        if run.mask is not None:
            expected = states.shape[0], run.mask.shape[-1] if static else total
            if run.mask.shape != expected:
                raise ValueError(
                    f"after a skipped prefill the attention mask must have the shape {expected} (rows, all tokens so "
                    f"far), not {tuple(run.mask.shape)}; or prefill with spts=False"
                )
        elif first is not None and first.mask is not None:  # no static one; without a mask nothing is padding
            run = replace(run, mask=torch.ones_like(first.mask))
        if run.mask is not None and not static:
            fits = [] if first is None else [first.fits(run.mask)]
            whole, *alike = torch.stack([run.mask.bool().all(), *fits]).tolist()  # waits for the device once
            if not all(alike):
                raise ValueError(
                    "the attention mask (none: no padding) is another one for the prompt than the prefill had, which "
                    "chose its tokens by it: give that one, or run the prompt again, with spts=False if its mask is to "
                    "change"
                )
            run = replace(run, mask=None) if whole else run
        kinds, rotary = layer_kinds(self.config), self._rotary(run)
        masks: dict[Any, Any] = {}
        for index in range(run.first_layer, len(self.layers)):
            mask = self.later_mask(run, index, states, kinds[index], total, masks)
            states = self._stock(run, index, states, mask, rotary[kinds[index]])
        return states

    def later_mask(self, run: Pass, layer: int, states: torch.Tensor, kind: str, total: int, masks: dict) -> Any:
        """The mask of tokens after the prompt in a layer; layers whose caches hold as much share theirs in `masks`."""
        held = run.cache.layers[layer]
        if isinstance(held, StaticKeptLayer):
            if held.group not in masks:
                slots = held.take_step(run.mask)
                masks[held.group] = create_causal_mask(self.config, states, slots, run.cache, layer_idx=layer)
            return masks[held.group]
        if not isinstance(held, SkippedCacheLayer):
            if kind not in masks:
                masks[kind] = MASKS[kind](self.config, states, run.mask, run.cache, layer_idx=layer)
            return masks[kind]
        group = f"stage {held.stage}, {held.get_seq_length()} tokens"
        if group not in masks:
            if states.shape[1] == 1 and masks.get(FULL, 0) is None and held.valid is None:
                masks[group] = None  # one new token and no padding: if a dense layer needs no mask, no layer does
            else:
                seen = held.attention_mask(run.mask, states)
                masks[group] = create_causal_mask(self.config, states, seen, run.cache, layer_idx=layer)
        return masks[group]
