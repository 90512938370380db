"""transformers' ways of generating that run more than one prompt, or less than all layers."""

import copy
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import LogitsProcessorList, StaticCache, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.masking_utils import create_masks_for_generate

from .static import is_static, to_dynamic
from .stock_layer import SkippingPreTrainedModel


@dataclass
class Asked:
    """The `spts` of the call of `generate` that runs on a model; `depth`: its layers before an early exit."""

    model: Any
    spts: bool | dict | None
    depth: int | None = None


ASKED: ContextVar[Asked | None] = ContextVar("ASKED", default=None)


class GenerationCalls(SkippingPreTrainedModel):
    """Mixed into a family's causal language model: treats all prompts of one call of `generate` alike."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As stock. `spts` goes for every prompt that the call runs; it may stand in the generation config. Where it
        is not given, all of them run dense if there is guidance (whose negative prompt is no part of the cache), an
        early exit (which runs without some of the layers) or a prompt in chunks (which don't show where it ends).

        Raises:
            ValueError: if `spts` asks to skip in a prompt in chunks.
        """
        outer = ASKED.get()
        if outer is not None and outer.model is self:  # token healing asks for a token within a call
            kwargs.setdefault("spts", outer.spts)
        if kwargs.get("spts", False) is None:  # as if it were not given, or it would undo the generation config's
            del kwargs["spts"]
        token = ASKED.set(asked := Asked(self, kwargs.get("spts")))
        try:
            return super().generate(*args, **kwargs)
        finally:
            ASKED.reset(token)
            if asked.depth is not None:  # an early exit changes it, and leaves it so after an error
                self.config.num_hidden_layers = asked.depth

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        """As stock; decides whether the call's prompts all run dense."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        several = config.guidance_scale not in (None, 1) or config.assistant_early_exit is not None
        spts, chunks = model_kwargs.get("spts", getattr(config, "spts", None)), config.prefill_chunk_size is not None
        if chunks and spts not in (None, False):
            raise ValueError("a prompt in chunks can't be skipped in: leave prefill_chunk_size unset, or spts")
        if spts is not None or chunks or several:
            model_kwargs["spts"] = False if spts is None else spts
        if (asked := ASKED.get()) is not None and asked.model is self:
            asked.spts = model_kwargs.get("spts")
            if config.assistant_early_exit is not None:
                asked.depth = self.config.num_hidden_layers
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

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """As stock; a static cache is told how many tokens come after the pass, and whether they are compiled; it takes
        those of a later turn on dynamic layers."""
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, StaticCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        told = {"to_come": generation_config.max_length - input_ids.shape[1]}
        if self._valid_auto_compile_criteria(model_kwargs, generation_config):
            told["graphs"] = True
        vars(cache).update(told)
        try:
            if is_static(cache):
                to_dynamic(cache, self.config)
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            for name in told:  # or a later pass of the caller's own goes by it
                vars(cache).pop(name, None)

    def create_masks_for_generate(self, **given: Any) -> Any:
        """The masks of a pass on a static cache, as stock; none where its layers know what they hold. A prompt that may
        be skipped in keeps its plain mask, which tells the rows' lengths."""
        asked = ASKED.get()
        if is_static(given["past_key_values"]):
            return None
        if given["inputs_embeds"].shape[1] > 1 and asked is not None and asked.spts is not False:
            return given["attention_mask"]
        return create_masks_for_generate(**given)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; an assistant is told not to skip, or nothing: changes of the schedule are this model's.

        Raises:
            ValueError: for the whole text on a cache that holds its beginning, which stock runs again on top of it.
        """
        assistant, told = kwargs.get("assistant_model"), dict(kwargs["model_kwargs"])
        cache, mask = told.get("past_key_values"), told.get("attention_mask")
        text = getattr(kwargs["generation_config"], "_mask_length", -1) if mask is None else mask.shape[-1]
        if cache is not None and cache.get_seq_length() > 0 and kwargs["inputs_tensor"].shape[1] == text:
            raise ValueError(
                "assisted decoding runs all tokens that it is given, also those that the cache holds: give the ones "
                "after these alone, with the attention mask of the whole text, or leave the cache out"
            )
        spts = told.pop("spts", None)
        if assistant is None or (spts is False and "spts" in inspect.signature(assistant.forward).parameters):
            told["spts"] = False
        return super()._get_candidate_generator(*args, **{**kwargs, "model_kwargs": told})
