"""SPTS beside what a user could pick instead, on the same prompts, weights and machine: TTFT, KV cache, quality.

    python recipes/studies/peers.py CHECKPOINT ... OUT.json --longbench FOLDER --targets 1.5,2,2.5,3

Every CHECKPOINT, of one base, is measured as shipped and, where that is not at a target, a counted speed-up, with its
budgets scaled. Each method of `peer_methods` is set to the targets by its own knob, as far as that reaches; what is
then left to choose, as the layer of GemFilter and FastKV, is chosen on other prompts by next tokens as dense. All read
the whole prompt with its question. After its prefill a method reads the dense model's greedy answer (KL, next tokens
as dense), and from where it would not have said the same it writes on by itself (scores).

What is done is kept in the folder --work, so that a stopped run goes on. `torchrun --nproc-per-node N` spreads the
prompts over N processes, which share the GPUs; the first one takes the times, alone. `--times RESULT.json` takes them
on another machine than the one that the qualities of RESULT.json come from. For an hour on one GPU, 32 prompts
a task (of LongBench's own files, whose items 0 to 7 are those to choose on):

    torchrun --nproc-per-node 8 recipes/studies/peers.py CHECKPOINT ... OUT.json --longbench FOLDER --draft SMALL \\
        --length 8192 --targets 1.5,2,2.5,3 --needles 32 --items 8-39 --choose-on 34 --rounds 12 --device cuda

`--draft` is a small model, of any tokenizer, for speculative prefill. SnapKV is kvpress's own, at the share of the KV
cache that the first checkpoint keeps: `pip install --no-deps kvpress fire termcolor "cachetools<6"` (0.5 asks for an
older transformers).
"""

import argparse
import importlib.util
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

import peer_methods as peer  # noqa: E402

from spts_compress.calibrate import data  # noqa: E402
from spts_compress.cost import predicted  # noqa: E402
from spts_compress.evaluate.suites import computed_how, load  # noqa: E402
from spts_compress.tasks import ruler  # noqa: E402
from spts_compress.tasks.agreement import agreement  # noqa: E402
from spts_compress.tasks.example import Example  # noqa: E402
from spts_compress.tasks.longbench import LongBench  # noqa: E402
from spts_compress.tasks.recovery import interval, score_rows  # noqa: E402
from spts_compress.tasks.runner import Answers, encode, stops  # noqa: E402
from spts_compress.timing.pairs import kv_bytes, stock_twin, synchronize  # noqa: E402
from spts_compress.utils.devices import choose, hardware  # noqa: E402
from spts_compress.utils.distributed import ranks  # noqa: E402
from spts_compress.utils.paths import new_result  # noqa: E402
from spts_compress.utils.store import Store, file_hash, fingerprint  # noqa: E402
from spts_compress.utils.tables import table  # noqa: E402


@dataclass(frozen=True)
class Prompt:
    """`ids`: (1, n)."""

    example: Example
    ids: torch.Tensor


@dataclass(frozen=True)
class Way:
    """A method with its setting: plain data, all that its answers depend on beside the weights. `prefill` is given a
    prompt, see `peer_methods`; `extend` goes on from there."""

    name: str
    setting: dict[str, Any]
    prefill: Callable[[Prompt], peer.Prefilled]
    extend: Callable[[Any, torch.Tensor, int], torch.Tensor]

    @property
    def label(self) -> str:
        shown = {k: f"{v:.1%}" if isinstance(v, float) else v for k, v in self.setting.items() if k != "spts"}
        return ", ".join([self.name, *(f"{name} {value}" for name, value in shown.items())])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", type=Path)
