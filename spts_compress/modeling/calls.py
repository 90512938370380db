"""When a call skips, and what it refuses."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .cache import SkippedCacheLayer, fill_layers
from .generation import GenerationCalls
from .static import StaticKeptLayer, check_room
from .stock_layer import SkippingPreTrainedModel, StockLayer, modules_in
from .update import QUERIES, UPDATES


@dataclass(frozen=True)
class SkipRequest:
    """A request to skip.

    `last`: how many last positions to return, of which the first is the prompt's end; None: all, with the dense shape.
    `positions`: whether the caches note the positions of the tokens they keep. `graphs`: whether the prefill may be a
    CUDA graph.
    """

    schedule: Any
    last: int | None = None
    positions: bool = False
    graphs: bool = False

    @property
    def suffix_length(self) -> int:
        """How many of the tokens given come after the prompt's end."""
        return 0 if self.last is None else self.last - 1

    @classmethod
    def of(cls, config: Any, spts: Any, last: int | None) -> "SkipRequest":
        """Read the `spts` argument of a call."""
        if not isinstance(spts, bool | dict):
            raise TypeError(f"spts must be None, True, False or a dict of schedule changes, not {type(spts).__name__}")
        if config.spts is None:
            raise ValueError("this model's config has no spts block, so it can't skip tokens")
        changes = dict(spts) if isinstance(spts, dict) else {}
        positions = changes.pop("positions", False)
        # What was fitted may be left out.
        fixed = [key for key in ("start", "proxy", "update") if changes.get(key) not in (None, config.spts.get(key))]
        if fixed:
            raise ValueError(f"{', '.join(fixed)} can't be changed for one call: what was fitted is fixed")
        schedule = config.schedule(**changes)
        if "probe" in changes and schedule.probe.rank not in (0, config.schedule().probe.rank):
            raise ValueError("probe.rank can't be changed for one call, but to 0: what was fitted is fixed")
        return cls(schedule, last, positions)

    def prompt_lengths(self, attention_mask: torch.Tensor | None, batch: int, slots: int) -> list[int]:
        """Prompt tokens of each row, without padding; empty if there is nothing to skip.

        Raises:
            ValueError: if the mask is anything but padding on the left.
        """
        if slots - self.suffix_length < 1 or not self.schedule.skips(slots - self.suffix_length):
            return []
        if attention_mask is None:
            return [slots - self.suffix_length] * batch
        advice = "pad on the left (tokenizer.padding_side = 'left'), or pass spts=False"
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise ValueError(f"skipping needs an attention mask of 2 dimensions: {advice}")
        if attention_mask.shape[1] != slots:
            raise ValueError(f"the attention mask has {attention_mask.shape[1]} columns for {slots} tokens")
        real = attention_mask.bool()
        left_padded = (real[:, 1:] >= real[:, :-1]).all() & real[:, -1:].all()
        counted = torch.cat([real.sum(1) - self.suffix_length, left_padded.long()[None]])
        *lengths, fine = counted.tolist()  # the one time this waits for the device
        if not fine:
            raise ValueError(f"skipping can't handle padding on the right or inside a prompt: {advice}")
        if min(lengths) < 1:
            raise ValueError(
                f"a row has no more than logits_to_keep = {self.suffix_length + 1} tokens; pass spts=False"
            )
        return lengths if any(map(self.schedule.skips, lengths)) else []


