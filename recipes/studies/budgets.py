"""Budgets that are a count, a fraction of the prompt, or follow the attention mass, at equal average cost.

    python recipes/studies/budgets.py RECIPE.yaml WORK_FOLDER SEARCH.json OUT.json [--lengths 2048,4096,8192]

Takes the schedule that SEARCH.json found and gives each stage, prompt by prompt, (a) one count at every length, (b) its
fraction of the prompt, (c) the fewest tokens that hold a share of the attention which the probe sees in the stage's
first layer. Counts and shares are such that over all prompts a stage's mean budget, in tokens, is that of (b).
WORK_FOLDER is the recipe's (its proxies are reused).
"""

import argparse
import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spts_compress import pipeline
from spts_compress.cost import predicted
from spts_compress.modeling.configuration_spts import Amount, Schedule
from spts_compress.recipe import load
from spts_compress.search import dense_reference
from spts_compress.search.evaluator import Evaluator, by_kind, compare, loss
from spts_compress.search.prompts import PromptSet
from spts_compress.tasks.recovery import interval
from spts_compress.tasks.runner import Answers
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.store import Store, fingerprint
from spts_compress.utils.tables import table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument("work", type=Path)
parser.add_argument("search", type=Path)
parser.add_argument("out", type=new_result)
parser.add_argument("--lengths", default="2048,4096,8192")
parser.add_argument("--prompts", type=int, default=6)
args = parser.parse_args()

recipe, store, held = load(args.recipe), Store(args.work), ExitStack()
held.enter_context(store.lock())  # to the end of the process
ready = pipeline.prepare(recipe, store, "cpu")
base, tokenizer, model, whole = ready.base, ready.tokenizer, ready.model, ready.skipping()
layers = base.config.num_hidden_layers
winner = Schedule.from_dict(json.loads(args.search.read_text())["points"][-1]["winner"]["schedule"], layers)
key = fingerprint(ready.key("cpu"), "budgets")
lengths, kinds = [*dict.fromkeys(map(int, args.lengths.split(",")))], ["retrieval", "multi-hop", "free"]
asked = {"lengths": lengths, "kinds": kinds, "prompts": args.prompts, "answer_tokens": 40}
section = recipe.search.model_copy(update={**asked, "seed": recipe.search.seed + 200})
prompts = PromptSet(section, tokenizer, ready.sequences.unseen)
dense = [
    dense_reference.answer(model, tokenizer, prompts.make(number), [winner.start - 1], store, key)
    for number in tqdm(range(section.num_prompts), desc="dense")
]
firsts = [winner.start, *(stage.end + 1 for stage in winner.stages[:-1])]


