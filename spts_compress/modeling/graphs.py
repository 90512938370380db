"""A prefill as one CUDA graph, for short prompts and small models, where a GPU would wait for the host to launch its
kernels. No part of the method.

A graph is made for a number of slots, and serves prompts of as many tokens and of some less. The slots that are left
stand after the prompt's end, where causal attention does not see them, and what a layer has room for beyond the
prompt's counts is filled with them; so every token runs as it does without a graph.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from transformers.cache_utils import DynamicCache

from .decoding import Pass
from .layer_plan import Count, LayerPlan, heads_of
from .selection import ranked
from .stock_layer import layer_windows, modules_in, watched

STEP = 256  # slots; from 4096 on an eighth of the next smaller power of two
LARGEST = 2**24  # numbers in the states of all slots: with more, the GPU has enough to do
DEVICES = ("cuda",)
MODULES = {"torch", "transformers", __name__.split(".")[0]}  # whose modules do the same in every pass
PLAIN = {int, float, bool, str}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive", "bincount"}
Weight = tuple[dict[str, Any], str, int]  # the dict of a module that holds it, its name there, and its place in memory
GRAPHS = 16  # at most, of one model: each holds keys and values of as many tokens as it has slots


def slots_for(tokens: int) -> int:
    """Slots of the graph that serves a prompt."""
    step = max(STEP, 1 << (tokens - 1).bit_length() >> 4)
    return -(-tokens // step) * step


@dataclass(frozen=True)
class RoomyPlan(LayerPlan):
    """A plan for more slots than there are tokens, which come first; one row, no windows. `real`: of each count, how
    many tokens it is, (1,). `shared`: what plans of equally many candidates have in common, made in each run.

    In place of an order it has its inverse, the candidates' ranks, by which they are chosen in more calls than by
    sorting them, but sooner: a graph launches calls for little.
    """

    real: dict[Count, torch.Tensor]
    shared: dict[Any, torch.Tensor]

    def last(self, states: torch.Tensor, count: int) -> torch.Tensor:
        return states.index_select(1, self._last_slots(count))

    def unseen(self, count: int) -> torch.Tensor:
        return self._once(("unseen", count), lambda: (self._slots() > self._last_slots(count)[:, None])[None])

    def ranked(self, score: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
        end = self.real[self.candidates_in]
        always = self._once("always", lambda: self._slots() >= end - self.schedule.always_last)
        valid = self._once("valid", lambda: (self._slots() < end)[None])
        order = ranked(score.masked_fill(always, float("inf")), tie, self.schedule.sink_tokens, valid=valid)
        return torch.empty_like(order).scatter_(1, order, self._slots()[None])

    def selected(self, count: Count, order: torch.Tensor) -> torch.Tensor:
        real = self.real[count]

        def filling() -> torch.Tensor:  # after the end, as many as there is room for
            after = self._slots() - self.real[self.candidates_in]
            return (after >= 0) & (after < count.width - real)

        chosen = (order >= order.shape[1] - real) | self._once(count, filling)
        place = chosen.cumsum(dim=1) * chosen
        index = place.new_empty(1, count.width + 1)  # all others go into the first place, which is left out
        return index.scatter_(1, place, self._slots()[None])[:, 1:]

    def _once(self, name: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if (key := (self.candidates_in, name)) not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def _slots(self) -> torch.Tensor:
        count = self.candidates_in
        return self._once("slots", lambda: torch.arange(count.width, device=self.real[count].device))

    def _last_slots(self, count: int) -> torch.Tensor:
        end = self.real[self.candidates_in]
        return self._once(("last", count), lambda: end - count + torch.arange(count, device=end.device))


class Made(DynamicCache):
    """Stands for the cache while a graph is made: has the keys and values, (1, G, slots, d) each, of every layer."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.tensors: dict[int, tuple[torch.Tensor, ...]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.tensors[layer_idx] = key_states, value_states
        return key_states, value_states


