"""Dense and SPTS side by side on the same prompts: time to first token, cache size, answers, agreement."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .bench import kv_bytes, synchronize
from .items import Item
from .runner import answers
from .scorers import score


def clock(device: torch.device) -> float:
    """Seconds, after all work given to the device has ended."""
    synchronize(device)
    return time.perf_counter()


def time_to_first_token(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of `generate` with one new token (TTFT)."""
    begin = clock(model.device)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return clock(model.device) - begin


def alternate(dense: Any, spts: Any, inputs: dict[str, torch.Tensor], pairs: int, tick: Callable[[], Any]) -> dict:
    """TTFT of both models in turn, after one warm-up each: all times in seconds, the medians, and the median ratio."""
    times: dict[str, list[float]] = {"dense": [], "spts": []}
    for turn in range(pairs + 1):
        for name, model in (("dense", dense), ("spts", spts)):
            seconds = time_to_first_token(model, inputs)
            if turn:
                times[name].append(seconds)
        tick()
    ratios = [d / s for d, s in zip(times["dense"], times["spts"], strict=True)]
    return {
        "tokens": inputs["input_ids"].shape[1],
        "ttft": times,
        "dense_s": median(times["dense"]),
        "spts_s": median(times["spts"]),
        "speedup": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }


@torch.no_grad()
def cache_bytes(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the keys and values after the prefill."""
    return kv_bytes(model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)


def retrieval(model: Any, tokenizer: Any, item: Item) -> dict:
    """One item answered: the text and its score."""
    [text] = answers(model, tokenizer, [item], None)
    return {"answer": text, "score": score(item.scorer, text, item.outputs, item.classes)}
