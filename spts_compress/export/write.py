"""The exported checkpoint: the base's files untouched, the modelling code, the proxies, and one clear `spts` block."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from ..calibrate.base_model import FAMILIES, Base, as_stock
from ..checkpoint.layout import INDEX, PROXIES, exported, travelling
from ..modeling import code_files
from ..modeling.configuration_spts import Schedule
from ..modeling.stock_layer import Norms
from ..utils.errors import UserError
from . import fresh
from .fresh import differences, settings, tokenizer_facts

TOKENIZER = "tokenizer_config.json"
# Paths that may be left in that file and that transformers replaces by what it finds in the folder.
REPLACED = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "added_tokens_file")


def model_class(family: str) -> Any:
    """The family's causal language model class, the same code that is exported."""
    module, prefix = FAMILIES[family]
    return getattr(importlib.import_module(f"spts_compress.modeling.{module}"), f"{prefix}ForCausalLM")


def norms_of(family: str) -> Norms:
    """Where the norms of a family's decoder layers stand."""
    return model_class(family).model_class.layer_class.norms


def load(folder: Path, family: str, device: str, dtype: str) -> Any:
    """An exported checkpoint as a model in evaluation mode, run by this package's own copy of the code."""
    cls = model_class(family)
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to(torch.device(device)).eval()


def auto_map(family: str) -> dict[str, str]:
    """The exported config's entry for the classes that `trust_remote_code` runs."""
    module, prefix = FAMILIES[family]
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {name: f"{module}.{prefix}{kind}" for name, kind in classes.items()}


@dataclass(frozen=True)
class Carried:
    """What of the base travels. `names`: the base's file -> the export's. `tokenizer_config`: a new
    tokenizer_config.json, where the base's own would give another tokenizer; else None. `trust`: the values of
    trust_remote_code that the export's tokenizer is loaded with, each to give `facts`, those of the base's."""

    names: dict[str, str]
    tokenizer_config: dict[str, Any] | None
    trust: tuple[bool, ...]
    facts: dict[str, Any]


def carry(base: Base) -> Carried:
    """Settle what of the base travels, and try that its tokenizer comes out the same; cheap, so a run begins with it.

    All files travel but those that `layout` knows not to be needed: a list of what is needed would never be whole,
    since a tokenizer with code of its own may read any file. Code that the recipe does not trust is put where
    `trust_remote_code=True`, which the export's users must give, won't run it.

    Raises:
        UserError: naming what can't travel.
    """
    tokenizer = base.tokenizer()
    reads = [name for name in map(str, type(tokenizer).vocab_files_names.values()) if (base.folder / name).is_file()]
    names = travelling(base.folder, [*base.weights, *reads])
    untrusted = () if base.trusted else ("custom_generate/*",)
    path = base.folder / TOKENIZER
    stated = json.loads(path.read_text()) if path.is_file() else {}
    own_code = base.trusted and "auto_map" in stated
    if own_code:
        _check_own_code(base, stated, (*REPLACED, *type(tokenizer).vocab_files_names))
    safe = stated if base.trusted else {key: value for key, value in stated.items() if key != "auto_map"}
    # transformers chooses a tokenizer's class by the model's type, too, and the export has another type
    named = {**safe, "tokenizer_class": type(tokenizer).__name__}
    trust, facts = ((True,) if own_code else (True, False)), tokenizer_facts(tokenizer)
    faults = ""
    for config in (safe, named):
        new = None if config == stated else config
        taken = (*untrusted, TOKENIZER) if new is not None else untrusted
        carried = Carried(exported(names, taken), new, trust, facts)
        if not (faults := _tokenizer_faults(base, carried)):
            return carried
    sent = {name.split("/")[0] for name in names}
    left = ", ".join(sorted(p.name for p in base.folder.iterdir() if p.name not in sent)) or "none"
    raise UserError(
        f"{base.name}: its tokenizer would not be the same in the checkpoint: {faults}; files and folders that don't "
        f"travel: {left}"
    )


def _check_own_code(base: Base, stated: dict[str, Any], replaced: tuple[str, ...]) -> None:
    """Refuse a tokenizer's code that needs what is not in the base's folder."""
    refs = stated["auto_map"]
    refs = refs.get("AutoTokenizer") if isinstance(refs, dict) else refs
    for ref in refs if isinstance(refs, list) else [refs]:
        if isinstance(ref, str) and "--" in ref:
            raise UserError(
                f"{base.folder / TOKENIZER}: the tokenizer's code is in another repository, {ref.split('--')[0]}, so "
                "it can't travel; copy it beside this file and write auto_map without the repository's name"
            )
    for key, value in stated.items():
        if key not in replaced and isinstance(value, str) and os.sep in value and os.path.isfile(value):
            raise UserError(
                f"{base.folder / TOKENIZER}: {key} is {value}, a file that can't travel; put it into the base's "
                "folder, and let the tokenizer's vocab_files_names name it"
            )


