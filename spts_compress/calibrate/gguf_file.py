"""A GGUF file as a plain safetensors checkpoint, if transformers reads all of the model that is in it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..utils.errors import UserError

STRETCHED = re.compile(r"\.rope\.(scaling\.(type|factor)|scale_linear)$")
HARMLESS = ("none", 0, 1)


def convert(file: Path, dtype: str, target: Path) -> None:
    """Write the model in `file`, with its tokenizer, as a checkpoint in `target`.

    Raises:
        UserError: if transformers would make another model of it, of which it says nothing itself.
    """
    folder, gguf = file.parent, file.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if faults := [*_faults(file, loaded)]:
        raise UserError(
            f"{file}: transformers does not read all of this model: {'; '.join(faults)}; start from its safetensors"
        )
    # What was loaded from GGUF counts as quantised and refuses to be saved, so the weights move to a plain model.
    drop = ("quantization_config", "_name_or_path", "model_type", "architectures")
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k not in drop})
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(getattr(torch, dtype)).save_pretrained(target, max_shard_size="100GB")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def _faults(file: Path, loaded: Any) -> Iterator[str]:
    """What of a GGUF file is not in the model that transformers `loaded` from it."""
    from gguf import GGUFReader

    reader, config = GGUFReader(file), loaded.config
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if fields.get("split.count", 1) > 1:
        yield f"it is one of {fields['split.count']} parts of a split file; join them with llama-gguf-split --merge"
    yield from (f"{k} is {v}" for k, v in fields.items() if STRETCHED.search(k) and v not in HARMLESS)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = {"rope.dimension_count": width, "attention.sliding_window": getattr(config, "sliding_window", None)}
    for name, value in fields.items():
        own = kept.get(name.partition(".")[2], value)
        wide = name.endswith("window") and not 0 < value < config.max_position_embeddings
        if own != value and not wide:
            yield f"{name} is {value}, and the model has {own}"
    there = sum(int(tensor.n_elements) for tensor in reader.tensors)
    made = sum(parameter.numel() for parameter in loaded.parameters())
    if there != made:
        yield f"its tensors hold {there} numbers, and the model {made}"
