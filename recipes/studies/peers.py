"""SPTS beside other methods on the same weights, prompts and attention backend: TTFT, KV cache and retrieval.

    python recipes/studies/peers.py CHECKPOINT OUT.json [--lengths 4096,8192] [--items 6] [--haystack FILE]

GemFilter (arXiv 2409.17422) and FastKV (arXiv 2502.01068) are written here from their papers. SnapKV and expected
attention are the package kvpress's own (`pip install --no-deps kvpress fire "cachetools<6"`). kvpress 0.5 asks for a
transformers below 5.3, the checkpoint for one from 5.17 on; the one thing it misses there, `cache_position`, is handed
to it by a hook. All methods see the whole prompt with its question, and answer greedily in the same loop.
"""

import argparse
import importlib.util
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import avg_pool1d
from tqdm import tqdm
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from spts_compress.calibrate import data
from spts_compress.cost import predicted
from spts_compress.evaluate.suites import load
from spts_compress.tasks import ruler
from spts_compress.tasks.runner import encode
from spts_compress.tasks.scorers import score
from spts_compress.timing.pairs import kv_bytes, stock_twin, synchronize
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import table

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
Prefill = Callable[[torch.Tensor], tuple[torch.Tensor, Any, int]]  # ids -> last logits, cache, next position


def plain(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any, int]:
    """The model's own prefill."""
    out = model(ids, use_cache=True, logits_to_keep=1, **options)
    return out.logits[:, -1], out.past_key_values, ids.shape[1]


def pressed(model: Any, press: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any, int]:
    """A prefill whose cache a kvpress press shortens layer by layer."""

    def hand_over(module: Any, args: Any, kwargs: dict) -> tuple[Any, dict]:
        return args, {**kwargs, "cache_position": torch.arange(ids.shape[1], device=ids.device)}

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        stack.enter_context(press(model))
        return plain(model, ids)


