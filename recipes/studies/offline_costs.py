"""How time and memory of the offline stages grow with layers, hidden size and calibration tokens.

    python recipes/studies/offline_costs.py MODEL OUT.json

Runs `spts-compress recipe` on Llama models with random weights, each in a process of its own; MODEL is a folder whose
tokenizer and other settings they take.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import size, table

BASE = {"layers": 8, "hidden": 512, "tokens": 16384}
VARIED = {"layers": (4, 16), "hidden": (256, 1024), "tokens": (8192, 32768)}


def build(source: Path, layers: int, hidden: int, folder: Path) -> None:
    """A random Llama model with heads of 64."""
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 64,
            "num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256),
        }
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def run(source: Path, layers: int, hidden: int, tokens: int) -> dict[str, dict[str, float]]:
    """Stages of one run, and the `process`: peak resident memory and seconds of all."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(source, layers, hidden, folder / "base")
        recipe = {
            "model": {"path": str(folder / "base")},
            "calibration": {"source": ["python-docs"], "tokens": tokens, "length": 2048},
            "proxy": {"channels": hidden // 2, "rank": hidden // 16, "max_flop_fraction": 1.0},
            "search": {
                "speedup": 1.3, "lengths": [1024], "kinds": ["free"], "prompts": 2, "candidates": 8, "rounds": 0,
                "starts": [layers // 2],
            },
            "report": {"lengths": [256], "pairs": 1, "needles": 0, "answers": 0},
            "export": {"path": str(folder / "out")},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "spts_compress", "recipe", str(folder / "recipe.yaml")]
        # of a process between, whose only child the run is, so that peaks of other runs do not count
        watched = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", watched, *command], check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads((folder / "out" / "spts_report.json").read_text())
        unit = 1 if sys.platform == "darwin" else 1024
        return {**report["stages"], "process": {"peak_bytes": int(done.stdout) * unit}}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("out", type=new_result)
args = parser.parse_args()
settings = [BASE, *({**BASE, name: value} for name, values in VARIED.items() for value in values)]
runs = [{**setting, "stages": run(args.model, **setting)} for setting in settings]
growth = {}  # exponents: 1 is in proportion
for name, (low, high) in VARIED.items():
    small, large = (next(r for r in runs if r[name] == value and value != BASE[name]) for value in (low, high))
    growth[name] = {
        f"{stage} {what}": math.log(large["stages"][stage][what] / small["stages"][stage][what], high / low)
        for stage in small["stages"]
        for what in small["stages"][stage]
        if min(large["stages"][stage][what], small["stages"][stage][what]) > 0
    }
command = "python recipes/studies/offline_costs.py MODEL OUT"
result = {"command": command, "hardware": hardware("cpu"), "runs": runs, "growth": growth}
args.out.write_text(json.dumps(result, indent=1) + "\n")
stages = [name for name in runs[0]["stages"] if name != "process"]
rows = [
    [
        r["layers"], r["hidden"], r["tokens"],
        *(f"{r['stages'][s]['seconds']:.1f} s, {size(r['stages'][s]['peak_bytes'])}" for s in stages),
        size(r["stages"]["process"]["peak_bytes"]),
    ]
    for r in runs
]  # fmt: skip
shown = table(["layers", "hidden size", "tokens", *stages, "whole process"], rows)
args.out.with_suffix(".md").write_text(f"`{command}`\n\n{shown}\n")
print(shown)
