"""Whether a checkpoint folder loads: its safetensors files, their index, and every tensor against the model.

One idea of it for the base and for what is exported, and it is transformers' own: names and shapes are loaded as
`from_pretrained` would load them, onto a model without memory, so that no weight is read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..utils.errors import UserError, reason, some
from .layout import CONFIG, first_weights, weight_files, weight_map

FLOATS = ("BF16", "F16", "F32", "F64")
UNQUANTISED = "start from the unquantised checkpoint"
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|quant_state\S*|weight_packed|weight_shape"
    r"|weight_scale(_inv|_2)?|weight_zero_point|input_scale|activation_scale)(\.|$)"
)
# What tensors of no part of the model are -> what to do.
STRANGE = {
    re.compile(r"(^|\.)lora_|\.base_layer\.|\.modules_to_save\."): (
        "an adapter's tensors; merge it into its model first (peft: merge_and_unload, then save_pretrained)"
    ),
    re.compile(r"^(\w+\.)?(score|classifier|v_head|value_head|reward_head|regression_head|qa_outputs)\."): (
        "a head for classes or rewards; skipping is for models that answer in text"
    ),
}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header tells of it; `dtype` in the words of safetensors."""

    file: str
    shape: list[int]
    dtype: str


def faults(folder: Path, model_class: Any, config: Any) -> list[str]:
    """Everything that keeps `folder` from being loaded as a `model_class` of `config`, or makes it load other than it
    says: a line each, without the folder's name; a few names of each kind of fault."""
    explicit = getattr(config, "transformers_weights", None)
    first = first_weights(folder, explicit)
    try:
        names = weight_files(folder, explicit)
    except UserError as error:
        return [str(error).removeprefix(f"{folder}: ")]
    if absent := [name for name in names if not (folder / name).is_file()]:
        if first not in absent:
            return [f"{first} names {some(absent)}, which is not there"]
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        advice = "; pickled weights are not read: load them with transformers and save_pretrained them"
        return [f"no {first}; the base must be a safetensors checkpoint{advice if pickled else ''}"]
    stored, faults = _read(folder, names)
    if faults:
        return faults  # what lies in unreadable files would be missing, too
    if first not in names:
        listed = weight_map(folder, first)
        if unlisted := [name for name, tensor in stored.items() if listed.get(name) != tensor.file]:
            faults.append(f"{first} does not say where these tensors lie: {some(unlisted)}")
        if nowhere := [name for name in listed if name not in stored]:
            faults.append(f"{first} lists tensors that are in no file: {some(nowhere)}")
    if quantised := [name for name in stored if QUANTISED.search(name)]:
        return [*faults, f"quantised weights ({some(quantised)}), which are not supported; {UNQUANTISED}"]
    return faults + _tensor_faults(folder, stored, model_class, config)


def _read(folder: Path, names: list[str]) -> tuple[dict[str, Stored], list[str]]:
    """What the headers of the files say, and files that can't be read or repeat a tensor."""
    stored: dict[str, Stored] = {}
    faults = []
    for file in names:
        try:
            with safe_open(folder / file, "pt") as opened:
                for name in list(opened.keys()):
                    part = opened.get_slice(name)
                    if name in stored:
                        faults.append(f"{name} lies in {stored[name].file} and in {file}; only one of them can count")
                    stored[name] = Stored(file, part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            faults.append(f"{file}: can't be read, damaged or cut short: {error}")
    return stored, faults


def _tensor_faults(folder: Path, stored: dict[str, Stored], model_class: Any, config: Any) -> list[str]:
    """All tensors against the model."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever a constructor stumbles over
        return [f"{CONFIG}: no model can be built from it: {reason(error)}"]
    tied = dict(model.all_tied_weights_keys or {})
    info, passed = _load(model, stored)
    kinds = {what: {name for name in info.unexpected_keys if kind.search(name)} for kind, what in STRANGE.items()}
    faults = [f"{some(names)}: {what}" for what, names in kinds.items() if names]
    strange = set(info.unexpected_keys).difference(*kinds.values())
    odd = [f"{name} ({t.dtype})" for name, t in stored.items() if t.dtype not in FLOATS and name not in passed]
    for what, names, advice in (
        ("tensors that are no tensor of this model, by its config", strange, ""),
        ("missing tensors", info.missing_keys, ""),
        ("tensors that don't fit together", info.conversion_errors, ""),
        ("weights that are no plain floating-point numbers", odd, f"; {UNQUANTISED}"),
    ):
        faults += [f"{what}: {some(names)}{advice}"] if names else []
    for name, shape, wanted in sorted(info.mismatched_keys)[:3]:
        faults.append(f"{name} has the shape {list(shape)}, the config asks for {list(wanted)}")
    return faults or _untied(folder, stored, tied)


def _load(model: Any, stored: dict[str, Stored]) -> tuple[Any, set[str]]:
    """What `from_pretrained` would say of the tensors, and the names of those that it passes over."""
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    mapping: Any = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model, tensors, options)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    unexpected, depth = set(info.unexpected_keys), model.config.num_hidden_layers
    # Layers that predict further tokens: stock code names those of the published depth alone.
    for layer in range(depth, depth + getattr(model.config, "num_nextn_predict_layers", 0)):
        info.unexpected_keys -= {name for name in unexpected if f"layers.{layer}." in name}
    model._adjust_missing_and_unexpected_keys(info)
    return info, unexpected - info.unexpected_keys


def _untied(folder: Path, stored: dict[str, Stored], tied: dict[str, str]) -> list[str]:
    """Tensors that are one by the config and two in the files: transformers then keeps them apart."""

    def tensor(name: str) -> torch.Tensor:
        with safe_open(folder / stored[name].file, "pt") as opened:
            return opened.get_tensor(name)

    return [
        f"{name} differs from {source}, but the config ties them; set tie_word_embeddings to false"
        for name, source in tied.items()
        if name in stored and source in stored and not torch.equal(tensor(name), tensor(source))
    ]
