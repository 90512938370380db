"""Real weights in other families' layouts: what the proxies are worth there, and whether answers stay the same.

    python recipes/results/families.py LLAMA_FOLDER OUT.json

Takes a Llama checkpoint with tied embeddings, writes it as Mistral, as Phi-3 (its projections fused) and as Mixtral
(every expert a copy of the one network), which all compute what it computes, and runs one recipe on each.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MixtralConfig, Phi3Config

from spts_compress import pipeline, text
from spts_compress.recipe import load
from spts_compress.report import hardware
from spts_compress.tables import table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("llama", type=Path)
parser.add_argument("out", type=Path)
args = parser.parse_args()

EXPERTS = 2
stock = AutoModelForCausalLM.from_pretrained(args.llama, dtype=torch.bfloat16)
plain = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures", "mlp_bias")}
layers = stock.config.num_hidden_layers
start = 7 * layers // 10
RECIPE = {
    "calibration": {"source": ["python-docs", "python-code"], "tokens": 16384, "length": 2048},
    "proxy": {"channels": 192, "rank": 48},
    "schedule": {
        "start": start,
        "stages": [
            {"end": (start + layers) // 2, "budget": {"fraction": 0.5}, "prune_to": {"fraction": 0.6}},
            {"end": layers - 1, "budget": {"fraction": 0.35}},
        ],
        "probe": {"queries": 32, "heads": "max", "carry": 1.0, "pool": 31},
        "keep_first": 4,
        "keep_last": 32,
        "feed_forward": "relative",
    },
    "report": {"lengths": [1024], "pairs": 1, "needles": 2, "answers": 2, "quality_length": 2048},
}


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {
        k: v
        for k, v in state.items()
        if not any(p in k for p in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    for n in range(layers):
        attention, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        made[attention + "qkv_proj.weight"] = torch.cat([state[f"{attention}{p}_proj.weight"] for p in "qkv"])
        made[mlp + "gate_up_proj.weight"] = torch.cat([state[f"{mlp}{p}_proj.weight"] for p in ("gate", "up")])
    return made


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {k: v for k, v in state.items() if ".mlp." not in k}
    for n in range(layers):
        mlp = f"model.layers.{n}.mlp."
        joined = torch.cat([state[f"{mlp}{p}_proj.weight"] for p in ("gate", "up")])
        made[mlp + "experts.gate_up_proj"] = joined.expand(EXPERTS, -1, -1).clone()
        made[mlp + "experts.down_proj"] = state[mlp + "down_proj.weight"].expand(EXPERTS, -1, -1).clone()
        made[mlp + "gate.weight"] = torch.randn(EXPERTS, stock.config.hidden_size) * 0.02
    return made


DRESSED = {
    "llama": (stock.config, dict),
    "mistral": (MistralConfig(**plain, sliding_window=None), dict),
    "phi3": (Phi3Config(**plain), fused),
    "mixtral": (
        MixtralConfig(**plain, num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS, sliding_window=None),
        copied,
    ),
}
tokenizer = AutoTokenizer.from_pretrained(args.llama)
ids = tokenizer("\n\n".join(text.python_docs())[:12000], return_tensors="pt")["input_ids"][:, :1500]
rows, lines, answers = {}, [], {}
torch.manual_seed(0)
with TemporaryDirectory() as scratch:
    for family, (config, dressed) in DRESSED.items():
        folder = Path(scratch) / family
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(dressed(stock.state_dict()))
        model.generation_config = stock.generation_config
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        recipe = {**RECIPE, "model": {"path": str(folder / "base")}, "export": {"path": str(folder / "out")}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        report = pipeline.run(load(folder / "recipe.yaml"), "", folder / "out")
        made = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, dtype=torch.float32)
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        answers[family] = [made.generate(ids, spts=spts, **options)[0, ids.shape[1] :] for spts in (None, False)]
        same = [bool(torch.equal(a, b)) for a, b in zip(answers[family], answers["llama"], strict=True)]
        fits = report["proxies"]
        middle = {
            who: {m: median(fit[who][m] for fit in fits) for m in ("spearman", "recall")}
            for who in ("proxy", "input_norm")
        }
        ranks = sorted({fit["candidates"][fit["chosen"]]["rank"] for fit in fits})
        rows[family] = {**middle, "ranks": ranks, "skipping as llama": same[0], "dense as llama": same[1],
                        "layers": [{k: fit[k] for k in ("layer", "proxy", "input_norm")} for fit in fits]}  # fmt: skip
        shown = (f"{middle[who]['spearman']:.3f} / {middle[who]['recall']:.3f}" for who in ("proxy", "input_norm"))
        lines.append([family, *shown, ", ".join(map(str, ranks)), *("yes" if s else "no" for s in same)])
        shutil.rmtree(folder)
command = "python recipes/results/families.py $MODELS/smollm2-135m-instruct OUT"
args.out.write_text(
    json.dumps({"command": command, "hardware": hardware("cpu"), "recipe": RECIPE, "rows": rows}, indent=1) + "\n"
)
heads = [
    "layout",
    "proxy, Spearman / recall",
    "norm of the input, free",
    "ranks chosen",
    "skipping answer as Llama's",
    "dense answer as Llama's",
]
shown = table(heads, lines)
args.out.with_suffix(".md").write_text(
    f"`{command}`\n\nMedians over the skipping layers, on tokens that nothing was fitted or chosen on.\n\n{shown}\n"
)
print(shown)
