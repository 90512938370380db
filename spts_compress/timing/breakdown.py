"""Where the time of one SPTS prefill goes: dense layers, probing, selecting, gathers, attention, updates, feed-forward,
rest."""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .pairs import synchronize

RANGE = "spts."  # what the model's own ranges are called, see modeling/skipping.py


@torch.no_grad()
def parts(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of each part in the skipping layers of one prefill of `ids` (B, n), of the `dense layers` before
    them, and the `rest`. Recording makes the whole slower than it is; the shares hold."""
    on_gpu = ids.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(ids.device)
    with profile(activities=activities) as recorded:
        begin = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        synchronize(ids.device)
        whole = time.perf_counter() - begin
    taken: dict[str, float] = {}
    for event in recorded.key_averages():
        if event.key.startswith(RANGE):
            time_us = event.device_time_total if on_gpu else event.cpu_time_total
            part = event.key.removeprefix(RANGE)
            taken[part] = max(taken.get(part, 0.0), time_us / 1e6)
    return {**taken, "rest": max(0.0, whole - sum(taken.values()))}