def is_packed(position_ids: torch.Tensor | None, mask: Any, cache: Cache | None, kwargs: dict) -> bool:
    """Whether a call means several sequences in one row, by what the stock model takes as a sign of it."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    if position_ids is None or mask is not None or cache is not None:
        return False
    return bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())


def wants_every_layer(config: Any, kwargs: dict) -> bool:
    """Whether a call asks for hidden states, attentions or routing of every layer, which only a dense pass has."""
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


def read_request(model: Any, spts: bool | dict | SkipRequest, last: int | None) -> SkipRequest:
    """Read the `spts` argument of a call, of which the `last` positions are to be returned.

    Raises:
        TypeError, ValueError: if it is not valid, or the model is run without some of its layers.
    """
    check_depth(model)
    return spts if isinstance(spts, SkipRequest) else SkipRequest.of(model.config, spts, last)


def check_depth(model: Any) -> None:
    """Raises ValueError if the model is run without some of its layers."""
    if (depth := model.config.num_hidden_layers) != len(model.layers):
        raise ValueError(
            f"the config says {depth} layers and the model has {len(model.layers)}, as where it exits early; "
            "run the prompt with spts=False"
        )


def check_cache(cache: Cache, layers: range) -> None:
    """Raises ValueError if these `layers` of a cache do not tell of equally many tokens: a layer's length is no longer
    known after keys and values were moved into another cache, or if it alone was cropped or changed."""
    first = None
    for index, held in enumerate(getattr(cache, "layers", ())):
        if index not in layers or not isinstance(held, DynamicLayer):
            continue
        count = held.tokens_seen() if isinstance(held, SkippedCacheLayer) else held.get_seq_length()
        first = count if first is None else first
        if count != first:
            raise ValueError(
                f"layer {index} of the cache does not fit the others ({count} tokens, the first has {first}); after a "
                "skipped prefill use the cache itself or a deep copy, not one made of its keys and values, or run the "
                "prompt again, with spts=False if it has to be rebuilt"
            )


def is_changed(attention: Any) -> bool:
    """Whether someone sees the calls of a stock attention module, or changed what they do: other than transformers,
    whose hooks record outputs, and accelerate, which brings weights."""
    hooks = *attention._forward_hooks.values(), *attention._forward_pre_hooks.values()
    seen = any(getattr(hook, "__module__", None) != capture_outputs.__module__ for hook in hooks)
    seen = seen or bool(attention._backward_hooks or attention._backward_pre_hooks)
    own = "forward" in vars(attention) and not brings_weights(attention)
    return seen or own or not type(attention).forward.__module__.startswith("transformers.")


def has_steps(layer: Any) -> bool:
    """Whether a layer may run step by step: no one put another in its place, or changed what it or attention does."""
    own = "forward" in vars(layer) and not brings_weights(layer)
    return isinstance(layer, StockLayer) and not own and not is_changed(layer.self_attn)


def brings_weights(module: Any) -> bool:
    """Whether a module's own forward is accelerate's, with its own hooks alone, around that of its class."""
    hook, forward = getattr(module, "_hf_hook", None), getattr(vars(module)["forward"], "func", None)
    hooks = getattr(hook, "hooks", [hook])
    theirs = all(getattr(part, "__module__", "").startswith("accelerate.") for part in (forward, *map(type, hooks)))
    # Not one that also brings the parts' weights: called by themselves, these have none.
    theirs = theirs and not any(getattr(each, "offload", False) and each.place_submodules for each in hooks)
    return theirs and getattr(module._old_forward, "__func__", None) is type(module).forward


def counts_tokens(layer: Any) -> bool:
    """Whether PEFT tells a part of a layer where in the prompt its adapter begins to work."""
    hooks = (hook for module in modules_in(layer) for hook in module._forward_pre_hooks.values())
    return any("alora_offsets" in getattr(hook, "keywords", {}) for hook in hooks)


def holds_skipped(cache: Any) -> bool:
    """Whether some layer of a cache skipped tokens."""
    return any(isinstance(held, SkippedCacheLayer | StaticKeptLayer) for held in getattr(cache, "layers", ()))


def new_tokens(given: tuple[Any, Any]) -> int:
    """How many tokens a call gives, as ids or states."""
    return (given[1] if given[0] is None else given[0]).shape[1]


def has_begun(cache: Cache | None, given: tuple[Any, Any], layer: int = 0) -> bool:
    """Whether a cache holds tokens before those `given` (ids, or states). A static cache counts on the device, and a
    compiled step must not wait for it: with one token, which has nothing to skip, it counts as begun unasked."""
    if cache is None:
        return False
    return (new_tokens(given) == 1 and cache.is_compileable) or bool(cache.get_seq_length(layer) > 0)


def check_call(
    model: Any,
    request: SkipRequest,
    tokens: tuple[Any, Any],
    position_ids: torch.Tensor | None,
    attention_mask: Any,
    cache: Cache | None,
    kwargs: dict,
) -> None:
    """Raises ValueError for a call that can't be skipped in."""
    if model.training:
        raise ValueError("tokens are skipped in inference only; call model.eval(), or pass spts=False")
    if wants_every_layer(model.config, kwargs):
        raise ValueError("hidden states, attentions and routing of every layer need spts=False")
    parts = [*(["proxy"] if request.schedule.proxy else []), *(UPDATES if request.schedule.update else [])]
    parts += [QUERIES] if request.schedule.probe.rank else []
    if not all(hasattr(layer, part) for layer in model.layers[request.schedule.start :] for part in parts):
        raise ValueError("the spts block was set or changed after this model was built; load it again")
    if (tokens[0] is None) == (tokens[1] is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if any(map(counts_tokens, model.layers[request.schedule.start :])):
        raise ValueError("activated LoRA counts tokens from the prompt's end, which skipping removes; pass spts=False")
    if any(is_changed(layer.self_attn) for layer in model.layers[request.schedule.start :]):
        raise ValueError(
            "hooks on self_attn, and another forward of it, don't run where tokens are skipped: change its parts, or "
            "pass spts=False"
        )
    if is_packed(position_ids, attention_mask, cache, kwargs):
        raise ValueError("skipping can't handle several sequences packed into one row; pass spts=False")


class DecoderCalls(SkippingPreTrainedModel):
    """Mixed into a family's decoder."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        spts: bool | dict | SkipRequest | None = None,
        first_layer: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As stock. `spts`: True, or a dict of schedule changes, skips tokens in the prefill. All positions are
        returned here, so the default is not to skip; a skipped token shows the state it kept. With `first_layer` = k
        only the layers from k on run, and `inputs_embeds` are the states (B, n, D) before layer k.

        Raises:
            ValueError: for inputs that skipping can't handle, with the way round it.
        """
        cache, tokens = past_key_values, (input_ids, inputs_embeds)
        if first_layer and isinstance(cache, StaticCache):
            raise ValueError("first_layer needs a dynamic cache: a static one's first layer counts the text's tokens")
        begun = has_begun(cache, tokens, first_layer)
        lengths: list[int] = []
        if begun:
            check_cache(cache, range(first_layer, self.config.num_hidden_layers))
        elif spts not in (None, False):
            request = read_request(self, spts, last=None)
            check_call(self, request, tokens, position_ids, attention_mask, cache, kwargs)
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            lengths = request.prompt_lengths(attention_mask, *inputs_embeds.shape[:2])
        if not (lengths or first_layer or (begun and holds_skipped(cache))):
            stock_static = begun and isinstance(cache, StaticCache)
            if stock_static and (new_tokens(tokens) > 1 or hasattr(cache, "to_come")):  # no step, which may be compiled
                check_room(cache, self.config, new_tokens(tokens))
            given: dict[str, Any] = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=cache)
            given.update(attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
            return super().forward(**given, **kwargs)
        keeps = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache(config=self.config) if cache is None and (keeps or first_layer) else cache
        if first_layer and cache is not None:
            fill_layers(cache, len(self.layers))
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(states.shape[1], device=states.device)[None]
            position_ids = position_ids + cache.get_seq_length(first_layer) if begun else position_ids
        options = {"use_cache": use_cache, **{name: value for name, value in kwargs.items() if name != "return_dict"}}
        run = states, attention_mask, position_ids, cache, first_layer, options
        return self._run(run, request if lengths else None, lengths, **kwargs)


class SkippingForCausalLM(GenerationCalls):
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
        spts: Any = None,
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
        if spts is not False and not has_begun(past_key_values, (input_ids, inputs_embeds)):
            spts = read_request(self.model, spts, last)
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
