"""The exported checkpoint: the base's files untouched, the modelling code, the proxies, and one clear `spts` block."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from ..calibrate.base_checks import files_named
from ..calibrate.base_model import Base
from ..checkpoint.families import code_files, exported_config, model_class
from ..checkpoint.layout import CONFIG, INDEX, PROXIES, TOKENIZER, exported, read_json, travelling
from ..modeling.configuration_spts import Schedule
from ..utils.errors import UserError, reason
from . import fresh
from .fresh import differences, settings, tokenizer_facts

# Paths that may be left in that file and that transformers replaces by what it finds in the folder.
REPLACED = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "added_tokens_file")


def load(folder: Path, family: str, device: str, dtype: str) -> Any:
    """An exported checkpoint as a model in evaluation mode, run by this package's own copy of the code."""
    cls = model_class(family)
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to(torch.device(device)).eval()


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
    names = travelling(base.folder, [*base.weights, *files_named(tokenizer, base.folder)])
    stated = read_json(base.folder / TOKENIZER) if TOKENIZER in names else {}
    own_code = base.trusted and "auto_map" in stated
    if own_code:
        _check_own_code(base, stated, (*REPLACED, *type(tokenizer).vocab_files_names))
    trust, facts = ((True,) if own_code else (True, False)), tokenizer_facts(tokenizer)
    safe = {key: value for key, value in stated.items() if base.trusted or key != "auto_map"}
    # transformers chooses a tokenizer's class by the model's type, too, and the export has another type
    for config in (safe, {**safe, "tokenizer_class": type(tokenizer).__name__}):
        new = None if config == stated else config
        taken = ["custom_generate/*", *([] if new is None else [TOKENIZER])]  # in its place it would be `generate`
        carried = Carried(exported(names, taken), new, trust, facts)
        if not (faults := _tokenizer_faults(base, carried)):
            return carried
    left = {path.name for path in base.folder.iterdir()} - {name.split("/")[0] for name in names}
    raise UserError(
        f"{base.name}: its tokenizer would not be the same in the checkpoint: {faults}; files and folders that don't "
        f"travel: {', '.join(sorted(left)) or 'none'}"
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
    with TemporaryDirectory() as scratch:
        stated = _lay_out(base, carried, Path(scratch), os.symlink)
        del stated["model_type"], stated["auto_map"]
        config = model_class(base.family).config_class(**stated)
        for trust in carried.trust:
            options = {"config": config} if trust else {}  # not by the config's own code, which needs no trust here
            try:
                facts = tokenizer_facts(AutoTokenizer.from_pretrained(scratch, trust_remote_code=trust, **options))
            except Exception as error:  # a tokenizer's own code may raise anything
                return f"it does not load: {reason(error)}"
            if names := differences(carried.facts, facts):
                return f"{', '.join(names)} differ"
    return ""


def _lay_out(
    base: Base, carried: Carried, target: Path, place: Callable[[Path, Path], Any], spts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Give the base's files their names in `target`, by copying or linking, beside the export's configs, of which the
    model's is returned."""
    for name, new in carried.names.items():
        (target / new).parent.mkdir(parents=True, exist_ok=True)
        place((base.folder / name).absolute(), target / new)
    config = exported_config(read_json(base.folder / CONFIG)) | ({"spts": spts} if spts else {})
    _write_json(target / CONFIG, config)
    if carried.tokenizer_config is not None:
        _write_json(target / TOKENIZER, carried.tokenizer_config)
    return config


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write(base: Base, carried: Carried, schedule: Schedule, proxies: dict[str, torch.Tensor], target: Path) -> None:
    """Write the checkpoint's model files into the existing folder `target`.

    Args:
        carried: what of the base goes with them, see `carry`.
        proxies: parameters by their name in the model, such as `model.layers.12.proxy.down`.
    """
    _lay_out(base, carried, target, shutil.copyfile, schedule.to_dict())
    save_file({name: tensor.contiguous() for name, tensor in proxies.items()}, target / PROXIES, {"format": "pt"})
    (target / PROXIES).chmod(0o644)  # safetensors makes it private
    weight_map, total = {}, 0
    for new in (*(carried.names[name] for name in base.weights), PROXIES):
        with safe_open(target / new, "pt") as opened:
            weight_map.update(dict.fromkeys(opened.keys(), new))
        total += (target / new).stat().st_size
    _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for file in code_files(base.family):
        shutil.copyfile(file, target / file.name)


def _generation(base: Base) -> GenerationConfig:
    """The base's generation settings, as loading its model sets them."""
    try:
        return GenerationConfig.from_pretrained(base.folder)
    except OSError:
        return GenerationConfig.from_pretrained(base.folder, CONFIG, _from_model_config=True)


@torch.no_grad()
def expected(folder: Path, base: Base, carried: Carried, schedule: Schedule, dtype: str) -> tuple[dict, dict]:
    """Tensors and facts that `fresh.main` is to find again: what this process gets, and what the base says."""
    model = load(folder, base.family, "cpu", dtype)
    length = max(96, 32 + min(stage.budget.at(0) for stage in schedule.stages))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    tensors = {
        "ids": ids,
        "spts": model(ids, logits_to_keep=1, spts={"min_length": 0}).logits.contiguous(),
        "dense": model(ids, logits_to_keep=1, spts=False).logits.contiguous(),
        "state": model.model(ids).last_hidden_state[:, -1].contiguous(),
    }
    facts = {
        "dtype": dtype,
        "weights": [*(carried.names[name] for name in base.weights), PROXIES],
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
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{folder}: the exported checkpoint does not load in a fresh process: {last}")
    if faults := json.loads(line.removeprefix("FAULTS ")):
        raise UserError(f"{folder}: the exported checkpoint is not what was built: {'; '.join(faults)}")