parser.add_argument("out", type=new_result)
parser.add_argument("--longbench", help="LongBench's folder; needles alone without it")
parser.add_argument("--draft", type=Path, help="folder of a small model, for speculative prefill")
parser.add_argument("--work", type=Path, help="where what is done is kept; OUT without .json by default")
parser.add_argument(
    "--targets", default="2", help="counted speed-ups at --length; '' for none but the checkpoints' own"
)
parser.add_argument("--length", type=int, default=4096, help="of prompts in tokens, answers included")
parser.add_argument("--tasks", default=",".join([*ruler.NEEDLES, "vt"]), help="of RULER")
parser.add_argument("--needles", type=int, default=4, help="prompts of each of these tasks")
parser.add_argument("--items", default="8-15", help="of each LongBench task, from the first to the last")
parser.add_argument("--answer-tokens", type=int, help="of LongBench's answers; as many as a task says by default")
parser.add_argument("--needle-tokens", type=int, help="of RULER's answers; as many as a task says by default")
parser.add_argument("--choose-on", type=int, default=16, help="prompts, half of them LongBench's")
parser.add_argument("--layer-step", type=int, default=2, help="one in so many layers is tried")
parser.add_argument("--rounds", type=int, default=3, help="of timing, each on another prompt")
parser.add_argument("--no-scores", action="store_true", help="LongBench's answers are not written, only compared")
parser.add_argument("--ours", action="store_true", help="dense and the checkpoints alone")
parser.add_argument("--times", type=Path, help="a result made elsewhere, which gets times that are taken here")
parser.add_argument("--rescore", action="store_true", help="run nothing: the prompts that all methods have answered")
parser.add_argument("--haystack", help="text to hide needles in; Python's documentation by default")
parser.add_argument("--device", default="auto")
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()
stack = ExitStack()
group = stack.enter_context(ranks())
device, length = choose(args.device), args.length
checkpoints = {}
for folder in args.checkpoints:
    model, tokenizer, keys = load(folder, device, args.dtype)
    checkpoints[folder.name] = model, keys
bases = {keys["dense"] for _, keys in checkpoints.values()}
if (len(bases) > 1 and not args.times) or len(checkpoints) < len(args.checkpoints):  # times need no equal weights
    parser.error("the checkpoints must be of one base, in folders of different names")
dense = stock_twin(next(iter(checkpoints.values()))[0])
config, count, left_out = dense.config, dense.config.num_hidden_layers, list[str]()
made = [*bases, computed_how(dense), file_hash(Path(peer.__file__))]
work = Store(args.work or args.out.with_suffix(""))


def contents(folder: str | Path | None) -> list[str]:
    """Of the files in a folder, by their names."""
    return [file_hash(path) for path in sorted(Path(folder).iterdir()) if path.is_file()] if folder else []


drafted_by = contents(args.draft)
done = Answers(work.root / "rows.jsonl", group.rank)
ends = stops(dense)


