"""The model families that skipping is written for: their modelling code, their classes, and what their configs say."""

import importlib
from pathlib import Path
from typing import Any

from .. import modeling
from ..modeling.stock_layer import Norms
from ..utils.errors import UserError, reason
from .layout import CONFIG, read_json

# Model family -> the file in modeling/ that adds skipping to it, and the prefix of its class names. The README there
# says what a new family needs.
FAMILIES = {
    "deepseek_v2": ("modeling_spts_deepseek", "SptsDeepseekV2"),
    "deepseek_v3": ("modeling_spts_deepseek", "SptsDeepseekV3"),
    "gemma3_text": ("modeling_spts_gemma3", "SptsGemma3"),
    "llama": ("modeling_spts_llama", "SptsLlama"),
    "ministral": ("modeling_spts_ministral", "SptsMinistral"),
    "mistral": ("modeling_spts_mistral", "SptsMistral"),
    "mixtral": ("modeling_spts_mixtral", "SptsMixtral"),
    "olmo2": ("modeling_spts_olmo2", "SptsOlmo2"),
    "phi3": ("modeling_spts_phi3", "SptsPhi3"),
    "qwen2": ("modeling_spts_qwen2", "SptsQwen2"),
    "qwen3": ("modeling_spts_qwen3", "SptsQwen3"),
    "qwen3_moe": ("modeling_spts_qwen3_moe", "SptsQwen3Moe"),
}
# Families whose own code is remote -> the stock family with the same parts and names of weights, and what their config
# calls otherwise. openPangu-Embedded is a Llama with biases in its attention.
ALIASES = {"PanguEmbedded": ("llama", {"bias": "attention_bias"})}


def model_class(family: str) -> Any:
    """The family's causal language model class, the same code that is exported."""
    module, prefix = FAMILIES[family]
    return getattr(importlib.import_module(f"spts_compress.modeling.{module}"), f"{prefix}ForCausalLM")


def norms_of(family: str) -> Norms:
    """Where the norms of a family's decoder layers stand."""
    return model_class(family).model_class.layer_class.norms


def code_files(family: str) -> list[Path]:
    """The modelling code that a checkpoint of a family carries, in this package: the family's own module, and as
    transformers looks for them what it imports from there, and so on."""
    from transformers.dynamic_module_utils import get_relative_import_files  # slow to import

    own = Path(modeling.__file__).parent / f"{FAMILIES[family][0]}.py"
    return [own, *sorted({Path(file) for file in get_relative_import_files(own)})]


def exported_config(plain: dict[str, Any]) -> dict[str, Any]:
    """What a base's `config.json` becomes in an export, but for the schedule: its `auto_map` names the classes that
    `trust_remote_code` runs."""
    config = as_stock(plain)
    config.pop("transformers_weights", None)  # the export has an index of the usual name
    family = config["model_type"]
    module, prefix = FAMILIES[family]
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {
        **config,
        "model_type": f"spts_{family}",
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {name: f"{module}.{prefix}{kind}" for name, kind in classes.items()},
    }


def as_stock(plain: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of a family with remote code of its own as that of the stock family it is built like; Mistral's
    with kinds of layers is Ministral's, as transformers takes it."""
    if plain.get("model_type") == "mistral" and "layer_types" in plain:
        return {**plain, "model_type": "ministral"}
    if plain.get("model_type") not in ALIASES:
        return dict(plain)
    stock, renamed = ALIASES[plain["model_type"]]
    config = {renamed.get(name, name): value for name, value in plain.items() if name != "auto_map"}
    return {**config, "model_type": stock}


def context_of(config: Any) -> int:
    """Tokens that the model's positions are made for, where stretched positions reach further those as well (but for
    "llama3", whose factor is not of the context, and "dynamic", which makes what is past it depend on earlier text)."""
    ropes = [rope for rope in _ropes(config) if rope.get("rope_type") not in ("llama3", "dynamic")]
    pairs = [(rope.get("original_max_position_embeddings"), rope.get("factor")) for rope in ropes]
    stretched = [int(length * factor) for length, factor in pairs if isinstance(length, int) and factor]
    return max([config.max_position_embeddings, *stretched])


def switch_of(config: Any) -> int | None:
    """The most tokens that a model with "longrope" reads by its short factors; with one more all text is by its long
    ones. None for other models."""
    own = getattr(config, "original_max_position_embeddings", None)
    long = [rope for rope in _ropes(config) if rope.get("rope_type") == "longrope"]
    return next((rope.get("original_max_position_embeddings", own) for rope in long), None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    ropes = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]


def read_config(folder: Path) -> Any:
    """The checkpoint's configuration.

    Raises:
        UserError: if the folder holds no checkpoint of this toolkit, or one of a family that this release doesn't know,
            or with a schedule that can't be.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no readable {CONFIG}; give the folder of an exported checkpoint")
    data = read_json(path)
    if not isinstance(data.get("spts"), dict):
        raise UserError(f"{path}: no spts block, so this is not a checkpoint made by spts-compress")
    family = str(data.get("model_type", "")).removeprefix("spts_")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: family {family or 'of no name'} is unknown to this release; it knows {', '.join(FAMILIES)}"
        )
    try:
        config = model_class(family).config_class.from_dict(data)
    except Exception as error:  # each family has checks of its own
        raise UserError(f"{path}: not a usable configuration: {reason(error)}") from None
    try:
        config.schedule()
    except ValueError as error:
        raise UserError("\n".join(f"{path}: {fault}" for fault in str(error).splitlines())) from None
    return config
