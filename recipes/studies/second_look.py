"""Does a second look at the tokens that a draft attends to bring free answers nearer to dense, at equal total cost?

    python recipes/studies/second_look.py CHECKPOINT LONGBENCH OUT.json --work FOLDER [--items 0-1] [--speedup 2.0]

CHECKPOINT has updates. A first pass reads a prompt at fewer FLOPs and keeps all keys and values; something scores the
tokens again in the layers that skipped them; the best, and the prompt's last ones, run through the skipping layers for
real; then dense's own greedy answer is followed, teacher-forced. Drafts and second looks count: every way costs dense /
--speedup. FOLDER keeps each prompt's rows under what they depend on. Qwen2 and Llama; no
windows, no pruning.
"""

import argparse
import copy
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from peer_methods import solve
from scipy.stats import spearmanr
from tqdm import tqdm

from spts_compress.cost import LayerShape, layer_costs
from spts_compress.evaluate.suites import computed_how, load
from spts_compress.modeling.selection import pool_scores
from spts_compress.tasks.agreement import agreement
from spts_compress.tasks.longbench import LongBench
from spts_compress.tasks.runner import encode
from spts_compress.utils.paths import new_result
from spts_compress.utils.store import Store, file_hash, fingerprint
from spts_compress.utils.tables import table

ANSWER, DRAFT = 32, 12  # tokens
LOOKS = {1.2: ("draft 12", "draft 4", "probe", "dense 12", "chance"), 1.1: ("draft 12",), 1.4: ("draft 12", "probe")}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, kind in {"checkpoint": Path, "longbench": str, "out": new_result}.items():
    parser.add_argument(name, type=kind)
parser.add_argument("--work", type=Path, required=True)
parser.add_argument("--length", type=int, default=4096)
parser.add_argument("--items", default="0-1", help="of each task, from the first to the last")
parser.add_argument("--device", default="cpu")
parser.add_argument("--speedup", type=float, default=2.0, help="dense over total FLOPs, of every way")
args = parser.parse_args()
torch.set_grad_enabled(False)
model, tokenizer, keys = load(args.checkpoint, args.device, "bfloat16")
config, layers, base = model.config, model.model.layers, model.config.schedule()
shapes, skipping = [LayerShape.of(config, number) for number in range(len(layers))], range(base.start, len(layers))


def flops(at: range | list[int], which: range) -> float:
    """Of tokens at positions `at` in some layers, each seeing all tokens up to itself."""
    weights = sum(shapes[i].key + shapes[i].value + shapes[i].query + shapes[i].output for i in which)
    rest = sum(2.0 * shapes[i].pair * (sum(at) + len(at)) + shapes[i].feed_forward(len(at)) for i in which)
    return 2.0 * len(at) * weights + rest


def at_speed(speedup: float, n: int) -> tuple[dict[str, Any], float]:
    """What makes the schedule that fast, all stages alike and with all keys and values, and its FLOPs."""

    def changes(factor: float) -> dict[str, Any]:
        shares = [min(1.0, stage.budget.fraction * factor) for stage in base.stages]
        stages = [{"end": s.end, "budget": {"fraction": share}} for s, share in zip(base.stages, shares, strict=True)]
        return {"stages": stages, "kv": 1.0, "min_length": 0}

    def cost(factor: float) -> float:
        return sum(layer.total for layer in layer_costs(config, config.schedule(**changes(factor)), n))

    dense = sum(shape.dense(n) for shape in shapes)
    factor = solve(lambda factor: dense / cost(factor), speedup, 1e-6, 3.0, 40)
    return changes(factor), cost(factor)


