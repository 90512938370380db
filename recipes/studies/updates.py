"""Free answers with updates of skipped tokens, without, and by another checkpoint's schedule, on LongBench prompts.

    python recipes/studies/updates.py CHECKPOINT OTHER LONGBENCH OUT.json [--lengths 4096,8192] [--shard 0/8]

CHECKPOINT has updates; OTHER is of the same base. Every way is compared with the dense model along its own greedy
answer, teacher-forced after the way's prefill. Shards write a file each; given those for LONGBENCH, OUT has all.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from spts_compress.evaluate.suites import load
from spts_compress.tasks.agreement import agreement, free_answer, log_probabilities
from spts_compress.tasks.longbench import LongBench
from spts_compress.tasks.recovery import interval
from spts_compress.tasks.runner import encode
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import table

ANSWER = 48  # tokens

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("checkpoint", "other"):
    parser.add_argument(name, type=Path)
parser.add_argument("longbench", nargs="+", help="LongBench's folder, or files that shards wrote")
parser.add_argument("out", type=new_result)
parser.add_argument("--lengths", default="4096,8192")
parser.add_argument("--items", default="8-15", help="of each task, from the first to the last")
parser.add_argument("--shard", default="0/1", help="this one of so many")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()


def of_shard(path: Path) -> list[dict]:
    """The rows that a shard wrote."""
    try:
        rows = json.loads(path.read_text())
        whole = isinstance(rows, list) and all({"task", "length", "ways"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        parser.error(f"{path}: no file that a shard of this study wrote; give those alone, or LongBench's folder alone")
    return rows


def between(ends: tuple[float, float] | None, digits: int) -> str:
    """An interval, if there is one."""
    return "" if ends is None else f" ({ends[0]:.{digits}f}-{ends[1]:.{digits}f})"


def measure() -> list[dict]:
    """A row for each prompt of this shard."""
    number, shards = map(int, args.shard.split("/"))
    first, last = map(int, args.items.split("-"))
    model, tokenizer, _ = load(args.checkpoint, args.device, "bfloat16")
    other, _, _ = load(args.other, args.device, "bfloat16")
    changes = {"updates": {}, "kv 0.5": {"kv": 0.5}, "kv 0.35": {"kv": 0.35}, "active only": {"kv": None}}
    changes["no updates"] = {"update": None, "kv": None}
    ways = {name: (model, {"spts": {"min_length": 0, **change}}) for name, change in changes.items()}
    ways["other"] = other, {"spts": {"min_length": 0}}
    bench, rows = LongBench(args.longbench[0]), []
    prompts = [
        example
        for length in dict.fromkeys(map(int, args.lengths.split(",")))
        for task in bench.tasks()
        for example in bench.examples(task, tokenizer, length, last + 1)
        if example.index >= first
    ]
    for example in tqdm(prompts[number::shards]):
        dense = model, {"spts": False}
        ids = encode(tokenizer, [example.text], model.device)["input_ids"]
        answer = free_answer(dense, tokenizer, replace(example, answer_tokens=ANSWER))
        ids = ids.new_tensor([[*ids[0].tolist(), *answer[:-1]]])
        expected = log_probabilities(dense, ids, len(answer))
        compared = {name: agreement(expected, log_probabilities(way, ids, len(answer))) for name, way in ways.items()}
        rows.append({"task": example.task, "index": example.index, "length": example.limit, "ways": compared})
    return rows


merging = len(args.longbench) > 1 or Path(args.longbench[0]).is_file()
rows = [row for path in args.longbench for row in of_shard(Path(path))] if merging else measure()
if merging and len({(row["task"], row["index"], row["length"]) for row in rows}) < len(rows):
    parser.error("these shards have a prompt in common, which would count twice; give each shard once")
args.out.write_text(json.dumps(rows, indent=1) + "\n")
lines = []
for length in sorted({row["length"] for row in rows}):
    part = [row for row in rows if row["length"] == length]
    for way in part[0]["ways"]:
        kl, top1 = ([row["ways"][way][what] for row in part] for what in ("kl", "top1"))
        tasks = {row["task"]: mean(r["ways"][way]["kl"] for r in part if r["task"] == row["task"]) for row in part}
        worst = max(tasks, key=lambda task: tasks[task])
        beside = interval([row["ways"]["other"]["kl"] for row in part], kl)
        spread = interval([1.0] * len(part), top1)
        lines.append([
            length, way, len(part), f"{mean(top1):.3f}{between(spread, 3)}", f"{mean(kl):.3f}",
            f"{median(kl):.3f}", f"{worst} {tasks[worst]:.2f}", between(beside, 2) or "-",
        ])  # fmt: skip
heads = ["tokens", "way", "prompts", "next token as dense", "KL", "median", "worst task", "KL over the other's"]
print(table(heads, lines))
