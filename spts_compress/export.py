"""The exported checkpoint: the base's files untouched, the modelling code, the proxies, and one clear `spts` block."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .base import FAMILIES, INDEX, Base, as_stock
from .errors import UserError
from .modeling import code_files
from .modeling.configuration_spts import Schedule
from .modeling.stock_layer import Norms

PROXIES = "spts-proxies.safetensors"
# The base's own files under other names, so that `strip` can give them back.
BASE_CONFIG, BASE_INDEX, BASE_WEIGHTS = "base_config.json", "base_index.json", "base.safetensors"
CARRIED = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "spiece.model",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*", "tokenization_*.py",
)  # fmt: skip


def model_class(family: str) -> Any:
    """The family's causal language model class, the same code that is exported."""
    module, prefix = FAMILIES[family]
    return getattr(importlib.import_module(f".modeling.{module}", __package__), f"{prefix}ForCausalLM")


def norms_of(family: str) -> Norms:
    """Where the norms of a family's decoder layers stand."""
    return model_class(family).model_class.layer_class.norms


def load(folder: Path, family: str, device: str, dtype: str) -> Any:
    """An exported checkpoint as a model in evaluation mode, run by this package's own copy of the code."""
    cls = model_class(family)
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to(torch.device(device)).eval()


def write(base: Base, schedule: Schedule, proxies: dict[str, torch.Tensor], target: Path) -> None:
    """Write the checkpoint's model files into the existing folder `target`.

    Args:
        proxies: parameters by their name in the model, such as `model.layers.12.proxy.down`.
    """
    module, prefix = FAMILIES[base.family]
    for pattern in CARRIED:
        for file in base.folder.glob(pattern):
            shutil.copyfile(file, target / file.name)
    weight_map, total = {}, 0
    for name in base.weights:
        # A single file keeps another name, since a plain model.safetensors would hide the index.
        renamed = name if len(base.weights) > 1 else BASE_WEIGHTS
        shutil.copyfile(base.folder / name, target / renamed)
        with safe_open(target / renamed, "pt") as opened:
            weight_map.update(dict.fromkeys(opened.keys(), renamed))
        total += (target / renamed).stat().st_size
    save_file({name: tensor.contiguous() for name, tensor in proxies.items()}, target / PROXIES, {"format": "pt"})
    (target / PROXIES).chmod(0o644)  # safetensors makes it private
    weight_map.update(dict.fromkeys(proxies, PROXIES))
    total += (target / PROXIES).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    shutil.copyfile(base.folder / "config.json", target / BASE_CONFIG)
    if (base.folder / INDEX).is_file():
        shutil.copyfile(base.folder / INDEX, target / BASE_INDEX)
    config = as_stock(json.loads((base.folder / "config.json").read_text()))
    config["model_type"] = f"spts_{base.family}"
    config["architectures"] = [f"{prefix}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.{prefix}Config",
        "AutoModel": f"{module}.{prefix}Model",
        "AutoModelForCausalLM": f"{module}.{prefix}ForCausalLM",
    }
    config["spts"] = schedule.to_dict()
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in code_files(module):
        shutil.copyfile(file, target / file.name)


# Run by a fresh interpreter that can't import spts_compress: what a stranger's machine would do.
CHECK = """
import sys
sys.modules["spts_compress"] = None
import json, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
folder, expected, dtype = Path(sys.argv[1]), load_file(sys.argv[2]), getattr(torch, sys.argv[3])
options = dict(trust_remote_code=True, dtype=dtype, attn_implementation="sdpa")
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
faults = [f"{key}: {value}" for key, value in info.items() if value]
state = model.eval().state_dict()
index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
for file in sorted(set(index.values())):
    with safe_open(folder / file, "pt") as opened:
        for name in opened.keys():
            if name in state and not torch.equal(state[name], opened.get_tensor(name).to(state[name].dtype)):
                faults.append(f"tensor {name} differs from {file}")
with torch.no_grad():
    ids = expected["ids"]
    for name, spts in (("spts", {"min_length": 0}), ("dense", False)):
        logits = model(ids, logits_to_keep=1, spts=spts).logits
        if not torch.equal(logits, expected[name]):
            faults.append(f"{name} logits differ by {float((logits - expected[name]).abs().max())}")
del model, state
body = AutoModel.from_pretrained(folder, **options).eval()
with torch.no_grad():
    if not torch.equal(body(ids).last_hidden_state[:, -1], expected["state"]):
        faults.append("AutoModel gives other states")
print("FAULTS " + json.dumps(faults))
"""


@torch.no_grad()
def check(folder: Path, base: Base, dtype: str, schedule: Schedule) -> None:
    """Load the checkpoint in a fresh process and compare every tensor and the logits.

    Raises:
        UserError: naming what differs.
    """
    model = load(folder, base.family, "cpu", dtype)
    smallest = min(stage.budget.at(0) for stage in schedule.stages)
    length = max(96, smallest + 32)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected = {
        "ids": ids,
        "spts": model(ids, logits_to_keep=1, spts={"min_length": 0}).logits,
        "dense": model(ids, logits_to_keep=1, spts=False).logits,
        "state": model.model(ids).last_hidden_state[:, -1],
    }
    del model
    with TemporaryDirectory() as scratch:
        save_file({k: v.contiguous() for k, v in expected.items()}, Path(scratch) / "expected.safetensors")
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        command = [
            sys.executable,
            "-c",
            CHECK,
            str(folder.absolute()),
            str(Path(scratch) / "expected.safetensors"),
            dtype,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch, check=False)
    line = next((text for text in done.stdout.splitlines() if text.startswith("FAULTS ")), None)
    if line is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{folder}: the exported checkpoint does not load in a fresh process: {reason}")
    if faults := json.loads(line.removeprefix("FAULTS ")):
        raise UserError(f"{folder}: the exported checkpoint is not what was built: {'; '.join(faults)}")
