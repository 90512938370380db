"""Time and memory of the dense and the skipping model: same weights, one process, in turn."""

import gc
import time
from statistics import median
from typing import Any

import torch

from ..cost import predicted


def stock_twin(model: Any, stock_class: type, stock_config: Any) -> Any:
    """The stock model on the very same weight tensors as an SPTS model: nothing is copied."""
    with torch.device("meta"):
        twin = stock_class(stock_config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".proxy." not in name}
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
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


@torch.no_grad()
def memory(model: Any, ids: torch.Tensor) -> dict[str, int]:
    """Bytes of the KV cache after the prefill, and on a GPU the prefill's peak above what was held before."""
    gc.collect()
    held = torch.cuda.memory_allocated(ids.device) if ids.is_cuda else 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    found = {"kv_bytes": kv_bytes(cache)}
    if ids.is_cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(ids.device) - held
    return found


def compare(dense: Any, spts: Any, ids: torch.Tensor, pairs: int, new_tokens: int) -> dict[str, Any]:
    """Dense and SPTS in turn on the prompts `ids` (B, n), after one warm-up each.

    Returns:
        medians in seconds of TTFT (`generate` with one token) and of `new_tokens` tokens, seconds a decoded token, the
        dense over SPTS ratios pair by pair (median and range), memory, and the counted ratio beside them.
    """
    models = {"dense": dense, "spts": spts}
    times: dict[str, dict[str, list[float]]] = {name: {"ttft": [], "end_to_end": []} for name in models}
    for turn in range(pairs + 1):
        for name, model in models.items():
            first, whole = seconds(model, ids, 1), seconds(model, ids, new_tokens)
            if turn:
                times[name]["ttft"].append(first)
                times[name]["end_to_end"].append(whole)
    result: dict[str, Any] = {"batch": ids.shape[0], "tokens": ids.shape[1], "new_tokens": new_tokens, "pairs": pairs}
    for name, model in models.items():
        made = {what: median(values) for what, values in times[name].items()}
        made["per_decoded_token"] = (made["end_to_end"] - made["ttft"]) / max(1, new_tokens - 1)
        result[name] = {**made, **memory(model, ids)}
    for what in ("ttft", "end_to_end"):
        ratios = sorted(d / s for d, s in zip(times["dense"][what], times["spts"][what], strict=True))
        result[f"{what}_ratio"] = {"median": median(ratios), "range": [ratios[0], ratios[-1]]}
    result["counted"] = predicted(spts.config, spts.config.schedule(), ids.shape[1])
    return result
