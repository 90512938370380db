"""A searched schedule against random ones and the paper's scaled settings, all of equal counted cost, on prompts that
nothing was chosen on.

    python recipes/studies/random_schedules.py RECIPE.yaml WORK_FOLDER SEARCH.json OUT.json [--count 50] [--device cpu]

RECIPE has the `search` section that SEARCH.json came from, and WORK_FOLDER is that run's (its proxies are reused).
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from spts_compress import pipeline
from spts_compress.cost import predicted
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import load
from spts_compress.search import dense_reference, halving, prompts, space
from spts_compress.search.run import Bench, quality, starts_of
from spts_compress.tasks.runner import Answers
from spts_compress.utils.devices import hardware
from spts_compress.utils.store import Store, fingerprint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument("work", type=Path)
parser.add_argument("search", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--count", type=int, default=50)
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

recipe, store = load(args.recipe), Store(args.work)
section, point = recipe.search, json.loads(args.search.read_text())["points"][-1]
ready = pipeline.prepare(recipe, store, args.device)
base, tokenizer, model, whole = ready.base, ready.tokenizer, ready.model, ready.skipping()
layers, starts, wide = base.config.num_hidden_layers, starts_of(recipe.search, base.config), ready.schedule
sizes = {layer: wide.proxy_of(layer) for layer in range(wide.start, layers)}
longest = max(section.lengths)

key = fingerprint(base.key, recipe.model.dtype, args.device, "random schedules")
prose, seed = ready.sequences.unseen, section.seed + 100  # neither the search's prompts nor those that confirmed it
items = [
    item
    for n in section.lengths
    for item in prompts.make(section.kinds, tokenizer, prose, n, args.prompts, section.answer_tokens, seed)
]
dense = [
    dense_reference.dense(model, tokenizer, item, [s - 1 for s in starts], store, key)
    for item in tqdm(items, desc="dense")
]
goal = point["winner"]["cost"]["speedup"]
rng, drawn = random.Random(2024), {}
while len(drawn) < args.count:
    shape = space.draw(rng, {"start": tuple(starts), **space.CHOICES, "heads": ("mean", "max")})
    made = space.at_cost(shape, lambda s: predicted(base.config, s, longest)["speedup"], goal, layers, sizes)
    if made is not None:
        drawn[f"random {len(drawn) + 1}"] = shape, made
third = max(1, layers // 3)
scaled = space.ScheduleParams(max(third, starts[0]), **space.PAPER)
made = space.at_cost(scaled, lambda s: predicted(base.config, s, longest)["speedup"], goal, layers, sizes)
if made is not None:
    drawn["the paper's settings, scaled"] = scaled, made
winner = Schedule.from_dict(point["winner"]["schedule"], layers)
rows = []
with tqdm(total=(len(drawn) + 1) * len(dense), desc="evaluating") as bar:
    bench = Bench(whole, Answers(store.path("random", key, ".jsonl")), key, bar, section.kinds)
    for name, schedule in [("searched", winner), *((name, made) for name, (_, made) in drawn.items())]:
        found = bench.rows(schedule, dense)
        value, interval = quality(found)
        shape = asdict(drawn[name][0]) if name in drawn else point["winner"]["shape"]
        mean = sum(row["kl"] for row in found) / len(found)
        counted = predicted(base.config, schedule, longest)
        rows.append(
            {
                "name": name, "shape": shape, "cost": counted, "kl": mean, "loss": halving.loss(found),
                "top1": value, "interval": interval, "kinds": halving.by_kind(found),
            }
        )  # fmt: skip
rows[1:] = sorted(rows[1:], key=lambda row: row["kl"])
result = {"hardware": hardware(args.device), "prompts": len(dense), "lengths": section.lengths, "rows": rows}
args.out.write_text(json.dumps(result, indent=1) + "\n")
for row in [*rows[:4], *(r for r in rows[4:] if r["name"].startswith("the paper"))]:
    print(f"{row['name']:30} KL {row['kl']:.3f}  agreement {row['top1']:.3f}  counted {row['cost']['speedup']:.2f}x")
