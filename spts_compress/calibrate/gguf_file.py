"""A GGUF file as a plain safetensors checkpoint, if transformers reads all of the model that is in it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..utils.errors import UserError

STRETCHED = re.compile(r"\.rope\.(scaling\.(type|factor)|scale_linear)$")
HARMLESS = ("none", 0, 1)
# How text is split before pieces are merged, in GGUF's words: as GPT-2 does, and so after every digit.
AS_GPT2 = (None, "default", "gpt-2", "phi-2", "mpt", "olmo")
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def convert(file: Path, dtype: str, target: Path) -> None:
    """Write the model in `file`, with its tokenizer, as a checkpoint in `target`.

    Raises:
        UserError: if transformers would make another model of it, of which it says nothing itself.
    """
    from gguf import GGUFReader

    folder, gguf, reader = file.parent, file.name, GGUFReader(file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    if faults := [*_faults(reader, loaded), *_split_as(tokenizer, reader.fields.get("tokenizer.ggml.pre"))]:
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
    tokenizer.save_pretrained(target)


def _split_as(tokenizer: Any, field: Any) -> list[str]:
    """Has a tokenizer split text as a GGUF file's field names it, where transformers left it at GPT-2's way; the fault
    where that is not known here either."""
    backend, name = tokenizer.backend_tokenizer, field and field.contents()
    split = json.loads(backend.to_str())["pre_tokenizer"] or {}
    if name in AS_GPT2 or split.get("type") != "ByteLevel":
        return []
    if name not in DIGIT_BY_DIGIT:
        return [f"tokenizer.ggml.pre is {name}, which is not how its tokenizer splits text"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return []


def _faults(reader: Any, loaded: Any) -> Iterator[str]:
    """What of a GGUF file is not in the model that transformers `loaded` from it."""
    config = loaded.config
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
