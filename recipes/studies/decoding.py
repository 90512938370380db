"""Does skipping pay where decoding is compiled? Dense and SPTS, each with a dynamic cache and a static, compiled one.

    python recipes/studies/decoding.py OUT.json [--models ...] [--lengths 8192,32768] [--new-tokens 16,128] [--tiny]

Exact model shapes with random bfloat16 weights, as in gpu.py; all four ways in turn, after a call of each, which
compiles. `--tiny` runs tiny shapes, on a CPU too, to see that it works.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

import gpu  # noqa: E402

from spts_compress.timing import pairs  # noqa: E402
from spts_compress.utils.devices import hardware  # noqa: E402
from spts_compress.utils.paths import new_result  # noqa: E402
from spts_compress.utils.tables import table  # noqa: E402


def ways(model: Any, stock: Any, backend: str) -> dict[str, pairs.Way]:
    """The four ways; "static" ones compile decoding."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True  # else not on a CPU
    static = {"cache_implementation": "static", "compile_config": config}
    models = {"dense": stock, "SPTS": model}
    return {f"{who}{how}": (models[who], options) for how, options in (("", {}), (" static", static)) for who in models}


@torch.no_grad()
def measure(run: dict[str, pairs.Way], ids: torch.Tensor, new_tokens: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Of every way: seconds of the first call and of all rounds to each of `new_tokens`, graphs that it compiled, and
    which share of the new tokens is that of the dynamic cache, where the rounding of bfloat16 may differ."""
    torch.compiler.reset()  # each length has graphs of its own shapes, for dense and SPTS alike
    calls = {name: partial(pairs.seconds, model, ids, new_tokens, **options) for name, (model, options) in run.items()}
    found: dict[str, Any] = {}
    made: dict[str, torch.Tensor] = {}
    count = dict(max_new_tokens=new_tokens[-1], min_new_tokens=new_tokens[-1], pad_token_id=0)
    for name, (model, options) in run.items():
        counters.clear()
        begin = time.perf_counter()
        made[name] = model.generate(ids, **pairs.GREEDY, **count, **options).sequences[:, ids.shape[1] :]
        pairs.synchronize(ids.device)
        first = time.perf_counter() - begin
        same = (made[name] == made[name.removesuffix(" static")]).float().mean()
        graphs = {"made": counters["stats"]["unique_graphs"], "not_cuda": counters["inductor"]["cudagraph_skips"]}
        found[name] = {"first_call_s": first, "same_tokens": float(same), "graphs": graphs}
    times = pairs.in_turn(calls, rounds, lambda: None)
    return {name: {**found[name], "seconds": taken} for name, taken in times.items()}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def shown(rows: list[dict[str, Any]]) -> str:
    """A line for every way of every row."""
    wanted = list(rows[0]["ways"]["dense"]["seconds"])
    lines = []
    for row in rows:
        for way, found in row["ways"].items():
            taken, dense = found["seconds"], [row["ways"][name]["seconds"] for name in ("dense", "dense static")]
            each = [(b - a) / max(1, wanted[-1] - 1) * 1e3 for a, b in zip(taken[1], taken[wanted[-1]], strict=True)]
            best = {n: map(min, *(times[n] for times in dense)) for n in wanted}
            gains = (f"{median(a / b for a, b in zip(best[n], taken[n], strict=True)):.2f}x" for n in wanted)
            compiling = found["first_call_s"] - median(taken[wanted[-1]]) if "static" in way else 0.0
            ends = (spread(taken[n], 3) for n in wanted[1:])
            cells = spread(taken[1], 3), spread(each, 2), *ends, *gains
            lines.append([row["model"], row["tokens"], way, *cells, f"{compiling:.0f}", f"{found['same_tokens']:.0%}"])
    ends = [f"{n} tokens, s" for n in wanted[1:]]
    gains = [f"best dense / this, {n}" for n in wanted]
    return table(
        ["model", "prompt", "way", "TTFT, s", "a token, ms", *ends, *gains, "to compile, s", "same tokens"], lines
    )


def main() -> None:
    def numbers(text: str) -> list[int]:
        return sorted(map(int, text.split(",")))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=new_result)
    parser.add_argument("--models", nargs="*", default=["llama-3.1-8b", *gpu.SIZES], choices=list(gpu.SHAPES))
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768])
    parser.add_argument("--new-tokens", type=numbers, default=[16, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths, new_tokens = (",".join(map(str, n)) for n in (args.lengths, args.new_tokens))
    command = f"python recipes/studies/decoding.py OUT.json --models {' '.join(args.models)} --lengths {lengths}"
    command += f" --new-tokens {new_tokens} --rounds {args.rounds} --backend {args.backend}" + " --tiny" * args.tiny
    result: dict[str, Any] = {"command": command, "hardware": hardware(device), "rows": []}
    machine = ", ".join(f"{name} {value}" for name, value in result["hardware"].items() if value is not None)
    for name in args.models:
        model, stock = gpu.build(name, device, args.tiny)
        for length in args.lengths:
            ids = gpu.prompts(model, length)
            found = measure(ways(model, stock, args.backend), ids, tuple(sorted({1, *args.new_tokens})), args.rounds)
            result["rows"].append({"model": name, "tokens": length, "ways": found})
            print(shown(result["rows"][-1:]), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # what there is, if the machine goes
            args.out.with_suffix(".md").write_text(f"`{command}`\n\n{machine}.\n\n{shown(result['rows'])}\n")
        del model, stock
        if device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
