"""A searched schedule against random ones and the paper's scaled settings, all of equal counted cost, on prompts that
nothing was chosen on.

    python recipes/studies/random_schedules.py RECIPE.yaml WORK_FOLDER SEARCH.json OUT.json [--count 50] [--device cpu]

RECIPE has the `search` section that SEARCH.json came from, and WORK_FOLDER is that run's (its proxies are reused).
"""

import argparse
import json
import random
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from spts_compress import pipeline
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ChoicesSection, ScheduleParams, load
from spts_compress.search import dense_reference, space
from spts_compress.search.evaluator import Evaluator, by_kind, loss, quality
from spts_compress.search.prompts import PromptSet
from spts_compress.search.run import starts_of
from spts_compress.tasks.runner import Answers
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.store import Store, fingerprint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument("work", type=Path)
parser.add_argument("search", type=Path)
parser.add_argument("out", type=new_result)
parser.add_argument("--count", type=int, default=50)
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

recipe, store, held = load(args.recipe), Store(args.work), ExitStack()
held.enter_context(store.lock())  # to the end of the process
section, point = recipe.search, json.loads(args.search.read_text())["points"][-1]
ready = pipeline.prepare(recipe, store, args.device)
base, tokenizer, model, whole = ready.base, ready.tokenizer, ready.model, ready.skipping()
layers, starts, wide = base.config.num_hidden_layers, starts_of(recipe.search, base.config), ready.schedule
sizes = {layer: wide.proxy_of(layer) for layer in range(wide.start, layers)}
costs = space.Costs(base.config, max(section.lengths), sizes)

key = fingerprint(ready.key(args.device), "random schedules")
# neither the search's prompts nor those that confirmed it
others = section.model_copy(update={"seed": section.seed + 100, "prompts": args.prompts})
prompts = PromptSet(others, tokenizer, ready.sequences.unseen)
dense = [
    dense_reference.answer(model, tokenizer, prompts.make(number), [s - 1 for s in starts], store, key)
    for number in tqdm(range(others.num_prompts), desc="dense")
]
cost = point["winner"]["cost"]
goal = cost.get("flop_speedup", cost["speedup"])  # counted, whatever the search went by
rng, drawn = random.Random(2024), {}
drawn_from = {"choices": ChoicesSection(heads=["mean", "max"]), "starts": starts}
choices = section.model_copy(update=drawn_from).drawn_from(layers)
while len(drawn) < args.count:
    params = space.draw(rng, choices)
    if (schedule := costs.scale_to_cost(params, ("speedup", goal))) is not None:
        drawn[f"random {len(drawn) + 1}"] = params, schedule
params = ScheduleParams(max(1, layers // 3, starts[0]), **space.PAPER)
if (schedule := costs.scale_to_cost(params, ("speedup", goal))) is not None:
    drawn["the paper's settings, scaled"] = params, schedule
winner = Schedule.from_dict(point["winner"]["schedule"], layers)
rows = []
with tqdm(total=(len(drawn) + 1) * len(dense), desc="evaluating") as bar:
    evaluator = Evaluator(whole, Answers(store.path("random", key, ".jsonl")), key, bar, section.kinds)
    for name, schedule in [("searched", winner), *((name, schedule) for name, (_, schedule) in drawn.items())]:
        [found] = evaluator.rows([schedule], dense)
        value, interval = quality(found)
        params = asdict(drawn[name][0]) if name in drawn else point["winner"]["params"]
        mean = sum(row["kl"] for row in found) / len(found)
        rows.append(
            {
                "name": name, "params": params, "cost": costs.of(schedule), "kl": mean, "loss": loss(found),
                "top1": value, "interval": interval, "kinds": by_kind(found),
            }
        )  # fmt: skip
rows[1:] = sorted(rows[1:], key=lambda row: row["kl"])
result = {"hardware": hardware(args.device), "prompts": len(dense), "lengths": section.lengths, "rows": rows}
args.out.write_text(json.dumps(result, indent=1) + "\n")
for row in [*rows[:4], *(r for r in rows[4:] if r["name"].startswith("the paper"))]:
    print(f"{row['name']:30} KL {row['kl']:.3f}  agreement {row['top1']:.3f}  counted {row['cost']['speedup']:.2f}x")