def attention(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What queries (1, H, w, d) attend to among all keys, the mean of the heads: (w, n)."""
    grouped = query.float().reshape(key.shape[1], -1, query.shape[-1]) * layer.self_attn.scaling
    logits = grouped @ key[0].float().transpose(1, 2)
    return logits.view(*query.shape[1:3], -1).softmax(-1).mean(0)


def follow(cache: Any, logits: torch.Tensor, n: int, count: int, given: list[int] | None = None) -> dict[str, Any]:
    """`count` greedy tokens after a prompt of n tokens (fewer if they end), or those `given`, which leave the cache
    again: log probabilities that they come with, and by layer their queries and what each attends to in the prompt."""
    ends, tokens, rows = np.atleast_1d(model.generation_config.eos_token_id), list[int](), []
    queries, attended = ({number: list[torch.Tensor]() for number in skipping} for _ in range(2))
    with ExitStack() as hooks:
        for number, found in queries.items():
            add = partial(lambda found, _, states: found.append(states[0]), found)
            hooks.callback(layers[number].register_forward_pre_hook(add).remove)
        while len(tokens) < count and not (tokens and given is None and tokens[-1] in ends):
            rows.append(torch.log_softmax(logits.float(), dim=-1))
            tokens.append(int(logits.argmax()) if given is None else given[len(tokens)])
            logits = model(input_ids=logits.new_tensor([tokens[-1:]], dtype=torch.long), past_key_values=cache).logits[
                0, -1
            ]
            where = model.model.rotary_emb(rows[0], torch.tensor([[n + len(tokens) - 1]], device=model.device))
            for number, found in queries.items():
                layer, key = layers[number], cache.layers[number].keys
                found[-1] = layer.queries(layer.normed("before_attention", found[-1]), *where).to(key.dtype)
                attended[number].append(attention(layer, found[-1], key)[0, :n])
    cache.crop(-len(tokens))
    return {"tokens": tokens, "rows": torch.stack(rows), "queries": queries, "attended": attended}


def first_pass(ids: torch.Tensor, changes: Any, ask: Any = None) -> tuple[Any, torch.Tensor, torch.Tensor, dict, dict]:
    """A prefill's cache, the next token's logits (V), the states before the first skipping layer, and by layer the
    probe's scores and which tokens (n) are skipped; `ask` makes other scores of a layer's number, scores and keys."""
    before, probed, skipped = [], {}, {}

    def scores(
        number: int, stock: Any, normed: Any, key: Any, cos_sin: Any, slots: Any, plan: Any, carried: Any
    ) -> Any:
        raw = stock(normed, key, cos_sin, slots, plan, carried)
        earlier = 0.0 if carried is None else base.probe.score_carry * carried
        raw = raw if ask is None else earlier + ask(number, raw - earlier, key)
        order = plan.order(pool_scores(raw, base.probe.kernel_size), raw, plan.active)
        probed[number], active = (raw - earlier)[0], plan.choose(plan.active, order)
        skipped[number] = torch.ones_like(raw[0])
        skipped[number][slice(None) if active is None else active] = 0.0
        return raw

    with ExitStack() as hooks:
        note = layers[base.start].register_forward_pre_hook(lambda _, given: before.append(given[0].clone()))
        hooks.callback(note.remove)
        for number in skipping:
            layers[number]._scores = partial(scores, number, layers[number]._scores)
            hooks.callback(delattr, layers[number], "_scores")
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, spts=changes)
    return out.past_key_values, out.logits[0, -1], before[0], probed, skipped


def second_look(cache: Any, before: torch.Tensor, need: torch.Tensor, budget: float) -> tuple[Any, torch.Tensor, int]:
    """The cache and the next token's logits after the most needed tokens, as many as `budget` pays for, and the
    prompt's last ones ran through the skipping layers: each attends to all up to itself, its key and value are new."""
    n, few, many = len(need), 0, len(need) - base.always_last
    order, recent = need[:many].sort(descending=True, stable=True).indices, torch.arange(many, n, device=need.device)
    while few < many:
        count = (few + many + 1) // 2
        paid = flops(torch.cat([order[:count], recent]).tolist(), skipping) <= budget
        few, many = (count, many) if paid else (few, count - 1)
    at = torch.cat([order[:few].sort().values, recent])
    cache, states, where = copy.deepcopy(cache), before[:, at], model.model.rotary_emb(before, at[None])
    mask = (torch.arange(n, device=at.device) <= at[:, None])[None, None]
    for layer, held in list(zip(layers, cache.layers, strict=True))[base.start :]:
        normed = layer.normed("before_attention", states)
        for kept, new in zip((held.keys, held.values), layer.cached(normed, layer.keys(normed, *where)), strict=True):
            kept.index_copy_(2, at, new)
        output = layer.attention_function()(layer.queries(normed, *where), held.keys, held.values, mask)[0]
        states = states + layer.self_attn.o_proj(output.flatten(2))
        states = states + layer.feed_forward(states)
    return cache, model.lm_head(model.model.norm(states[:, -1:]))[0, 0], len(at)


def signs(draft: dict[str, Any], probed: dict, skipped: dict) -> dict[str, float]:
    """What may tell that a first pass goes wrong; the last is known at its first skipping layer."""
    rows, start = draft["rows"], probed[base.start] / probed[base.start].sum()
    entropies, top = -(rows.exp() * rows).sum(-1), rows[0].exp().topk(2).values
    missed = [float((sum(seen) * skipped[number]).sum()) / len(seen) for number, seen in draft["attended"].items()]
    return {
        "entropy of the next token": float(entropies[0]),
        "margin of the next token": float(top[1] - top[0]),
        "mean entropy of the draft": float(entropies.mean()),
        "the draft's attention to skipped tokens": mean(missed),
        "the probe's attention to skipped tokens": mean(float((probed[i] * skipped[i]).sum()) for i in skipping),
        "entropy of the first probe": float(-(start * (start + 1e-12).log()).sum()),
    }


def measure(example: Any) -> dict[str, Any]:
    """All ways on one prompt."""
    ids = encode(tokenizer, [example.text], model.device)["input_ids"]
    n, goal = ids.shape[1], sum(shape.dense(ids.shape[1]) for shape in shapes) / args.speedup
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, spts=False)
    dense = follow(out.past_key_values, out.logits[0, -1], n, ANSWER)
    answer, ways, signals = dense["tokens"], dict[str, Any](), dict[str, Any]()
    asked = {number: torch.cat(queries[:DRAFT], dim=2) for number, queries in dense["queries"].items()}

    def note(name: str, cost: float, cache: Any, logits: torch.Tensor, again: int = 0) -> None:
        later = model(input_ids=ids.new_tensor([answer]), past_key_values=cache).logits[0, :-1]
        cache.crop(-len(answer))
        found = agreement(dense["rows"], torch.log_softmax(torch.cat([logits[None], later]).float(), dim=-1))
        ways[name] = {**found, "speedup": goal * args.speedup / cost, "again": again}

    def oracle(number: int, raw: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own, seen = base.probe.window_size, attention(layers[number], asked[number], key)
        return (own * raw + seen.sum(0)) / (own + len(seen))

    changes, cost = at_speed(args.speedup, n)
    for name, ask in {"plain": None, "the oracle's probe": oracle}.items():
        note(name, cost, *first_pass(ids, changes, ask)[:2])
    for cut, looks in LOOKS.items():
        changes, cost = at_speed(cut * args.speedup, n)
        cache, logits, before, probed, skipped = first_pass(ids, changes)
        note(f"first pass {cut}", cost, cache, logits)
        draft, true = follow(cache, logits, n, DRAFT), follow(cache, logits, n, min(DRAFT, len(answer)), answer)
        signals[str(cut)] = signs(draft, probed, skipped)
        chance = torch.rand(n, generator=torch.Generator().manual_seed(example.index)).to(ids.device)
        for name in looks:
            kind, count = name.split()[0], int([*name.split(), 0][1])
            drafted = {"draft": draft, "dense": true}.get(kind, {"attended": {}})["attended"]
            seen = {number: sum(rows[:count]) for number, rows in drafted.items()} or probed
            need = pool_scores(sum(seen[i] * skipped[i] for i in skipping)[None], base.probe.kernel_size)[0]
            need = (chance if kind == "chance" else need) * (sum(skipped.values()) > 0)
            spent = cost + flops(range(n, n + count), range(len(layers))) + 2.0 * count * model.lm_head.weight.numel()
            note(f"second look after {cut}, {name}", goal, *second_look(cache, before, need, goal - spent))
    return {"task": example.task, "index": example.index, "prompt": n, "ways": ways, "signals": signals}


def report(rows: list[dict[str, Any]]) -> str:
    """The ways beside plain updates, and what the signals of a first pass predict."""
    lines, signals, plain = [], [], [row["ways"]["plain"]["kl"] for row in rows]
    drawn = np.random.default_rng(0).integers(0, len(rows), (4000, len(rows)))
    for name in rows[0]["ways"]:
        speed, again, kl, top1 = np.array([[r["ways"][name][k] for k in KEYS] for r in rows]).T
        low, high = np.quantile((kl - plain)[drawn].mean(1), (0.025, 0.975))
        kinds = {row["task"]: mean(r["ways"][name]["kl"] for r in rows if r["task"] == row["task"]) for row in rows}
        worst, less = (
            max(kinds, key=lambda kind: kinds[kind]),
            f"{(kl - plain).mean():+.3f} ({low:+.3f} to {high:+.3f})",
        )
        figures = *(f"{value:.3f}" for value in (kl.mean(), median(kl), top1.mean())), f"{worst} {kinds[worst]:.2f}"
        lines.append([name, f"{1 / (1 / speed).mean():.2f}x", f"{again.mean():.0f}", *figures, less])
    for cut, found in rows[0]["signals"].items():
        first = [row["ways"][f"first pass {cut}"]["kl"] for row in rows]
        for name in found:
            ranks = (spearmanr([row["signals"][cut][name] for row in rows], kl).statistic for kl in (first, plain))
            signals.append([cut, name, *(f"{rank:+.2f}" for rank in ranks)])
    heads = ["way", "counted", "tokens again", "KL", "median", "next token as dense", "worst task", "KL less plain's"]
    others = ["first pass", "signal", "rank correlation with its KL", "with plain's"]
    return f"{len(rows)} prompts\n\n{table(heads, lines)}\n\n{table(others, signals)}"


KEYS = "speedup", "again", "kl", "top1"
low, high = map(int, args.items.split("-"))
bench, rows, work = LongBench(args.longbench), [], Store(args.work)
how = [keys, computed_how(model), file_hash(Path(__file__)), args.speedup]
examples = [e for task in bench.tasks() for e in bench.examples(task, tokenizer, args.length, high + 1, 64)]
for example in tqdm([e for e in examples if e.index >= low and e.tokens > 0.6 * args.length]):
    key = fingerprint(how, example.text)
    rows.append(work.json(f"{example.task}-{example.index}", key, partial(measure, example)))
args.out.write_text(json.dumps(rows, indent=1) + "\n")
print(report(rows))
