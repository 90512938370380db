"""Time and memory of the dense and the skipping model: same weights, one process, in turn."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from ..cost import LayerShape, layer_costs, predicted
from ..modeling.configuration_spts import Schedule

Times = dict[str, dict[int, list[float]]]  # seconds by name and number of new tokens


def stock_twin(model: Any) -> Any:
    """The stock model on the very same weight tensors as a skipping model: nothing is copied."""

    def stock(kind: type) -> Any:
        return next(c for c in kind.__mro__ if c.__module__.startswith("transformers.models."))

    dropped = ("spts", "model_type", "architectures", "auto_map")
    settings = {name: value for name, value in model.config.to_dict().items() if name not in dropped}
    config = stock(type(model.config))(**settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        twin = stock(type(model))(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".proxy." not in name}
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    twin.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    return twin.eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kv_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds."""
    return sum(t.numel() * t.element_size() for held in cache.layers for t in (held.keys, held.values))


def seconds(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> float:
    """Wall-clock time of greedy `generate` with exactly `new_tokens` tokens, device work included."""
    synchronize(ids.device)
    begin = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    synchronize(ids.device)
    return time.perf_counter() - begin


def in_turn(
    runs: Mapping[str, Callable[[int], float]], pairs: int, new_tokens: tuple[int, ...], tick: Callable[[], Any]
) -> Times:
    """Seconds of every run, all runs one after another in each of `pairs` rounds, after a warm-up round.

    Args:
        runs: by name, what takes a number of new tokens and returns its seconds.
    """
    times: Times = {name: {n: [] for n in new_tokens} for name in runs}
    for turn in range(pairs + 1):
        for name, run in runs.items():
            for n in new_tokens if turn else new_tokens[:1]:
                taken = run(n)
                if turn:
                    times[name][n].append(taken)
        tick()
    return times


def ratio(times: Times, name: str, new_tokens: int) -> dict[str, Any]:
    """Dense over `name`, round by round: median and range."""
    both = zip(times["dense"][new_tokens], times[name][new_tokens], strict=True)
    ratios = sorted(dense / other for dense, other in both)
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


@torch.no_grad()
def memory(model: Any, ids: torch.Tensor) -> dict[str, int]:
    """Bytes of the KV cache after the prefill, and the prefill's peak above what was held before."""
    with peak_memory(ids.device) as peak:
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    return {"kv_bytes": kv_bytes(cache), "peak_bytes": peak()}


def compare(
    dense: Any, spts: Any, ids: torch.Tensor, pairs: int, new_tokens: int, tick: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Dense and SPTS in turn on the prompts `ids` (B, n), after one warm-up each.

    Returns:
        medians in seconds of TTFT (`generate` with one token) and of `new_tokens` tokens, seconds a decoded token, the
        dense over SPTS ratios pair by pair (median and range), memory, and the counted ratio beside them.
    """
    models = {"dense": dense, "spts": spts}
    runs = {name: partial(seconds, model, ids) for name, model in models.items()}
    times = in_turn(runs, pairs, (1, new_tokens), tick)
    result: dict[str, Any] = {"batch": ids.shape[0], "tokens": ids.shape[1], "new_tokens": new_tokens, "pairs": pairs}
    for name, model in models.items():
        first, whole = median(times[name][1]), median(times[name][new_tokens])
        decoded = sorted(
            (b - a) / max(1, new_tokens - 1) for a, b in zip(times[name][1], times[name][new_tokens], strict=True)
        )
        made = {"ttft": first, "end_to_end": whole, "per_decoded_token": median(decoded)}
        result[name] = {**made, **memory(model, ids)}
    result["ttft_ratio"], result["end_to_end_ratio"] = ratio(times, "spts", 1), ratio(times, "spts", new_tokens)
    result["counted"] = predicted(spts.config, spts.config.schedule(), ids.shape[1])
    return result


@torch.no_grad()
def calibrated(stock: Any, schedule: Schedule, ids: torch.Tensor, repeats: int = 3) -> float:
    """The TTFT ratio that the machine's own speed allows: as counted, but with attention and the feed-forward network
    of one stock layer timed at every number of tokens that the schedule has, since they do not cost the same an
    operation. Probing is taken at the feed-forward network's speed.

    Args:
        ids: prompt (B, n).
    """
    config, length = stock.config, ids.shape[1]
    shape, layer = LayerShape.of(config), stock.model.layers[0]
    costs = layer_costs(config, schedule, length)
    known: dict[tuple[str, int], float] = {}
    whole = stock.model.embed_tokens(ids)

    def timed(part: str, tokens: int) -> float:
        if (part, tokens) in known or tokens == 0:
            return known.get((part, tokens), 0.0)
        states = whole[:, :tokens]
        positions = torch.arange(tokens, device=ids.device)[None]
        rotary = stock.model.rotary_emb(states, position_ids=positions)
        calls: dict[str, Callable[[], Any]] = {
            "attention": lambda: layer.self_attn(
                layer.input_layernorm(states), position_embeddings=rotary, attention_mask=None
            ),
            "ffn": lambda: layer.mlp(layer.post_attention_layernorm(states)),
            "keys": lambda: layer.self_attn.k_proj(states),
        }
        taken = []
        for _ in range(repeats + 1):
            synchronize(ids.device)
            begin = time.perf_counter()
            calls[part]()
            synchronize(ids.device)
            taken.append(time.perf_counter() - begin)
        known[part, tokens] = median(taken[1:])
        return known[part, tokens]

    dense = len(costs) * (timed("attention", length) + timed("ffn", length))
    pace = timed("ffn", length) / shape.feed_forward(length)
    total = sum(
        timed("attention", cost.active)
        + timed("keys", cost.entering - cost.active)
        + timed("ffn", cost.changed)
        + cost.probing * pace
        for cost in costs
    )
    return dense / total