def examples(prose: str) -> list[list[dict[str, Any]]]:
    """Those to choose on, needles and LongBench's in turn, and those to measure on, as plain data. All processes make
    them together."""
    tasks, half = args.tasks.split(","), args.choose_on // 2 if args.longbench else args.choose_on

    def needles(each: int, seed: int) -> list[Example]:
        make = partial(ruler.examples, tokenizer=tokenizer, haystack=prose, length=length, count=each, seed=seed)
        by_task = group.all_gather([make(task, answer_tokens=args.needle_tokens) for task in group.shard(tasks)])
        return [example for several in zip(*by_task, strict=True) for example in several]

    chosen, measured = needles(-(-half // len(tasks)), 6)[:half], needles(args.needles, 7)
    if args.longbench:
        bench, (start, end) = LongBench(args.longbench), map(int, args.items.split("-"))
        cut = partial(bench.examples, tokenizer=tokenizer, length=length, answer_tokens=args.answer_tokens)
        items = [example for task in bench.tasks() for example in cut(task, count=end + 1)]
        items.sort(key=lambda example: example.index)  # in turn, too, so that a stopped run has some of all
        later = [example for example in items if example.index >= start]
        early = [example for example in items if example.index < min(8, start)]
        chosen = [example for pair in zip(chosen, early[:half], strict=False) for example in pair]
        measured = [example for pair in zip_longest(measured, later) for example in pair if example is not None]
    return [[asdict(example) for example in some] for some in (chosen, measured)]


def prompts() -> list[list[Prompt]]:
    """The same, made once."""
    prose = "\n\n".join(data.from_files(Path(args.haystack)) if args.haystack else data.python_docs())
    given = prose, args.tasks, args.needles, args.items, args.answer_tokens, args.needle_tokens
    key = fingerprint(made, given, contents(args.longbench), length, args.choose_on)
    new = None if group.broadcast(work.path("prompts", key, ".json").exists()) else examples(prose)
    found = work.json("prompts", key, lambda: new)
    if found is None:
        work.path("prompts", key, ".json").unlink(missing_ok=True)
        raise SystemExit("the prompts that were kept are damaged; start it again")
    ids = partial(encode, tokenizer, device=dense.device)
    return [[Prompt(e := Example(**row), ids([e.text])["input_ids"]) for row in rows] for rows in found]


def whole(tokens: int) -> float:
    """FLOPs of the dense prefill."""
    return peer.work(config, [tokens] * count)


def pressed(model: Any, ids: torch.Tensor, KV: float) -> peer.Prefilled:
    from kvpress import SnapKVPress

    return peer.pressed(model, ids, SnapKVPress(1 - KV))


METHODS = {"dense": peer.plain, "POP": peer.pop, "GemFilter": peer.gemfilter, "FastKV": peer.fastkv}
METHODS |= {"UniPrefill": peer.uniprefill, "SnapKV": pressed}


def stock(name: str, **setting: Any) -> Way:
    """A way on the stock model."""
    return Way(name, setting, lambda p: METHODS[name](dense, p.ids, **setting), partial(peer.extend, dense))


def skipping(name: str, factor: float = 1.0, **block: Any) -> Way:
    """A checkpoint as shipped, or with stages whose budgets are a factor larger."""
    model, keys = checkpoints[name]
    schedule, options = model.config.schedule(**block), {"spts": {"min_length": 0, **block}} if block else {}

    def prefill(prompt: Prompt) -> peer.Prefilled:
        out, tokens = model(prompt.ids, use_cache=True, logits_to_keep=1, **options), prompt.ids.shape[1]
        flops = whole(tokens) / predicted(model.config, schedule, tokens)["speedup"]
        return out.logits[0], out.past_key_values, tokens, flops

    def extend(cache: Any, ids: torch.Tensor, position: int) -> torch.Tensor:
        places = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
        return model(ids, past_key_values=cache, position_ids=places).logits[0]

    setting = {"budgets": f"x {factor:.2f}"} if block else {}
    return Way(f"SPTS, {name}", {**setting, "spts": [keys["spts"], block]}, prefill, extend)


def scaled(name: str, target: float) -> list[Way]:
    """A checkpoint with all budgets times what brings it to the target; none if it is near as shipped, or never."""
    model = checkpoints[name][0]
    stages = model.config.schedule().to_dict()["stages"]

    def block(factor: float) -> dict[str, list]:
        def times(name: str, amount: Any) -> Any:
            if isinstance(amount, dict):
                return {**amount, "fraction": min(1.0, max(0.01, amount["fraction"] * factor))}
            return amount if name == "end" else max(1, round(amount * factor))

        return {"stages": [{name: times(name, amount) for name, amount in stage.items()} for stage in stages]}

    def speedup(factor: float) -> float:
        return predicted(model.config, model.config.schedule(**block(factor)), length)["speedup"]

    factor = peer.solve(speedup, target, 0.0, 4.0)
    if abs(speedup(1.0) / target - 1) < 0.08 or not factor:
        return []
    return [skipping(name, factor, **block(factor))]


def to(target: float, flops: Callable, **setting: Any) -> float:
    """The share of tokens at which a method comes to the target, 0 if it does not."""
    share = peer.solve(lambda tokens: whole(length) / flops(config, length, tokens=tokens, **setting), target)
    return round(share, 4) if share * length >= 64 else 0.0


def candidates(target: float) -> dict[str, list[Way]]:
    """Settings of every method that come to the target."""
    skipped = min(range(count), key=lambda k: abs(whole(length) / peer.pop_work(config, length, k, 1) - target))
    found = {f"SPTS, {name}": scaled(name, target) for name in checkpoints}
    if args.ours:
        return {name: ways for name, ways in found.items() if ways}
    found["POP"] = [stock("POP", skipped=skipped, last=last) for last in (1, 32)]
    for name, flops in (("GemFilter", peer.gemfilter_work), ("FastKV", peer.fastkv_work)):
        shares = {layer: to(target, flops, layer=layer) for layer in range(1, count, args.layer_step)}
        found[name] = [stock(name, layer=layer, tokens=share) for layer, share in shares.items() if share]
    found["UniPrefill"] = [stock("UniPrefill", mass=share) for share in [mass(target)] if share]
    if args.draft:
        found["draft model"] = [speculative(share) for share in [drafted(target)] if share]
    never = [name for name, ways in found.items() if not ways and not name.startswith("SPTS")]
    left_out.extend(f"{name} at {target:g}x: no setting reaches it" for name in never)
    return {name: ways for name, ways in found.items() if ways}


@cache
def draft() -> tuple[Any, Any, float]:
    """The draft model, its tokenizer, and the FLOPs of its own reading."""
    model = AutoModelForCausalLM.from_pretrained(args.draft, dtype=dense.dtype).to(device).eval()
    flops = peer.work(model.config, [length] * model.config.num_hidden_layers)
    return model, AutoTokenizer.from_pretrained(args.draft), flops


def drafted(target: float) -> float:
    """The share of tokens at which speculative prefill comes to the target."""
    return to(target, lambda config, length, tokens: draft()[2] + peer.work(config, [tokens * length] * count))


def speculative(tokens: float) -> Way:
    """Speculative prefill; what the draft model's tokens are worth goes to the model's own by their characters."""
    model, theirs, _ = draft()

    def prefill(prompt: Prompt) -> peer.Prefilled:
        how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        read, onto = (each(prompt.example.text, **how) for each in (theirs, tokenizer))
        scores = peer.importance(model, torch.tensor([read["input_ids"]], device=device))
        scores = peer.carried(scores, read["offset_mapping"], onto["offset_mapping"])
        *found, flops = peer.drafted(dense, prompt.ids, scores, tokens)
        return *found, flops + peer.work(model.config, [len(read["input_ids"])] * model.config.num_hidden_layers)

    return Way("draft model", {"tokens": tokens}, prefill, partial(peer.extend, dense))


def remade(row: dict[str, Any]) -> Way:
    """A way of an earlier result."""
    name, setting = row["method"], dict(row["setting"])
    if name.startswith("SPTS, "):
        block = setting["spts"]
        return skipping(name.removeprefix("SPTS, "), float(setting["budgets"][2:]) if block else 1.0, **block)
    return speculative(**setting) if name == "draft model" else stock(name, **setting)


@torch.no_grad()
def mass(target: float) -> float:
    """UniPrefill's share of attention that comes to a counted speed-up, over two prompts, one of them with needles."""
    some = to_choose_on[:2]
    key = fingerprint(made, "mass", target, [p.example.text for p in some])

    def speedup(mass: float) -> float:
        return sum(whole(p.ids.shape[1]) for p in some) / sum(peer.uniprefill(dense, p.ids, mass)[3] for p in some)

    if group.is_main and key not in done.rows:
        done.add({"key": key, "mass": round(peer.solve(speedup, target, steps=6), 4)})
    return group.broadcast(done.rows.get(key))["mass"]


def is_scored(prompt: Prompt) -> bool:
    return prompt.example.task in ruler.TASKS or not args.no_scores


def key_of(way: Way, prompt: Prompt, scored: bool) -> str:
    by = [*made, *drafted_by] if way.name == "draft model" else made
    return fingerprint(by, way.name, way.setting, prompt.example.text, prompt.example.answer_tokens, scored)


def written(way: Way, logits: torch.Tensor, cache: Any, position: int, room: int) -> tuple[list[int], torch.Tensor]:
    """The greedy answer of at most `room` tokens, from the first one's logits (1, V) on, and all logits."""
    answer, seen = list[int](), list[torch.Tensor]()
    while True:
        seen.append(logits)
        answer.append(int(logits.argmax()))
        if len(answer) == room or answer[-1] in ends:
            return answer, torch.cat(seen)
        logits = way.extend(cache, torch.tensor([[answer[-1]]], device=device), position)
        position += 1


def answered(way: Way, prompt: Prompt, answer: list[int], expected: torch.Tensor, scored: bool) -> dict[str, Any]:
    """One way's answer to one prompt, beside the dense model's `answer`, whose logits are `expected` (a, V); only what
    both have in common if it is not to be scored."""
    logits, cache, position, flops = way.prefill(prompt)
    row = {"counted": whole(prompt.ids.shape[1]) / flops, "kv": kv_bytes(cache)}
    if len(answer) > 1:
        logits = torch.cat([logits, way.extend(cache, torch.tensor([answer[:-1]], device=device), position)])
    row |= agreement(*(torch.log_softmax(part.float(), dim=-1) for part in (expected, logits)))
    same = int((logits.argmax(-1).cpu() == torch.tensor(answer)).long().cumprod(0).sum())
    if not scored:
        answer = answer[:same]
    elif same < len(answer):
        if surplus := len(answer) - 1 - same:
            cache.crop(-surplus)
        room = prompt.example.answer_tokens - same
        answer = answer[:same] + written(way, logits[same : same + 1], cache, position + same, room)[0]
    return {**row, "answer": tokenizer.decode(answer, skip_special_tokens=True)}


@torch.no_grad()
def measured(ways: Sequence[Way], prompts: Sequence[Prompt], what: str, scored: bool = True) -> dict[str, list[dict]]:
    """For each way, a row for each prompt; its score is None where none is wanted."""
    keys = {(way.label, id(p)): key_of(way, p, scored and is_scored(p)) for way in ways for p in prompts}
    shard = [(p, [w for w in ways if keys[w.label, id(p)] not in done.rows]) for p in group.shard(prompts)]
    new = list[dict]()
    with tqdm(total=sum(len(missing) for _, missing in shard), desc=what) as bar:
        for prompt, missing in shard:
            if missing:
                logits, cache, position, _ = baseline.prefill(prompt)
                itself = {"counted": 1.0, "kv": kv_bytes(cache), "kl": 0.0, "top1": 1.0}
                answer, expected = written(baseline, logits, cache, position, prompt.example.answer_tokens)
                itself["answer"] = tokenizer.decode(answer, skip_special_tokens=True)
            for way in missing:
                writes = scored and is_scored(prompt)
                row = itself if way is baseline else answered(way, prompt, answer, expected, writes)
                new.append({"key": keys[way.label, id(prompt)], **prompt.example.to_row(), **row})
                done.add(new[-1])
                bar.update()
    done.rows.update({row["key"]: row for row in group.all_gather(new)})

    def judged(way: Way, prompt: Prompt) -> dict[str, Any]:
        row = done.rows[keys[way.label, id(prompt)]]  # a score that nobody reads could need a package that is missing
        return score_rows([row])[0] if scored and is_scored(prompt) else {**row, "score": None}

    return {way.label: [judged(way, prompt) for prompt in prompts] for way in ways}


@torch.no_grad()
def timed(ways: Sequence[Way], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
    """Seconds to the first token, all ways in turn in every round, each on another prompt; a round to warm up."""
    rounds, warm = list[dict[str, float]](), False
    for prompt in tqdm(prompts[:: max(1, len(prompts) // args.rounds)][: args.rounds], desc="timing"):
        key = fingerprint([key_of(way, prompt, False) for way in ways], hardware(device), "seconds")
        if args.rescore and key not in done.rows:
            continue
        while key not in done.rows:
            seconds = {}
            for way in ways:
                synchronize(prompt.ids.device)
                begin = time.perf_counter()
                way.prefill(prompt)[0].argmax()
                synchronize(prompt.ids.device)
                seconds[way.label] = time.perf_counter() - begin
            if warm:
                done.add({"key": key, "seconds": seconds})
            warm = True
        rounds.append(done.rows[key]["seconds"])
    return {way.label: [seconds[way.label] for seconds in rounds] for way in ways}


def figures(rows: list[dict], of_dense: list[dict]) -> dict[str, Any]:
    """Of some prompts: the share of dense's score, next tokens as dense, KL; mean, interval, median and worst task."""
    tasks, scored = {}, rows[0]["score"] is not None
    for task in dict.fromkeys(row["task"] for row in rows):
        own, base = ([row for row in some if row["task"] == task] for some in (rows, of_dense))
        tasks[task] = {name: fmean(row[name] for row in own) for name in ("top1", "kl")}
        if scored:
            tasks[task] |= {name: fmean(r["score"] for r in some) for name, some in (("score", own), ("dense", base))}
    kept = {task: found["score"] / found["dense"] for task, found in tasks.items() if scored and found["dense"]}
    scores, all_dense = ([row["score"] for row in some] for some in (rows, of_dense))
    found = {"prompts": len(rows), "tasks": tasks, "score": None}
    if kept:
        found["score"] = {"mean": sum(scores) / sum(all_dense), "interval": interval(all_dense, scores)}
        found["score"] |= {"median": median(kept.values()), "worst": min(kept.items(), key=lambda item: item[1])}
    for name, worst in (("top1", min), ("kl", max)):
        values, of_task = [row[name] for row in rows], [(task, figure[name]) for task, figure in tasks.items()]
        found[name] = {"mean": fmean(values), "interval": interval([1.0] * len(rows), values)}
        found[name] |= {"median": median(values), "worst": worst(of_task, key=lambda item: item[1])}
    return found


baseline = stock("dense")
to_choose_on, to_measure_on = prompts()
done.check = lambda: [keys.unchanged() for _, keys in checkpoints.values()] and None


def chosen() -> tuple[list[Way], list[dict]]:
    """Every method at every target, and what was tried for it on other prompts."""
    ways, choices = [baseline, *(skipping(name) for name in checkpoints)], []
    for target in map(float, filter(None, args.targets.split(","))):
        found = candidates(target)
        several = [way for some in found.values() if len(some) > 1 for way in some]
        tried = measured(several, to_choose_on, f"choosing at {target:g}x", scored=False)
        for name, some in found.items():
            fits = {way.label: fmean(row["top1"] for row in tried[way.label]) for way in some if len(some) > 1}
            choices += [{"target": target, "method": name, "next tokens as dense": fits}] if fits else []
            ways.append(max(some, key=lambda way: fits.get(way.label, 0)))
    if not args.ours and importlib.util.find_spec("kvpress"):
        model = next(iter(checkpoints.values()))[0]
        ways.append(stock("SnapKV", KV=round(predicted(model.config, model.config.schedule(), length)["kv_share"], 4)))
    elif not args.ours:
        left_out.append("SnapKV: kvpress is not installed")
    return list({way.label: way for way in ways}.values()), choices


def ratios(way: Way) -> dict[str, Any]:
    """Of the TTFT, dense over a way's: median, range, and the way's seconds."""
    found = sorted(a / b for a, b in zip(seconds["dense"], seconds[way.label], strict=True))
    return {"ratio": median(found), "range": [found[0], found[-1]], "seconds": seconds[way.label]}


def summary(way: Way) -> dict[str, Any]:
    """All figures of a way."""
    parts = {"needles": lambda row: row["task"] in ruler.TASKS, "longbench": lambda row: row["task"] not in ruler.TASKS}
    found = {name: [[r for r in rows[who] if fits(r)] for who in (way.label, "dense")] for name, fits in parts.items()}
    return {
        "way": way.label, "method": way.name, "counted": fmean(row["counted"] for row in rows[way.label]),
        "kv": sum(row["kv"] for row in rows[way.label]) / sum(row["kv"] for row in rows["dense"]),
        "ttft": ratios(way), **{name: figures(*some) if some[0] else None for name, some in found.items()},
        "setting": {key: value[1] if key == "spts" else value for key, value in way.setting.items()},
        "rows": [[row[name] for name in ("task", "index", "score", "top1", "kl", "answer")] for row in rows[way.label]],
    }  # fmt: skip


logging.disable(logging.WARNING)
earlier = json.loads(args.times.read_text()) if args.times else {}
ways, choices = ([remade(row) for row in earlier["ways"]], []) if earlier else chosen()
there = [p for p in to_measure_on if not args.rescore or all(key_of(way, p, is_scored(p)) in done.rows for way in ways)]
seconds = timed(ways, to_measure_on) if group.is_main else {}
group.barrier()
rows = {} if earlier else measured(ways, there, "measuring")
stack.close()
if not group.is_main:
    sys.exit()
given = [word for word in sys.argv[1:] if word not in (*map(str, args.checkpoints), str(args.out))]
names = {args.longbench: "$LONGBENCH", args.haystack: "$QASPER", str(args.draft): "$DRAFT"}
names |= {str(args.work): "WORK", str(args.times): "RESULT"}
words = ["python", "recipes/studies/peers.py", *checkpoints, "OUT", *(names.get(word, word) for word in given)]
made_by = {"command": shlex.join(words).replace("'", ""), "hardware": hardware(device)}
if earlier:
    results = [{**row, "ttft": ratios(way)} for row, way in zip(earlier["ways"], ways, strict=True)]
    result = {**earlier, "times": made_by, "ways": results}
else:
    results = [summary(way) for way in ways]
    result = {**made_by, "length": length, "left_out": left_out, "choices": choices, "ways": results}
args.out.write_text(json.dumps(result, indent=1) + "\n")


def shown(part: dict | None, name: str, form: str) -> list[str]:
    """Mean with its interval, median, and worst task."""
    if part is None or part[name] is None:
        return ["", "", ""]
    figure, (task, value) = part[name], part[name]["worst"]
    ends = " ({}-{})".format(*(format(end, form) for end in figure["interval"])) if figure["interval"] else ""
    return [f"{figure['mean']:{form}}{ends}", f"{figure['median']:{form}}", f"{value:{form}}, {task}"]


def columns(what: str, **parts: tuple[str, str]) -> str:
    """A table with, of some figures of a part, what `shown` gives; for each its name and form."""
    heads = [head for name in parts for head in (f"{name} (95%)", "median", "worst task")]
    cells = ([cell for part in parts.values() for cell in shown(way[what], *part)] for way in results)
    return table(["", *heads], [[way["way"], *row] for way, row in zip(results, cells, strict=True)])


costs = []
for way in results:
    ratio, ends = way["ttft"]["ratio"], way["ttft"]["range"]
    speed = f"{ratio:.2f}x ({ends[0]:.2f}-{ends[1]:.2f})"
    costs.append([way["way"], f"{way['counted']:.2f}x", speed, f"{way['kv']:.0%}"])
tasks = list(results[0]["needles"]["tasks"])
scores = [[way["way"], *(f"{100 * way['needles']['tasks'][task]['score']:.0f}" for task in tasks)] for way in results]
tried = [
    [choice["method"], f"{choice['target']:g}x", label.split(", ", 1)[1], f"{figure:.1%}"]
    for choice in result["choices"]
    for label, figure in choice["next tokens as dense"].items()
]
commands = [f"`{part['command']}`" for part in (result, result.get("times")) if part]
text = [
    "; times: ".join(commands), table(["", "counted", "TTFT, dense / this (range)", "KV"], costs),
    f"Needles, share of dense's score: {results[0]['needles']['prompts']} prompts of {result['length']} tokens",
    columns("needles", score=("score", ".0%")), "Scores by task", table(["", *tasks], scores),
]  # fmt: skip
if results[0]["longbench"]:
    parts = {"next tokens": ("top1", ".1%"), "KL": ("kl", ".2f"), "score": ("score", ".0%")}
    what = "next tokens as dense along dense's own answer, KL in nats, share of dense's score"
    text += [f"LongBench, {results[0]['longbench']['prompts']} prompts: {what}", columns("longbench", **parts)]
text += ["Tried on other prompts: next tokens as dense", table(["", "target", "setting", ""], tried)]
text += result["left_out"]
args.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
print("\n\n".join(text))
