"""The paper's headline at its own scale: exact model shapes, random bfloat16 weights, one GPU.

    python recipes/studies/gpu.py --out DIR [--tiny] [stage ...]

Writes DIR/MODEL-shape/STAGE.json. Stages: headline (TTFT, 16 new tokens, memory at 8K to 128K), ablation (32K), batch
(16K), profile (32K). Time does not depend on the weights' values. `--tiny` runs each stage on tiny shapes, on a CPU
too, to see that it works, and writes DIR/MODEL-tiny.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from spts_compress.cost import predicted  # noqa: E402
from spts_compress.modeling import modeling_spts_llama, modeling_spts_qwen2  # noqa: E402
from spts_compress.timing import pairs  # noqa: E402

SHAPES = {
    "llama-3.1-8b": (
        "llama-paper.yaml", modeling_spts_llama.SptsLlamaConfig, modeling_spts_llama.SptsLlamaForCausalLM,
        dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ),
    "qwen2.5-7b": (
        "qwen2.5-7b.yaml", modeling_spts_qwen2.SptsQwen2Config, modeling_spts_qwen2.SptsQwen2ForCausalLM,
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
    ),
}  # fmt: skip
STAGES = ["headline", "ablation", "batch", "profile"]
SHAPES["llama-3.1-8b-updates"] = SHAPES["llama-3.1-8b-early"] = "llama.yaml", *SHAPES["llama-3.1-8b"][1:]
SMALL = dict(vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=True)
SIZES = {
    "qwen2.5-1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
    "qwen2.5-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
}
_, *CLASSES, LARGE = SHAPES["qwen2.5-7b"]
SHAPES |= {
    name: ("qwen2.5-coder-0.5b-updates.yaml", *CLASSES, {**LARGE, **SMALL, **sizes}) for name, sizes in SIZES.items()
}
EARLY = [{"end": end, "budget": {"fraction": f}} for end, f in ((11, 0.35), (17, 0.245), (24, 0.175), (31, 0.1225))]
CHANGES = {"llama-3.1-8b-early": {"start": 5, "stages": EARLY}}  # of the recipe's schedule
TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def build(name, device, tiny):
    """The SPTS model with random weights, and the stock model on the same tensors."""
    recipe_file, config_class, model_class, shape = SHAPES[name]
    recipe = yaml.safe_load((ROOT / "recipes" / recipe_file).read_text())
    block = {**recipe["schedule"], **({"proxy": recipe["proxy"]} if "proxy" in recipe else {}), **CHANGES.get(name, {})}
    if tiny:
        shape = {**shape, **TINY}
        if "head_dim" not in SHAPES[name][3]:
            shape.pop("head_dim")
        if "proxy" in block:
            block["proxy"] = {"channels": 16, "rank": 4}
        for stage in block["stages"]:
            for key in ("budget", "prune_to"):
                if isinstance(stage.get(key), int):
                    stage[key] //= 100
    config = config_class(**shape, spts=block, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = model_class(config).eval()
    torch.set_default_dtype(torch.float32)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return model, pairs.stock_twin(model)


def prompts(model, length, batch=1):
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


def variants(model):
    """The ablation's schedules: the paper's parts added one after another."""
    full = model.config.spts
    stages = full["stages"]
    unpruned = [{k: v for k, v in stage.items() if k != "prune_to"} for stage in stages]
    return {
        "+PAP": {**full, "stages": unpruned, "ffn_selection": "all"},
        "+LTP": {**full, "stages": unpruned},
        "+MSDP": full,
    }


def check(name):
    """The GPU against the CPU in float32 on a tiny shape: same selections, same logits, padded batch included."""
    model, _ = build(name, "cpu", tiny=True)
    model = model.float()
    ids = torch.randint(3, 512, (3, 400))
    mask = (torch.arange(400) >= torch.tensor([[0], [150], [90]])).long()
    found = {}
    for device in ("cpu", "cuda" if torch.cuda.is_available() else "cpu"):
        model.to(device)
        inputs = dict(input_ids=ids.to(device), attention_mask=mask.to(device), spts={"positions": True})
        with torch.no_grad():
            out = model(**inputs, logits_to_keep=1, use_cache=True)
            made = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        kept = [row["positions"].cpu() for row in model.skipped(out.past_key_values) if row["positions"] is not None]
        found[device] = (out.logits.cpu(), made.cpu(), kept)
    (a, made_a, kept_a), (b, made_b, kept_b) = found["cpu"], list(found.values())[-1]
    same = sum(int((x == y).sum()) for x, y in zip(kept_a, kept_b, strict=True)) / sum(x.numel() for x in kept_a)
    return {
        "logits_error": float((a - b).abs().max()),
        "same_tokens": bool(torch.equal(made_a, made_b)),
        "same_kept": same,
    }


def compare(stock, model, ids, rounds):
    """TTFT and 16 new tokens of dense and SPTS in turn, memory, and what the FLOPs allow."""
    row = pairs.compare({"dense": (stock, {}), "spts": (model, {})}, ids, rounds, (1, 16))
    return {**row, "flops": predicted(model.config, model.config.schedule(), ids.shape[1])}


def profile(model, ids):
    """Where one SPTS prefill's device time goes, and how often the host waits for the device inside it."""
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")  # raises where a layer waits for the device
            model(ids, logits_to_keep=1)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * ids.is_cuda
        begin = time.perf_counter()
        with torch.profiler.profile(activities=activities) as trace:
            model(ids, logits_to_keep=1)
            pairs.synchronize(ids.device)
        wall = time.perf_counter() - begin
    attribute = "self_device_time_total" if ids.is_cuda else "self_cpu_time_total"
    rows = sorted(trace.key_averages(), key=lambda row: -getattr(row, attribute))
    calls = {row.key: row.count for row in rows if "ynchronize" in row.key or "Memcpy DtoH" in row.key}
    kernels = [
        {"name": row.key[:120], "ms": getattr(row, attribute) / 1e3, "calls": row.count}
        for row in rows
        if not ids.is_cuda or row.device_type == torch.autograd.DeviceType.CUDA
    ]
    return {
        "wall_ms": wall * 1e3,
        "busy_ms": sum(k["ms"] for k in kernels),
        "host_waits": calls,
        "kernels": kernels[:60],
    }


