"""Models larger than memory: recipes run under a hard limit, and what they held, against the size of the weights.

    python recipes/studies/memory_curve.py MODEL SCRATCH OUT.json [--limit-gib 2] [--layers 8,16,32]

Makes Llama models with random weights in SCRATCH (twice the largest one's size is needed there) and runs
`spts-compress recipe` on each in a memory cgroup (version 1 or 2; needs the right to make one). MODEL is a folder whose
tokenizer and other settings they take. Cached pages of files count for a cgroup's limit, and are what it drops first;
`anonymous` is what can't be dropped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import size, table

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 2560, 8960, 20, 4


def build(source: Path, layers: int, folder: Path) -> None:
    """Weights layer by layer, a file each, so that making them needs no memory either."""
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS,
            "tie_word_embeddings": True, "dtype": "bfloat16",
        }
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    generator, index = torch.Generator().manual_seed(0), {}

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    keys = HIDDEN // HEADS * KV_HEADS
    for number in range(-1, layers):
        if number < 0:
            made = {"model.embed_tokens.weight": matrix(config.vocab_size, HIDDEN)}
            made["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        else:
            shapes = {
                "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (keys, HIDDEN),
                "self_attn.v_proj": (keys, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }  # fmt: skip
            made = {f"model.layers.{number}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                made[f"model.layers.{number}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        name = f"model-{number + 2:05}-of-{layers + 1:05}.safetensors"
        save_file(made, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(made, name))
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


class Limited:
    """A memory cgroup: what is started in it and all its children together may hold `limit` bytes."""

    def __init__(self, limit: int):
        first = Path("/sys/fs/cgroup/memory")
        self.old = first.is_dir()
        self.folder = (first if self.old else Path("/sys/fs/cgroup")) / f"spts-{os.getpid()}"
        self.folder.mkdir()
        (self.folder / ("memory.limit_in_bytes" if self.old else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def anonymous(self) -> int:
        """Bytes that no file backs."""
        key = "rss" if self.old else "anon"
        rows = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return next(int(value) for name, value in rows if name == key)

    def close(self) -> None:
        self.folder.rmdir()


def run(folder: Path, limit: int) -> dict[str, float]:
    """Seconds of a recipe under `limit` bytes, and the most anonymous memory of all its processes together."""
    layers = json.loads((folder / "base" / "config.json").read_text())["num_hidden_layers"]
    skipping = {"start": layers - 4, "stages": [{"end": layers - 1, "budget": {"fraction": 0.3}}]}  # equal work
    recipe = {
        "model": {"path": str(folder / "base")},
        "calibration": {"source": ["python-docs"], "tokens": 4096, "length": 512},
        "proxy": {"channels": 256, "rank": 64, "steps": 40},
        "schedule": skipping,
        "report": {"lengths": [512], "pairs": 1, "needles": 0, "answers": 0},
        "export": {"path": str(folder / "out")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    limited, most, begin = Limited(limit), 0, time.monotonic()
    command = [sys.executable, "-m", "spts_compress", "recipe", str(folder / "recipe.yaml")]
    try:
        process = subprocess.Popen(command, preexec_fn=limited.enter)
        while process.poll() is None:
            most = max(most, limited.anonymous())
            time.sleep(0.02)
    finally:
        time.sleep(0.5)
        limited.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.monotonic() - begin, "anonymous": most}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("scratch", type=Path)
parser.add_argument("out", type=new_result)
parser.add_argument("--limit-gib", type=float, default=2.0)
parser.add_argument("--layers", default="8,16,32")
args = parser.parse_args()
limit, rows = int(args.limit_gib * 2**30), []
folders = {layers: args.scratch / f"{layers}-layers" for layers in map(int, args.layers.split(","))}
for folder in folders.values():
    if os.path.lexists(folder):
        parser.error(f"{folder} exists, and would be deleted in the end; give another SCRATCH, or remove it yourself")
for layers, folder in folders.items():
    folder.mkdir(parents=True)
    try:
        (folder / "base").mkdir()
        build(args.model, layers, folder / "base")
        weights = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
        rows.append({"layers": layers, "weights": weights, **run(folder, limit)})
    finally:
        shutil.rmtree(folder)
command = (
    f"python recipes/studies/memory_curve.py MODEL SCRATCH OUT --limit-gib {args.limit_gib:g} --layers {args.layers}"
)
result = {"command": command, "hardware": hardware("cpu"), "limit": limit, "rows": rows}
args.out.write_text(json.dumps(result, indent=1) + "\n")
shown = table(
    ["layers", "weights", f"anonymous memory at most (limit {size(limit)})", "whole run"],
    [[r["layers"], size(r["weights"]), size(r["anonymous"]), f"{r['seconds'] / 60:.1f} min"] for r in rows],
)
args.out.with_suffix(".md").write_text(f"`{command}`\n\n{shown}\n")
print(shown)