def probed(prompt: dense_reference.DenseReference) -> list[torch.Tensor]:
    """What the probe gives the candidates in the layer that decides each stage's tokens (its first one, or the last
    before it that ranked any), largest first, as shares of the whole."""
    seen: dict[int, torch.Tensor] = {}

    def note(number: int, layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        plan, carried = kwargs.get("plan"), kwargs.get("carried")
        if plan is not None and plan.ranks and plan.heads:
            scores = output[-1][0]  # the layer's own, and what is carried
            seen[number] = scores if carried is None else scores - winner.probe.score_carry * carried[0]

    hooks = [
        layer.register_forward_hook(partial(note, number), with_kwargs=True)
        for number, layer in enumerate(whole.model.layers)
    ]
    try:
        compare(whole, winner, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    deciding = [max((layer for layer in seen if layer <= first), default=min(seen)) for first in firsts]
    ranked = [seen[layer].sort(descending=True).values for layer in deciding]
    return [scores.cumsum(0) / scores.sum() for scores in ranked]


def with_counts(counts: list[int]) -> Schedule:
    """The winner with these budgets; what a stage leaves and its feed-forward budget keep their ratio to them."""
    stages = []
    for i, stage in enumerate(winner.stages):
        now = stage.budget.fraction
        following = None
        if stage.prune_to is not None:
            ratio = stage.prune_to.fraction / winner.stages[i + 1].budget.fraction
            following = Amount(floor=max(1, round(counts[i + 1] * ratio)))
        ffn = None if stage.ffn_budget is None else Amount(floor=round(counts[i] * stage.ffn_budget.fraction / now))
        stages.append(replace(stage, budget=Amount(floor=counts[i]), prune_to=following, ffn_budget=ffn))
    return replace(winner, stages=tuple(stages))


sizes = [prompt.states_before(winner.start)[1].shape[1] - len(prompt.answer) + 1 for prompt in dense]
masses = [probed(prompt) for prompt in tqdm(dense, desc="attention mass")]
fractions = [[round(stage.budget.fraction * n) for stage in winner.stages] for n in sizes]
means = [sum(column) / len(column) for column in zip(*fractions, strict=True)]
by_mass: list[list[int]] = [[] for _ in dense]
for stage, mean in enumerate(means):
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        counts = [int((mass[stage] < share).sum()) + 1 for mass in masses]
        low, high = (share, high) if sum(counts) / len(counts) < mean else (low, share)
    for found, mass in zip(by_mass, masses, strict=True):
        found.append(min(int((mass[stage] < low).sum()) + 1, len(mass[stage])))
ways = {
    "count": [[min(round(mean), n) for mean in means] for n in sizes],
    "fraction": fractions,
    "attention mass": by_mass,
}
rows, lines = {}, []
with tqdm(total=len(ways) * len(dense), desc="evaluating") as bar:
    evaluator = Evaluator(whole, Answers(store.path("budgets", key, ".jsonl")), key, bar, kinds)
    for way, counts in ways.items():
        schedules = [with_counts(given) for given in counts]
        found = [evaluator.rows([schedule], [prompt])[0][0] for schedule, prompt in zip(schedules, dense, strict=True)]
        speedups = [predicted(base.config, s, n)["speedup"] for s, n in zip(schedules, sizes, strict=True)]
        active = [sum(given) / n for given, n in zip(counts, sizes, strict=True)]
        rows[way] = {
            "counted": sum(n * s for n, s in zip(sizes, speedups, strict=True)) / sum(sizes),
            "spread of budgets": [min(active), max(active)],
            "loss": loss(found),
            "kl": [r["kl"] for r in found],
            "kinds": by_kind(found),
            "lengths": {
                n: {
                    "loss": loss([r for r in found if r["length"] == n]),
                    "speedup": sum(s for s, r in zip(speedups, found, strict=True) if r["length"] == n)
                    / sum(r["length"] == n for r in found),
                }
                for n in lengths
            },
        }
for way, row in rows.items():
    row["over fraction"] = interval(rows["fraction"]["kl"], row["kl"])
    ends = "" if row["over fraction"] is None else " ({:.2f}-{:.2f})".format(*row["over fraction"])
    ratio = sum(row["kl"]) / sum(rows["fraction"]["kl"])
    by_length = (f"{row['lengths'][n]['loss']:.3f} at {row['lengths'][n]['speedup']:.2f}x" for n in lengths)
    by_kind = (f"{kind['kl']:.3f}" for kind in row["kinds"].values())
    lines.append([way, f"{row['loss']:.3f}", f"{ratio:.2f}{ends}", *by_length, *by_kind])
command = f"python recipes/studies/budgets.py RECIPE WORK SEARCH OUT --lengths {args.lengths} --prompts {args.prompts}"
result = {
    "command": command,
    "hardware": hardware("cpu"),
    "prompts": len(dense),
    "schedule": winner.to_dict(),
    "rows": rows,
}
args.out.write_text(json.dumps(result, indent=1) + "\n")
over = "KL over that of fraction (95% interval)"
heads = ["budgets", "loss, nats", over, *(f"{n} tokens" for n in lengths), *rows["fraction"]["kinds"]]
shown = table(heads, lines)
args.out.with_suffix(".md").write_text(f"`{command}`\n\n{shown}\n")
print(shown)
