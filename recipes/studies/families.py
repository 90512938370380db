"""What the proxies are worth in every family, by kind of layer: with real weights where they fit, else random ones.

    python recipes/studies/families.py LLAMA_FOLDER OUT.json

Takes a Llama checkpoint with tied embeddings, writes it as Mistral, as Qwen2 (without biases), as Phi-3 (its
projections fused) and as Mixtral (every expert a copy of the one network), which all compute what it computes, and as
Ministral with a window in every other layer, which does not; and runs one recipe on each. The other families' attention
or norms can't compute it, so they get small models of random weights and its tokenizer.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from spts_compress import pipeline
from spts_compress.calibrate import data
from spts_compress.checkpoint.families import FAMILIES
from spts_compress.cost import has_experts
from spts_compress.modeling.stock_layer import FULL, SLIDING, layer_kinds
from spts_compress.recipe import load
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("llama", type=Path)
parser.add_argument("out", type=new_result)
args = parser.parse_args()

EXPERTS, WINDOW = 2, 512
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
        "probe": {"window_size": 32, "heads": "max", "score_carry": 1.0, "kernel_size": 31},
        "sink_tokens": 4,
        "recent_tokens": 32,
        "ffn_selection": "relative",
    },
    "report": {"lengths": [1024], "pairs": 1, "needles": 2, "answers": 2, "quality_length": 2048},
}


def unbiased(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [k.replace("weight", "bias") for k in state if any(p in k for p in ("q_proj", "k_proj", "v_proj"))]
    return state | {n: torch.zeros(len(state[n.replace("bias", "weight")]), dtype=torch.bfloat16) for n in names}


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
    "qwen2": (Qwen2Config(**plain), unbiased),
    "ministral": (
        MinistralConfig(**plain, sliding_window=WINDOW, layer_types=[FULL, SLIDING] * (layers // 2)),
        dict,
    ),
    "phi3": (Phi3Config(**plain), fused),
    "mixtral": (
        MixtralConfig(**plain, num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS, sliding_window=None),
        copied,
    ),
}
# As small as shows what is special of a family; random weights, large enough that tokens differ.
SMALL = {
    "vocab_size": stock.config.vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True, "moe_intermediate_size": 64,
    "experts_implementation": "eager",
}  # fmt: skip
ROUTED = {"num_experts": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 4,
}  # fmt: skip
MORE = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 256, "layer_types": [SLIDING, FULL] * 3},
    "qwen3_moe": {"head_dim": 16, **ROUTED},
    "deepseek_v2": {**ROUTED, **LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**ROUTED, **LATENT},
}
SMALL_RECIPE = {**RECIPE, "proxy": {"channels": 32, "rank": 8, "max_flop_fraction": 1.0}}
SMALL_RECIPE["schedule"] = {
    **RECIPE["schedule"],
    "start": 2,
    "stages": [
        {"end": 3, "budget": {"fraction": 0.5}, "prune_to": {"fraction": 0.6}},
        {"end": 5, "budget": {"fraction": 0.35}},
    ],
}


def kinds_of(config: Any) -> list[str]:
    """What each layer is: attention with or without a window, a network that all tokens share or experts."""
    names = {FULL: "full", SLIDING: "window"}
    return [
        f"{names[kind]}, {'experts' if has_experts(config, layer) else 'plain'}"
        for layer, kind in enumerate(layer_kinds(config))
    ]


def report_of(folder: Path, model: Any, recipe: dict) -> dict:
    """The report of a run of `recipe` on `model`."""
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe = {**recipe, "model": {"path": str(folder / "base")}, "export": {"path": str(folder / "out")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return pipeline.run(load(folder / "recipe.yaml"), "", folder / "out")


def rated(weights: str, family: str, config: Any, fits: list[dict]) -> None:
    """A row of the table for each kind of layer that skips."""
    kinds = kinds_of(config)
    rows[family] = {"weights": weights}
    for kind in dict.fromkeys(kinds[fit["layer"]] for fit in fits):
        here = [fit for fit in fits if kinds[fit["layer"]] == kind]
        middle = {
            who: {m: median(fit[who][m] for fit in here) for m in ("spearman", "recall")}
            for who in ("proxy", "input_norm")
        }
        ranks = sorted({fit["candidates"][fit["chosen"]]["rank"] for fit in here})
        each = [{k: fit[k] for k in ("layer", "proxy", "input_norm")} for fit in here]
        rows[family][kind] = {**middle, "ranks": ranks, "layers": each}
        shown = (f"{middle[who]['spearman']:.3f} / {middle[who]['recall']:.3f}" for who in ("proxy", "input_norm"))
        lines.append([weights, family, kind, *shown, ", ".join(map(str, ranks))])


tokenizer = AutoTokenizer.from_pretrained(args.llama)
ids = tokenizer("\n\n".join(data.python_docs())[:12000], return_tensors="pt")["input_ids"][:, :1500]
rows: dict[str, dict] = {}
lines: list[list[str]] = []
answers, same = {}, []
torch.manual_seed(0)
with TemporaryDirectory() as scratch:
    for family, (config, dressed) in DRESSED.items():
        folder = Path(scratch) / family
        folder.mkdir()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(dressed(stock.state_dict()))
        model.generation_config = stock.generation_config
        rated("real", family, config, report_of(folder, model, RECIPE)["proxies"])
        made = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, dtype=torch.float32)
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        answers[family] = [made.generate(ids, spts=spts, **options)[0, ids.shape[1] :] for spts in (None, False)]
        equal = [bool(torch.equal(a, b)) for a, b in zip(answers[family], answers["llama"], strict=True)]
        rows[family]["skipping as llama"], rows[family]["dense as llama"] = equal
        same += [f"{family}{'' if equal[0] else ' not'}"] if family != "ministral" else []
        shutil.rmtree(folder)
    for family in FAMILIES:
        if family in DRESSED:
            continue
        folder = Path(scratch) / family
        folder.mkdir()
        config = AutoConfig.for_model(family, **{**SMALL, **MORE.get(family, {})})
        model = AutoModelForCausalLM.from_config(config)
        rated("random", family, config, report_of(folder, model, SMALL_RECIPE)["proxies"])
command = "python recipes/studies/families.py $MODELS/smollm2-135m-instruct OUT"
args.out.write_text(
    json.dumps({"command": command, "hardware": hardware("cpu"), "recipe": RECIPE, "small": SMALL, "more": MORE,
                "small recipe": SMALL_RECIPE, "rows": rows}, indent=1) + "\n"
)  # fmt: skip
heads = ["weights", "layout", "layers", "proxy, Spearman / recall", "norm of the input, free", "ranks chosen"]
shown = table(heads, lines)
args.out.with_suffix(".md").write_text(
    f"`{command}`\n\nMedians over the skipping layers of a kind, on tokens that nothing was fitted or chosen on.\n\n"
    f"{shown}\n\nThe skipping answer to one prompt of 1500 tokens is the Llama's, token for token: {', '.join(same)}.\n"
)
print(shown)