class Unwaited(TorchDispatchMode):
    """What runs in it, in this thread, may not wait for the device.

    Raises:
        RuntimeError: where it would, naming the call.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        places = {part.device for part in (*args, results) if isinstance(part, torch.Tensor)}
        if name in WAITING or (name in ("copy_", "_to_copy") and len(places) > 1):
            raise RuntimeError(f"{name} waits for the device, which a graph can't")
        return results


def captured(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """What runs a function again as a CUDA graph with the memory of a `pool`, and its results, which then are new.

    Raises:
        RuntimeError: if the host has to wait for the device in it.
    """
    usual, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(usual)
    try:
        with torch.cuda.stream(stream):
            with Unwaited():
                function()
            function()  # as itself, since libraries set themselves up in it
        usual.wait_stream(stream)
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):  # others may go on
            results = function()
    finally:
        torch.cuda.set_stream(usual)  # which a graph that fails leaves changed
    return graph.replay, results


class PrefillGraph:
    """The prefill by a schedule of prompts of up to so many slots, whose states a pass has the shape of."""

    def __init__(self, decoder: Any, schedule: Any, like: Pass, slots: int, pool: Any):
        states, layers = like.states, range(schedule.start, len(decoder.layers))
        self.states = states.new_zeros(1, slots, states.shape[2])
        self.positions = torch.arange(slots, device=states.device)[None]
        self.schedule, self.counts = schedule, [schedule.counts(layer, slots) for layer in layers]
        counts = {number: Count(number) for number in {number for each in self.counts for number in each}}
        shared = dict[Any, torch.Tensor]()
        self.numbers = torch.tensor(list(counts), device=states.device)
        real = dict(zip(counts.values(), self.numbers.split(1), strict=True))
        plans = []
        for each, heads in zip(self.counts, heads_of(schedule.probe, layers, states.device), strict=True):
            named: dict[str, Any] = {name: counts[number] for name, number in each._asdict().items()}
            named |= dict(schedule=schedule, heads=heads, window=None, options=like.options)
            plans.append(RoomyPlan(**named, real=real, shared=shared))
        self.widths, self.plans = list(counts), plans  # whose tensors the graph reads

        def prefill() -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, ...]]]:
            shared.clear()
            run = Pass(self.states, None, self.positions, made := Made(decoder.config), 0, like.options, causal=True)
            return decoder._stages(run, self.plans, slots, every=False), made.tensors

        self.replay, (self.last, self.tensors) = captured(prefill, pool)

    def real_counts(self, tokens: int) -> list[int] | None:
        """What its counts are for a prompt of so many tokens; None if there is no room for them."""
        found: dict[int, int] = {}
        for layer, wide in enumerate(self.counts, self.schedule.start):
            real = self.schedule.counts(layer, tokens)
            spare = type(real)(*(slots - count for slots, count in zip(wide, real, strict=True)))
            enough = min(spare) >= 0 and max(spare) <= spare.candidates_in and spare.active <= spare.cached
            if not enough or min(real) < self.schedule.always_last:
                return None
            if any(found.setdefault(slots, count) != count for slots, count in zip(wide, real, strict=True)):
                return None  # equal at the graph's own length alone
        return [found[width] for width in self.widths]

    def run(self, given: Pass) -> torch.Tensor | None:
        """The state (1, 1, D) after the last layer of a pass's last token, whose keys and values then are in `tensors`;
        None if the graph can't run it. The host does not wait for it."""
        tokens = given.states.shape[1]
        if (counts := self.real_counts(tokens)) is None:
            return None
        self.states[:, :tokens] = given.states
        self.states[:, tokens:] = 0  # nothing looks there, but what is not finite there would spread all the same
        self.positions[:, :tokens] = given.position_ids
        self.numbers.copy_(torch.tensor(counts))
        self.replay()
        return self.last.clone()


