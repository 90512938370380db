"""Whether an engine can skip, and what it has to be told before it starts."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from ..modeling.configuration_spts import Schedule
from ..modeling.stock_layer import layer_windows
from . import CLASSES, holes

logger = init_logger("vllm.spts")


def schedule_of(config: Any) -> Schedule:
    """The schedule of a checkpoint's configuration, with the keys and values of all candidates kept: vLLM's cache has
    one length for all layers.

    Raises:
        ValueError: if the `spts` block is not valid.
    """
    return replace(Schedule.from_dict(config.spts, config.num_hidden_layers), kv=1.0)


def why_dense(vllm_config: Any) -> str | None:
    """Why no prompt of an engine can skip, in words; None if prompts can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = model.hf_config
    if model.architecture not in {f"Spts{family}ForCausalLM" for family in CLASSES}:
        return f"of the exported families only {' and '.join(CLASSES)} skip in vLLM"
    schedule = schedule_of(config)
    hole = holes(schedule)
    for hinders, reason in (
        (not schedule.enabled, "the checkpoint's schedule is not enabled"),
        (hole, hole),
        (any(layer_windows(config)), "the model has sliding windows"),
        (model.runner_type != "generate", "the model does not generate"),
        (parallel.world_size > parallel.tensor_parallel_size, "pipeline and context parallelism are not supported"),
        (model.quantization, "quantised weights are not supported"),
        (vllm_config.lora_config, "LoRA is not supported"),
        (vllm_config.speculative_config, "speculative decoding is not supported"),
        (
            vllm_config.kv_transfer_config or vllm_config.cache_config.kv_offloading_size,
            "keys and values of skipped prompts must not be shared by a KV connector",
        ),
        (vllm_config.use_v2_model_runner, "model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0"),
    ):
        if hinders:
            return reason
    return None


def prepare(vllm_config: Any) -> None:
    """Settings under which an engine's prompts skip; one line in the log if none can."""
    model, cache, scheduler = vllm_config.model_config, vllm_config.cache_config, vllm_config.scheduler_config
    if (reason := why_dense(vllm_config)) is not None:
        logger.warning("SPTS: prompts run dense: %s", reason)
        return
    notes = []
    if (kv := model.hf_config.spts.get("kv")) != 1:
        notes.append(f"kv is 1.0 here, {'not set' if kv is None else kv} in the checkpoint")
    if cache.enable_prefix_caching:
        # What a prompt leaves depends on its last tokens, so no other prompt may begin with it.
        cache.enable_prefix_caching = False
        notes.append("prefix caching is off")
    if (budget := scheduler.max_num_batched_tokens) >= model.max_model_len:
        scheduler.enable_chunked_prefill = False  # a prompt waits for a step that holds it whole
    else:
        notes.append(
            f"prompts that don't fit into what is left of a step's {budget} tokens run dense: pass "
            f"--max-num-batched-tokens {model.max_model_len}, or a lower --max-model-len, to let all skip"
        )
    logger.info("SPTS: prompts skip%s", "".join(f"; {note}" for note in notes))
    model.logits_processors = [*(model.logits_processors or ()), f"{__name__}:NewPrompts"]


def prompt_length(params: SamplingParams, prompt: list[int] | None, _: list[int]) -> int | None:
    """Tokens of a request's prompt that may skip; None if it may not."""
    wanted = (params.extra_args or {}).get("spts", True)
    return len(prompt) if prompt and wanted and params.prompt_logprobs is None else None


class NewPrompts(LogitsProcessor):
    """The requests that joined the batch since the last forward pass: the length of the prompt by the request's place.

    It changes no logits: vLLM tells logits processors of every request before the pass that it joins, with its prompt
    and its parameters, and has no other interface that tells a model.
    """

    latest: ClassVar["NewPrompts | None"] = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.lengths: dict[int, int] = {}
        NewPrompts.latest = self

    @classmethod
    def of_engine(cls) -> "NewPrompts | None":
        """The one of the engine that is loading its model now, made just before; None if that has none."""
        own, cls.latest = cls.latest, None
        return own

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if (sampling_params.extra_args or {}).get("spts", True) not in (True, False):
            raise ValueError("extra_args['spts'] is neither true nor false")

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.lengths, batch_update, prompt_length)

    def take(self) -> dict[int, int]:
        """Those since the last call."""
        lengths, self.lengths = self.lengths, {}
        return lengths
