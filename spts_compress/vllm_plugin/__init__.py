"""A plugin for vLLM (entry point group `vllm.general_plugins`): an exported checkpoint skips tokens where it is served.

README.md says what it does and what runs dense.
"""

from typing import Any

from ..modeling.configuration_spts import Schedule

TESTED = ("0.32", "0.33")  # tested from the first on and below the second
CLASSES = ("Llama", "Qwen2")
BACKENDS = ("TransformersForCausalLM", "TransformersMoEForCausalLM")  # what vLLM runs the other families by


class ConfigHook:
    """What vLLM asks of an architecture before it fixes an engine's settings."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        if getattr(vllm_config.model_config.hf_config, "spts", None) is not None:
            from .setup import prepare  # here, since vLLM loads the plugin for every model

            prepare(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing is changed so early."""


def holes(schedule: Schedule) -> str | None:
    """Why a schedule leaves layers without keys and values of some tokens, in words; None if all layers have all."""
    if not schedule.update:
        return "the schedule has no `update`, without which all keys and values can't be kept"
    if any(stage.prune_to for stage in schedule.stages):
        return (
            "the schedule has `prune_to`, and a token that leaves for good would have no key in later layers; "
            "export without it"
        )
    return None


def register() -> None:
    """vLLM calls this in each of its processes, maybe more than once. All that it changes in vLLM, it changes here."""
    import vllm
    from packaging.version import Version
    from vllm.logger import init_logger

    if not Version(TESTED[0]) <= Version(Version(vllm.__version__).base_version) < Version(TESTED[1]):
        init_logger("vllm.spts").warning(
            "spts-compress skips in vLLM from %s up to, not including, %s; this is %s: prompts run dense",
            *TESTED,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in CLASSES:
        ModelRegistry.register_model(f"Spts{family}ForCausalLM", f"{__name__}.model:Spts{family}ForCausalLM")
    for architecture in (*(f"Spts{family}ForCausalLM" for family in CLASSES), *BACKENDS):
        # No documented interface, but the table that vLLM asks before it fixes an engine's settings.
        MODELS_CONFIG_MAP.setdefault(architecture, ConfigHook)