def _tokenizer_faults(base: Base, carried: Carried) -> str:
    """In what the tokenizer of what travels differs from the base's; empty if in nothing."""
    kind = model_class(base.family).config_class
    plain = _config(base)
    config = kind(**{key: value for key, value in plain.items() if key not in ("model_type", "auto_map")})
    with TemporaryDirectory() as scratch:
        for name, new in carried.names.items():
            if name not in base.weights:
                (Path(scratch) / new).parent.mkdir(parents=True, exist_ok=True)
                (Path(scratch) / new).symlink_to((base.folder / name).absolute())
        _write_json(Path(scratch) / "config.json", plain)
        if carried.tokenizer_config is not None:
            _write_json(Path(scratch) / TOKENIZER, carried.tokenizer_config)
        for trust in carried.trust:
            options = {"config": config} if trust else {}  # not by the config's own code, which needs no trust here
            try:
                found = tokenizer_facts(AutoTokenizer.from_pretrained(scratch, trust_remote_code=trust, **options))
            except Exception as error:  # a tokenizer's own code may raise anything
                return f"it does not load: {(str(error) or type(error).__name__).splitlines()[0]}"
            if names := differences(carried.facts, found):
                return f"{', '.join(names)} differ"
    return ""


def _config(base: Base) -> dict[str, Any]:
    """The exported config, but for its schedule."""
    config = as_stock(json.loads((base.folder / "config.json").read_text()))
    config.pop("transformers_weights", None)  # the export has an index of the usual name
    config["model_type"] = f"spts_{base.family}"
    config["architectures"] = [f"{FAMILIES[base.family][1]}ForCausalLM"]
    config["auto_map"] = auto_map(base.family)
    return config


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write(base: Base, carried: Carried, schedule: Schedule, proxies: dict[str, torch.Tensor], target: Path) -> None:
    """Write the checkpoint's model files into the existing folder `target`.

    Args:
        carried: what of the base goes with them, see `carry`.
        proxies: parameters by their name in the model, such as `model.layers.12.proxy.down`.
    """
    for name, new in carried.names.items():
        (target / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, target / new)
    save_file({name: tensor.contiguous() for name, tensor in proxies.items()}, target / PROXIES, {"format": "pt"})
    (target / PROXIES).chmod(0o644)  # safetensors makes it private
    weight_map, total = {}, 0
    for new in (*(carried.names[name] for name in base.weights), PROXIES):
        with safe_open(target / new, "pt") as opened:
            weight_map.update(dict.fromkeys(opened.keys(), new))
        total += (target / new).stat().st_size
    _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    _write_json(target / "config.json", {**_config(base), "spts": schedule.to_dict()})
    if carried.tokenizer_config is not None:
        _write_json(target / TOKENIZER, carried.tokenizer_config)
    for file in code_files(FAMILIES[base.family][0]):
        shutil.copyfile(file, target / file.name)


def _generation(base: Base) -> GenerationConfig:
    """The base's generation settings, as loading its model sets them."""
    try:
        return GenerationConfig.from_pretrained(base.folder)
    except OSError:
        return GenerationConfig.from_pretrained(base.folder, "config.json", _from_model_config=True)


@torch.no_grad()
def expected(folder: Path, base: Base, carried: Carried, schedule: Schedule, dtype: str) -> tuple[dict, dict]:
    """Tensors and facts that `fresh.main` is to find again: what this process gets, and what the base says."""
    model = load(folder, base.family, "cpu", dtype)
    smallest = min(stage.budget.at(0) for stage in schedule.stages)
    length = max(96, smallest + 32)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    tensors = {
        "ids": ids,
        "spts": model(ids, logits_to_keep=1, spts={"min_length": 0}).logits.contiguous(),
        "dense": model(ids, logits_to_keep=1, spts=False).logits.contiguous(),
        "state": model.model(ids).last_hidden_state[:, -1].contiguous(),
    }
    facts = {
        "dtype": dtype,
        "config": settings(base.config),
        "generation": settings(_generation(base)),
        "tokenizer": carried.facts,
        "trust": carried.trust,
    }
    return tensors, facts


def check(folder: Path, base: Base, carried: Carried, schedule: Schedule, dtype: str) -> None:
    """Load the checkpoint in a fresh process and compare every tensor, the logits, the settings and the tokenizer.

    Raises:
        UserError: naming what differs.
    """
    tensors, facts = expected(folder, base, carried, schedule, dtype)
    with TemporaryDirectory() as scratch:
        written, said = Path(scratch) / "expected.safetensors", Path(scratch) / "facts.json"
        save_file(tensors, written)
        _write_json(said, facts)
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        # -P: the package's own folder is not searched for modules
        command = [sys.executable, "-P", fresh.__file__, *map(str, (folder.absolute(), written, said))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch, check=False)
    line = next((text for text in done.stdout.splitlines() if text.startswith("FAULTS ")), None)
    if line is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{folder}: the exported checkpoint does not load in a fresh process: {reason}")
    if faults := json.loads(line.removeprefix("FAULTS ")):
        raise UserError(f"{folder}: the exported checkpoint is not what was built: {'; '.join(faults)}")
