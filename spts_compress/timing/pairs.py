"""Time and memory: of the dense and the skipping model, same weights, one process, in turn; and of a run's stages."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

Times = dict[str, dict[int, list[float]]]  # seconds by name and number of new tokens
Way = tuple[Any, dict[str, Any]]  # of answering: a model, and options of its calls, such as `spts`
# What `generate` is told wherever something is measured: the likeliest token each time, until the model ends or the
# wanted number is there, whatever generation_config.json says of beams, other ways of decoding, and when to stop.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True, "max_time": None,
    "stop_strings": None, "token_healing": False, "constraints": None, "force_words_ids": None, "penalty_alpha": None,
    "dola_layers": None, "prompt_lookup_num_tokens": None, "use_mtp": None,
}  # fmt: skip


def stock_twin(model: Any) -> Any:
    """The stock model on the very same weight tensors as a skipping model: nothing is copied."""
    stock = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    twin = on_weights_of(model, stock, {})
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin


def on_weights_of(model: Any, kind: Any, added: dict[str, torch.Tensor], **settings: Any) -> Any:
    """A model of another `kind`, with the settings of `model` and those given, on its very tensors as far as `kind` has
    them, and the ones `added` by their name."""
    left = ("spts", "model_type", "architectures", "auto_map")
    config = kind.config_class(**{k: v for k, v in model.config.to_dict().items() if k not in left}, **settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        twin = kind(config)
    own = twin.state_dict().keys()
    shared = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    twin.load_state_dict({**shared, **added}, assign=True)
    for name in ("rotary_emb", "embed_tokens"):  # whose buffers are in no state dict
        setattr(twin.model, name, getattr(model.model, name))
    return twin.eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kv_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds."""
    return sum(t.numel() * t.element_size() for held in cache.layers for t in (held.keys, held.values))


class _Clock(StoppingCriteria):
    """Notes when `generate` has made each of the numbers of new tokens asked for; stops nothing."""

    def __init__(self, prompt: int, new_tokens: tuple[int, ...]):
        self.wanted, self.at = {prompt + n: n for n in new_tokens}, dict[int, float]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if (number := self.wanted.get(input_ids.shape[1])) is not None:
            synchronize(input_ids.device)
            self.at[number] = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def seconds(model: Any, ids: torch.Tensor, new_tokens: tuple[int, ...], **options: Any) -> dict[int, float]:
    """Wall-clock times from the call of one greedy `generate` to each number of new tokens, device work included."""
    clock = _Clock(ids.shape[1], new_tokens)
    synchronize(ids.device)
    begin = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
        **{**GREEDY, "max_new_tokens": max(new_tokens), "min_new_tokens": max(new_tokens), **options},
    )  # fmt: skip
    return {n: clock.at[n] - begin for n in new_tokens}


def in_turn(runs: Mapping[str, Callable[[], dict[int, float]]], pairs: int, tick: Callable[[], Any]) -> Times:
    """Seconds of every run, all runs one after another in each of `pairs` rounds. The caller warms up."""
    rounds = []
    for _ in range(pairs):
        rounds.append({name: run() for name, run in runs.items()})
        tick()
    return {name: {n: [taken[name][n] for taken in rounds] for n in rounds[0][name]} for name in runs}


def ratio(times: Times, name: str, new_tokens: int, since: int | None = None) -> dict[str, Any]:
    """Dense over `name`, round by round, median and range: until `new_tokens` tokens, from the start or from when
    `since` tokens were there."""

    def taken(who: str) -> list[float]:
        before = times[who][since] if since else [0.0] * len(times[who][new_tokens])
        return [end - begin for begin, end in zip(before, times[who][new_tokens], strict=True)]

    ratios = sorted(dense / other for dense, other in zip(taken("dense"), taken(name), strict=True))
    return {"median": median(ratios), "range": [ratios[0], ratios[-1]]}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what tells, after the block, the most bytes held in it above what was held before: of the device, and on
    a CPU of the process, looked at every few milliseconds."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what earlier runs freed and the process still holds would hide the same amount of new
    page, done, most = os.sysconf("SC_PAGE_SIZE"), threading.Event(), 0

    def held() -> int:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * page

    def watch() -> None:
        nonlocal most
        while not done.wait(0.003):
            most = max(most, held())

    before, watcher = held(), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(0, most - before)
    finally:
        done.set()
        watcher.join()


@dataclass
class StageTimer:
    """What each stage of a run costs, for the report: `costs` by stage, its `seconds`, and its `peak_bytes` above what
    was held before (of the device, on a CPU of the process). Work that was finished by an earlier run is not done again
    and costs next to nothing."""

    device: str
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        with peak_memory(torch.device(self.device)) as peak:
            yield
        self.costs[name] = {"seconds": time.monotonic() - begin, "peak_bytes": peak()}


@torch.no_grad()
def memory(model: Any, ids: torch.Tensor, decodes: bool = False, **options: Any) -> dict[str, int]:
    """Bytes of the KV cache after a prefill, and the prefill's peak above what was held before. It warms up, too, and
    if asked for so does decoding."""
    with peak_memory(ids.device) as peak:
        cache = model(ids, use_cache=True, logits_to_keep=1, **options).past_key_values
    used = {"kv_bytes": kv_bytes(cache), "peak_bytes": peak()}
    if decodes:
        model(ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return used


@torch.no_grad()
def touch(ways: Mapping[str, Way], ids: torch.Tensor, new_tokens: int) -> None:
    """Read all weights, and let every way generate `new_tokens` after the first token of `ids` (B, n). Else what is
    measured first on a CPU would count the weights' pages, which are mapped from a file and become the process's when
    they are first read."""
    for model in {model for model, _ in ways.values()}:
        for tensor in model.state_dict().values():  # one token does not read every expert, nor what skipping adds
            tensor.sum()
    for model, options in ways.values():
        seconds(model, ids[:, :1], (new_tokens,), **options)


def compare(
    ways: Mapping[str, Way],
    ids: torch.Tensor,
    pairs: int,
    new_tokens: tuple[int, ...] = (1,),
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """All ways in turn on the prompts `ids` (B, n), after one warm-up each.

    Args:
        ways: the first one is "dense", which the others are compared with.
        new_tokens: times are taken to each of these numbers, 1 first, which is the TTFT.
        tick: called after the warm-up and after every round.

    Returns:
        `batch`, `tokens` and `new_tokens`; and for every way, of each of `new_tokens`: median `seconds`, the `rounds`
        they come from, the `speedup` over dense round by round (median and range); with several of them `decode`, the
        same of one token after the first; and memory.
    """
    several = new_tokens[-1] > 1
    touch(ways, ids, 2 if several else 1)
    used = {name: memory(model, ids, several, **options) for name, (model, options) in ways.items()}
    tick()
    runs = {name: partial(seconds, model, ids, new_tokens, **options) for name, (model, options) in ways.items()}
    times = in_turn(runs, pairs, tick)
    first, last = new_tokens[0], new_tokens[-1]
    row: dict[str, Any] = {"batch": ids.shape[0], "tokens": ids.shape[1], "new_tokens": list(new_tokens)}
    for name, taken in times.items():
        row[name] = {
            "seconds": [median(taken[n]) for n in new_tokens],
            "rounds": [taken[n] for n in new_tokens],
            "speedup": [ratio(times, name, n) for n in new_tokens],
            **used[name],
        }
        if last > first:
            each = [(end - begin) / (last - first) for begin, end in zip(taken[first], taken[last], strict=True)]
            row[name]["decode"] = {"seconds": median(each), "speedup": ratio(times, name, last, since=first)}
    return row
