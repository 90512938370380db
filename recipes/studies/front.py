"""The front that a search found, on LongBench prompts that nothing was chosen on: free answers as the dense model's.

    python recipes/studies/front.py RECIPE.yaml WORK_FOLDER LONGBENCH OUT.json SEARCH.json ... [--lengths 4096,8192]

RECIPE has the `search` section that every SEARCH.json came from, WORK_FOLDER is that run's (its proxies are reused).
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from spts_compress import pipeline
from spts_compress.evaluate.suites import EvalConfig, free_examples
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import load
from spts_compress.search import dense_reference
from spts_compress.search.evaluator import Evaluator, quality
from spts_compress.tasks.runner import Answers
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.store import Store, fingerprint
from spts_compress.utils.tables import table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument("work", type=Path)
parser.add_argument("longbench")
parser.add_argument("out", type=new_result)
parser.add_argument("searches", nargs="+", type=Path)
parser.add_argument("--lengths", default="4096,8192")
parser.add_argument("--items", type=int, default=2, help="a task and length")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

recipe, store, held = load(args.recipe), Store(args.work), ExitStack()
held.enter_context(store.lock())  # to the end of the process
ready = pipeline.prepare(recipe, store, args.device)
key = fingerprint(ready.key(args.device), "front")
lengths = tuple(dict.fromkeys(map(int, args.lengths.split(","))))
config = EvalConfig(lengths=lengths, items=args.items, longbench=args.longbench)
items = [item for item in free_examples(config, ready.tokenizer, ready.sequences.unseen) if item.task != "free_answer"]
points = [point for path in args.searches for point in json.loads(path.read_text())["points"]]
winners = [Schedule.from_dict(p["winner"]["schedule"], ready.base.config.num_hidden_layers) for p in points]
firsts = sorted({winner.start - 1 for winner in winners})
dense = [
    dense_reference.answer(ready.model, ready.tokenizer, item, firsts, store, key)
    for item in tqdm(items, desc="dense answers")
]
rows, lines = [], []
with tqdm(total=len(dense) * len(winners), desc="evaluating") as bar:
    evaluator = Evaluator(ready.skipping(), Answers(store.path("front", key, ".jsonl")), key, bar, ["LongBench"])
    for point, winner in zip(points, winners, strict=True):
        [rows_found] = evaluator.rows([winner], dense)
        by_length = {n: quality([row for row in rows_found if row["length"] == n]) for n in lengths}
        # a document that fits into several lengths is one prompt
        found = list({each.key: row for each, row in zip(dense, rows_found, strict=True)}.values())
        kl = sum(row["kl"] for row in found) / len(found)
        same = sum(row["same"] for row in found) / len(found)
        cost, tuned = point["cost"], point["quality"]
        rows.append({"cost": cost, "schedule": winner.to_dict(), "searched": tuned, "kl": kl, "same": same,
                     "top1": quality(found), "lengths": by_length, "prompts": len(found)})  # fmt: skip
        ends = {n: " ({:.3f}-{:.3f})".format(*interval) if interval else "" for n, (_, interval) in by_length.items()}
        shown = (f"{by_length[n][0]:.1%}{ends[n]}" for n in lengths)
        lines.append([f"{cost['speedup']:.2f}x", f"{cost['kv_share']:.0%}", str(winner.start), f"{tuned:.1%}", *shown,
                      f"{kl:.3f}", f"{same:.0%}"])  # fmt: skip
command = f"python recipes/studies/front.py RECIPE WORK $LONGBENCH OUT SEARCH ... --lengths {args.lengths} " + (
    f"--items {args.items} --device {args.device}"
)
result = {"command": command, "hardware": hardware(args.device), "rows": rows}
args.out.write_text(json.dumps(result, indent=1) + "\n")
heads = ["speed-up", "KV kept", "start", "next token as dense: search's own prompts",
         *(f"LongBench, {n} tokens" for n in lengths), "KL, nats", "same answer"]  # fmt: skip
shown = table(heads, lines)
args.out.with_suffix(".md").write_text(f"`{command}`\n\n{shown}\n")
print(shown)