class Graphs:
    """The graphs of one decoder, made when they are first needed; a copy of the decoder makes its own."""

    def __init__(self) -> None:
        self.lock, self.made = threading.Lock(), dict[Any, PrefillGraph | None]()
        self.signature: Any = None
        self.weights: list[Weight] = []
        self.pool: Any = None

    def __reduce__(self) -> Any:
        return Graphs, ()

    @torch.compiler.disable
    def run(self, decoder: Any, given: Pass, request: Any, lengths: list[int]) -> torch.Tensor | None:
        """The state (1, 1, D) after the last layer of a prompt that ends with the pass, whose cache is filled; None if
        that takes another way."""
        states, tokens = given.states, given.states.shape[1]
        slots, schedule = slots_for(tokens), request.schedule
        small = slots * states.shape[2] <= LARGEST and lengths == [tokens]  # a single row without padding
        if states.device.type not in DEVICES or not small or not suits(decoder, given, request):
            return None
        key = slots, schedule, states.dtype, *given.options.items()
        with self.lock, torch.cuda.device(states.device) if states.is_cuda else nullcontext():
            graph, last = self.made.get(key), None
            if graph is not None and all(map(is_in_place, self.weights)):
                last = graph.run(given)  # and while the device is busy, the host looks whether it may
            found = looked_through(decoder, states.device)
            if found is None or found[0] != self.signature:  # weights were exchanged, or someone watches
                if last is not None and states.is_cuda:
                    torch.cuda.synchronize()  # before the graph goes
                self.made.clear()
                self.signature, self.weights = found or (None, [])
                self.pool = torch.cuda.graph_pool_handle() if states.is_cuda else None
                last = None
            if found is None:
                return None
            if key not in self.made:
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        graph = PrefillGraph(decoder, schedule, given, slots, self.pool)
                except RuntimeError:  # experts and scaled positions ask the device
                    graph = None
                while len(self.made) >= GRAPHS:
                    self.made.pop(next(iter(self.made)))
                self.made[key] = graph
            graph = self.made[key] = self.made.pop(key)  # the last one used is the last to go
            if graph is None or (last is None and (last := graph.run(given)) is None):
                return None
            plans = decoder._plans(schedule, [tokens], given)
            decoder._prepare_cache(given, plans, [tokens], False)
            held = [tokens] * schedule.start + [plan.cached.width for plan in plans]
            for layer, count in enumerate(held):
                given.cache.update(*(part[:, :, :count] for part in graph.tensors[layer]), layer)
            return last


def suits(decoder: Any, given: Pass, request: Any) -> bool:
    """Whether a graph may stand for a prompt's pass: nothing unusual is asked for."""
    device = given.states.device
    asked = (
        request.last == 1 and not request.positions and not given.first_layer and set(given.options) <= {"use_cache"}
    )
    usual = not (torch.is_grad_enabled() or torch.is_autocast_enabled(device.type) or is_in_torch_dispatch_mode())
    usual = usual and not _has_any_global_hook()
    if device.type == "cuda":  # whose order keeps one prompt's results from the next one's
        usual = usual and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    # Which is causal by itself; the others take a mask for it, or may.
    unmasked = decoder.config._attn_implementation == "sdpa" and not any(layer_windows(decoder.config))
    return asked and usual and unmasked


def looked_through(decoder: Any, device: torch.device) -> tuple[list[Any], list[Weight]] | None:
    """What a graph of a decoder relies on: its modules, what they do, their plain values, such as attention's factor,
    and where their weights are; None if not all are plain ones on the device, or there is a module that someone watches
    or that may change what it does, such as an adapter."""
    modules, weights = list[Any](), list[Weight]()
    for module in modules_in(decoder):
        usual = type(module).__module__.split(".")[0] in MODULES and not watched(module)
        parts = module._parameters
        if not usual or any(
            p is not None and (type(p) is not nn.Parameter or p.device != device) for p in parts.values()
        ):
            return None
        modules += [module, type(module).forward, *(v for v in vars(module).values() if type(v) in PLAIN)]
        for held in (parts, module._buffers):
            weights += [(held, name, part.data_ptr()) for name, part in held.items() if part is not None]
    return [*modules, *(pointer for _, _, pointer in weights)], weights


def is_in_place(weight: Weight) -> bool:
    """Whether a tensor is where it was."""
    held, name, pointer = weight
    part: Any = held.get(name)
    return type(part) in (nn.Parameter, torch.Tensor) and part.data_ptr() == pointer