def attention_in(layer: Any, states: torch.Tensor, rotary: Any, cache: Any, window: int, softmax: bool) -> torch.Tensor:
    """What the last `window` queries give every token in `layer`, summed over heads and queries: (n,)."""
    attention, normed = layer.self_attn, layer.input_layernorm(states[:, -window:])
    shape = (1, window, -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    cos, sin = (part[:, -window:] for part in rotary)
    query, _ = apply_rotary_pos_emb(query, query, cos, sin)
    key = cache.layers[attention.layer_idx].keys
    groups = query.shape[1] // key.shape[1]
    logits = query.float() @ key.repeat_interleave(groups, dim=1).float().transpose(2, 3)
    if softmax:
        future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
        logits[..., -window:].masked_fill_(future, float("-inf"))
        logits = torch.softmax(logits * attention.scaling, dim=-1)
    return logits.sum(dim=(0, 1, 2))


def through(model: Any, layers: Any, states: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """States (1, n, D) after some stock layers, without any mask but causality."""
    rotary = model.model.rotary_emb(states, position_ids=positions)
    for layer in layers:
        states = layer(states, position_embeddings=rotary, position_ids=positions, past_key_values=cache)
    return states


def gemfilter(model: Any, depth: int, keep: int, ids: torch.Tensor) -> tuple[torch.Tensor, Any, int]:
    """GemFilter: `depth` layers read the prompt; the `keep` tokens whose keys in the last of them have the largest
    products with the last query, summed over heads, pooled over 5 neighbours, are the prompt of the whole model."""
    cache, positions = DynamicCache(config=model.config), torch.arange(ids.shape[1], device=ids.device)[None]
    states = through(model, model.model.layers[: depth - 1], model.model.embed_tokens(ids), positions, cache)
    rotary, filter_layer = model.model.rotary_emb(states, position_ids=positions), model.model.layers[depth - 1]
    # Of the filter layer only its keys are needed.
    attention, normed = filter_layer.self_attn, filter_layer.input_layernorm(states)
    key = attention.k_proj(normed).view(1, ids.shape[1], -1, attention.head_dim).transpose(1, 2)
    key, _ = apply_rotary_pos_emb(key, key, *rotary)
    cache.update(key, key, attention.layer_idx)
    scores = avg_pool1d(attention_in(filter_layer, states, rotary, cache, 1, False)[None], 5, 1, 2)[0]
    chosen = scores.topk(min(keep, len(scores))).indices.sort().values
    return plain(model, ids[:, chosen])


def fastkv(model: Any, depth: int, share: float, kv_share: float, ids: torch.Tensor) -> tuple[torch.Tensor, Any, int]:
    """FastKV: `depth` layers read the prompt; the share of it with the most attention of the last 8 queries in the
    last of them, pooled over 7 neighbours, goes on. Every layer's cache keeps at most the share `kv_share` of the
    prompt, chosen in the same way (SnapKV)."""
    window, length = 8, ids.shape[1]
    cache, positions = DynamicCache(config=model.config), torch.arange(length, device=ids.device)[None]
    states = model.model.embed_tokens(ids)

    def best(layer: Any, before: torch.Tensor, count: int) -> torch.Tensor:
        rotary = model.model.rotary_emb(before, position_ids=positions)
        scores = attention_in(layer, before, rotary, cache, window, True)
        scores = avg_pool1d(scores[None], 7, 1, 3)[0]
        scores[-window:] = float("inf")
        return scores.topk(min(count, len(scores))).indices.sort().values

    for index, layer in enumerate(model.model.layers):
        before = states
        states = through(model, [layer], states, positions, cache)
        kept = best(layer, before, round(kv_share * length))
        chosen = best(layer, before, round(share * length)) if index == depth - 1 else None
        held = cache.layers[index]
        if len(kept) < held.keys.shape[2]:
            held.keys, held.values = held.keys[:, :, kept], held.values[:, :, kept]
        if chosen is not None:
            states, positions = states[:, chosen], positions[:, chosen]
    return model.lm_head(model.model.norm(states[:, -1:]))[:, -1], cache, length


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prefill: Prefill, item: Any) -> str:
    """Greedy answer after a prefill."""
    ids = encode(tokenizer, [item.text], model.device)["input_ids"]
    logits, cache, position = prefill(ids)
    stop = model.generation_config.eos_token_id
    stops, made = set(stop if isinstance(stop, list) else [stop]), []
    for _ in range(item.answer_tokens):
        made.append(int(logits.argmax()))
        if made[-1] in stops:
            break
        step = torch.tensor([[made[-1]]], device=model.device)
        logits = model(step, past_key_values=cache, position_ids=torch.full_like(step, position)).logits[:, -1]
        position += 1
    return tokenizer.decode(made, skip_special_tokens=True)


@torch.no_grad()
def timed(prefill: Prefill, ids: torch.Tensor) -> float:
    synchronize(ids.device)
    begin = time.perf_counter()
    prefill(ids)[0].argmax()
    synchronize(ids.device)
    return time.perf_counter() - begin


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", type=Path)
parser.add_argument("out", type=new_result)
parser.add_argument("--lengths", default="4096,8192", help="retrieval at the first, times at all")
parser.add_argument("--items", type=int, default=6)
parser.add_argument("--pairs", type=int, default=3)
parser.add_argument("--haystack")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()
lengths = [int(n) for n in args.lengths.split(",")]
spts, tokenizer, _ = load(args.checkpoint, args.device, args.dtype)
dense, schedule = stock_twin(spts), spts.config.schedule()
share, start = predicted(spts.config, schedule, lengths[0])["kv_share"], schedule.start
methods: dict[str, tuple[Any, Prefill]] = {
    "dense": (dense, partial(plain, dense)),
    "SPTS": (spts, partial(plain, spts)),
    f"GemFilter, {start} layers, 1024 tokens": (dense, partial(gemfilter, dense, start, 1024)),
    f"GemFilter, {start} layers, 2048 tokens": (dense, partial(gemfilter, dense, start, 2048)),
    f"FastKV, {start} layers, 20%, KV 10%": (dense, partial(fastkv, dense, start, 0.2, 0.1)),
    f"FastKV, {start} layers, 30%, KV {share:.0%}": (dense, partial(fastkv, dense, start, 0.3, share)),
}
if importlib.util.find_spec("kvpress"):
    logging.disable(logging.WARNING)
    from kvpress import ExpectedAttentionPress, SnapKVPress

    for name, press in (("SnapKV", SnapKVPress(1 - share)), ("expected attention", ExpectedAttentionPress(1 - share))):
        methods[f"kvpress, {name}, KV {share:.0%}"] = dense, partial(pressed, dense, press)
else:
    print("kvpress is not installed, so its presses are left out", file=sys.stderr)

prose = "\n\n".join(data.from_files(Path(args.haystack)) if args.haystack else data.python_docs())
made = {task: ruler.examples(task, tokenizer, prose, lengths[0], args.items, seed=7) for task in TASKS}
rows: dict[str, dict] = {name: {"scores": {task: [] for task in TASKS}, "ttft": {}, "kv": {}} for name in methods}
with tqdm(total=len(methods) * len(TASKS) * args.items, desc="retrieval") as progress:
    for task, items in made.items():
        for item in items:
            for name, (model, prefill) in methods.items():
                found = answer(model, tokenizer, prefill, item)
                rows[name]["scores"][task].append(score(item.scorer, found, item.outputs, item.classes))
                progress.update()
for length in lengths:
    [item] = ruler.examples("niah_single_2", tokenizer, prose, length, 1, seed=8)
    ids = encode(tokenizer, [item.text], dense.device)["input_ids"]
    for name, (_, prefill) in methods.items():
        with torch.no_grad():
            rows[name]["kv"][length] = kv_bytes(prefill(ids)[1])  # warms up, too
    taken = [
        {name: timed(prefill, ids) for name, (_, prefill) in methods.items()}
        for _ in tqdm(range(args.pairs), desc=f"timing at {length}")
    ]
    for name in methods:
        ratios = sorted(t["dense"] / t[name] for t in taken)
        rows[name]["ttft"][length] = {
            "seconds": median(t[name] for t in taken), "ratio": median(ratios), "range": [ratios[0], ratios[-1]]
        }  # fmt: skip
command = shlex.join(["python", "recipes/studies/peers.py", "DIR", "OUT", *sys.argv[3:]])
if args.haystack:
    command = command.replace(args.haystack, "$HAYSTACK")
result = {
    "command": command, "hardware": hardware(args.device), "dtype": args.dtype, "items_a_task": args.items,
    "spts": schedule.to_dict(), "rows": rows,
}  # fmt: skip
args.out.write_text(json.dumps(result, indent=1) + "\n")
lines = [
    [
        name,
        *("{:.2f}x ({:.2f}-{:.2f})".format(row["ttft"][n]["ratio"], *row["ttft"][n]["range"]) for n in lengths),
        *(f"{row['kv'][n] / rows['dense']['kv'][n]:.0%}" for n in lengths),
        *(f"{100 * sum(values) / len(values):.0f}" for values in row["scores"].values()),
    ]
    for name, row in rows.items()
]  # fmt: skip
shown = table(["", *(f"TTFT, {n}" for n in lengths), *(f"KV, {n}" for n in lengths), *TASKS], lines)
args.out.with_suffix(".md").write_text(f"`{command}`\n\n{shown}\n")
print(shown)