def command(args):
    """What runs the same again, whatever folder was given."""
    words = ["python", "recipes/studies/gpu.py", *args.stages, "--out", "DIR", "--models", *args.models]
    words += ["--lengths", ",".join(map(str, args.lengths)), "--pairs", str(args.pairs)]
    return " ".join(words + ["--tiny"] * args.tiny)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["llama-3.1-8b", "qwen2.5-7b", "llama-3.1-8b-updates"])
    parser.add_argument(
        "--lengths", type=lambda t: [int(n) for n in t.split(",")], default=[8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    made = {
        (m, s): args.out / f"{m}-{'tiny' if args.tiny else 'shape'}" / f"{s}.json"
        for m in args.models
        for s in args.stages
    }
    for (_, stage), path in made.items():
        if stage not in STAGES:
            parser.error(f"unknown stage {stage}; there are {', '.join(STAGES)}")
        if path.exists():
            parser.error(f"{path} exists, and would be overwritten; give another --out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command(args),
    }
    scale = 64 if args.tiny else 1
    for name in args.models:
        print(name, "check", check(name), flush=True)
        model, stock = build(name, device, args.tiny)
        for stage in args.stages:
            begin = time.perf_counter()
            if stage == "headline":
                rows = []
                for length in args.lengths:
                    rounds = args.pairs if length <= 65536 else 1
                    rows.append(compare(stock, model, prompts(model, length // scale), rounds))
                    print(name, length, json.dumps(rows[-1]), flush=True)
            elif stage == "batch":
                rows = [compare(stock, model, prompts(model, 16384 // scale, b), 3) for b in (1, 2, 4)]
                for row in rows:
                    print(name, "batch", row["batch"], row["spts"]["speedup"], flush=True)
            elif stage == "ablation":
                rows, full = {}, model.config.spts
                for part, block in variants(model).items():
                    model.config.spts = block
                    rows[part] = compare(stock, model, prompts(model, 32768 // scale), args.pairs)
                    print(name, part, rows[part]["spts"]["speedup"], rows[part]["flops"], flush=True)
                model.config.spts = full
            else:
                rows = profile(model, prompts(model, 32768 // scale))
                print(name, "profile", rows["wall_ms"], rows["busy_ms"], rows["host_waits"], flush=True)
                for row in rows["kernels"][:25]:
                    print("  ", f"{row['ms']:9.2f} ms {row['calls']:6d}", row["name"][:90], flush=True)
            result = {**machine, "model": name, "stage": stage, "rows": rows, "took_s": time.perf_counter() - begin}
            made[name, stage].parent.mkdir(parents=True, exist_ok=True)
            made[name, stage].write_text(json.dumps(result, indent=1) + "\n")
        del model, stock
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
