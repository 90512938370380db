"""Where the time of one SPTS prefill goes: probing, selecting, gathers, projections, attention, feed-forward, rest."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .pairs import synchronize

# Functions of the exported spts.py, by the part they are.
FUNCTIONS = {
    "probe_scores": "probing", "reduce_heads": "probing", "pool_scores": "probing", "select": "selecting",
    "take": "gathers", "put": "gathers", "normalise": "norms",
}  # fmt: skip
MODULES = {"proxy": "probing", "mlp": "feed-forward"}


@torch.no_grad()
def parts(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of each part in the skipping layers of one prefill of `ids` (B, n), of the `dense layers` in front of
    them, and the `rest`. Waiting for a GPU after every part makes the whole slower than it is; the shares hold."""
    taken: dict[str, float] = defaultdict(float)
    names = type(model.model.layers[-1])._skip.__globals__  # of the exported file, wherever it was loaded from
    own = {name: names[name] for name in FUNCTIONS}
    start, handles, began = model.config.schedule().start, [], []
    open_parts: list[str] = []

    def measured(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if open_parts:  # part of another
                return function(*args, **kwargs)
            open_parts.append(part)
            synchronize(ids.device)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(ids.device)
                taken[part] += time.perf_counter() - begin
                open_parts.pop()

        return run

    def enter(module: Any, args: Any) -> None:
        synchronize(ids.device)
        began.append(time.perf_counter())

    def leave(part: str) -> Callable:
        def note(module: Any, args: Any, output: Any) -> None:
            synchronize(ids.device)
            taken[part] += time.perf_counter() - began.pop()

        return note

    def watch(module: Any, part: str) -> None:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave(part)))

    for number, layer in enumerate(model.model.layers):
        if number < start:
            handles.append(
                layer.register_forward_pre_hook(lambda module, args, kwargs: enter(module, args), with_kwargs=True)
            )
            handles.append(layer.register_forward_hook(leave("dense layers")))
            continue
        for name, part in MODULES.items():
            watch(getattr(layer, name), part)
        for name, module in layer.self_attn.named_children():
            if "_proj" in name:
                watch(module, "projections")
    interface = names["ALL_ATTENTION_FUNCTIONS"]

    class Attention:
        """Hands out the attention function with a clock around it."""

        @staticmethod
        def get_interface(*args: Any) -> Callable:
            return measured("attention", interface.get_interface(*args))

    try:
        names.update({name: measured(FUNCTIONS[name], function) for name, function in own.items()})
        names["ALL_ATTENTION_FUNCTIONS"] = Attention
        synchronize(ids.device)
        begin = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        synchronize(ids.device)
        whole = time.perf_counter() - begin
    finally:
        names.update(own)
        names["ALL_ATTENTION_FUNCTIONS"] = interface
        for handle in handles:
            handle.remove()
    return {**taken, "rest": whole - sum(taken.values())}
