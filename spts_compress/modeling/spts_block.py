"""The `spts` block of a `config.json` as plain data: read, written and checked. No part of the method.

It travels with every exported checkpoint, so it imports nothing of spts_compress, and stops at the first fault. The
toolkit, in `schedule.py`, names all faults at once, by the same rules.
"""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

HEAD_REDUCTIONS = ("mean", "max")
FFN_SELECTIONS = ("proxy", "relative", "attention", "all")
HINTS: dict[Any, dict[str, Any]] = {}  # of each dataclass, since every prefill reads the block


def read(kind: Any, value: Any) -> Any:
    """Plain data as the dataclass, or the tuple of dataclasses, that the annotation `kind` names."""
    several = get_origin(kind) is tuple
    inner: Any = next((each for each in get_args(kind) or (kind,) if is_dataclass(each)), None)
    if several and value is None:
        return ()
    if inner is None or value is None:
        return value
    if several:
        return tuple(read(inner, each) for each in (value if isinstance(value, list | tuple) else [value]))
    if type(value) is int:
        return inner(floor=value)  # an amount that is a plain count
    if inner not in HINTS:  # by hand: vLLM pickles this file's names by value, which what functools.cache makes refuses
        HINTS[inner] = get_type_hints(inner)
    return inner(**{name: read(HINTS[inner].get(name), each) for name, each in value.items()})


def write(value: Any) -> Any:
    """What `read` reads: plain numbers where an amount is a plain count, and nothing that says nothing."""
    if isinstance(value, list | tuple):
        return [write(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"fraction", "floor", "cap"}:
        if not value["fraction"] and value["cap"] is None:
            return value["floor"]
        value = {**value, "floor": value["floor"] or None}
    return {name: write(each) for name, each in value.items() if each is not None}


def covers(amount: Any, other: Any) -> bool:
    """Whether an amount is at least `other` at every prompt length."""
    more = amount.fraction >= other.fraction and amount.floor >= other.floor
    return more and _limit(amount) >= _limit(other)


def _limit(amount: Any) -> float:
    """The most tokens an amount can stand for."""
    if amount.cap is not None:
        return amount.cap
    return float("inf") if amount.fraction else amount.floor


Fault = tuple[str, str]  # what is out of range, in a few words, and as a line: path, value, and what would be right


def _range(path: str, value: float, least: int, most: int | None = None, what: str | None = None) -> Iterator[Fault]:
    if not (value >= least and (most is None or value <= most)):
        right = f"at least {least}" if most is None else f"{least} to {most}"
        yield what or path, f"{path} is {value}; it must be {right}"


def _stage_faults(start: int, stages: Any, last: int | None) -> Iterator[Fault]:
    if not stages:
        yield "the stages' ends", "stages is empty; there must be at least one"
    previous = start - 1
    for i, stage in enumerate(stages):
        path = f"stages.{i}"
        yield from _range(f"{path}.end", stage.end, previous + 1, last, "the stages' ends")
        previous = stage.end
        for name, amount in stage.amounts().items():
            yield from _range(f"{path}.{name}.fraction", amount.fraction, 0, 1, "a budget")
            yield from _range(f"{path}.{name}.floor", amount.floor, 0, what="a budget")
            if amount.fraction == amount.floor == 0:
                yield "a budget", f"{path}.{name} is 0; it must keep some tokens"
            if amount.cap is not None and amount.cap < max(1, amount.floor):
                yield "a cap", f"{path}.{name}.cap is {amount.cap}; it must be at least the floor"
        following = stages[i + 1] if i + 1 < len(stages) else None
        if following is None:
            if stage.prune_to is not None:
                yield "prune_to of the last stage", f"{path}.prune_to is set; nothing is pruned after the last stage"
        elif stage.prune_to is not None:
            what = "prune_to, less than a budget of the next stage,"
            for name in ("budget", "ffn_budget"):
                if not covers(stage.prune_to, following.amounts().get(name, stage.prune_to)):
                    yield what, f"{path}.prune_to is less than stages.{i + 1}.{name}; it must be at least that"


def _head_faults(heads: Any, start: int, num_layers: int | None, num_heads: int | None) -> Iterator[Fault]:
    if isinstance(heads, str):
        if heads not in HEAD_REDUCTIONS:
            yield (
                f"probe.heads, {heads!r},",
                f"probe.heads is {heads!r}; it must be mean, max, or lists of heads by layer",
            )
        return
    for layer, head in heads:
        there = layer >= start and (num_layers is None or layer < num_layers)
        if not (there and head >= 0 and (num_heads is None or head < num_heads)):
            fault = f"probe.heads has head {head} of layer {layer}; no skipping layer has such a head"
            yield f"probe.heads, {heads!r},", fault
    if len(set(heads)) < len(heads):
        yield f"probe.heads, {heads!r},", "probe.heads has a head twice"
    if all(layer != start for layer, _ in heads):
        fault = f"probe.heads has none in layer {start}, which skips with nothing carried to it"
        yield f"probe.heads, {heads!r},", fault


class SptsBlock:
    """Mixed into the schedule."""

    def to_dict(self: Any) -> dict[str, Any]:
        """The `spts` block."""
        block = write(asdict(self))
        for name in ("proxy", "update"):
            if sizes := block.pop(name):
                block[name] = sizes[0] if len(sizes) == 1 else sizes
        if not isinstance(self.probe.heads, str):
            layers = dict.fromkeys(layer for layer, _ in self.probe.heads)
            block["probe"]["heads"] = {str(layer): list(self.probe.heads_of(layer)) for layer in layers}
        return block

    @classmethod
    def from_dict(cls, block: dict[str, Any], num_layers: int | None, num_heads: int | None = None) -> Any:
        """Read the `spts` block of a model with `num_layers` layers (None: as it is, unchecked) of `num_heads` heads
        (None: not known).

        Raises:
            ValueError: naming a fault of `block`.
        """
        try:
            probe = {**block.get("probe", {})}
            if isinstance(probe.get("heads"), dict):
                pairs = ((int(layer), head) for layer, heads in probe["heads"].items() for head in heads)
                probe["heads"] = tuple(sorted(pairs))
            schedule = read(cls, {**block, "probe": probe})
            if num_layers is not None:
                schedule.check(num_layers, num_heads)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"this model's spts block can't be used: {error}") from error
        return schedule

    def faults(self: Any, num_layers: int | None = None, num_heads: int | None = None) -> Iterator[Fault]:
        """Everything that is out of range or contradictory."""
        probe, always = self.probe, "sink_tokens or recent_tokens"
        last = None if num_layers is None else num_layers - 1
        yield from _range("start", self.start, 1, last)
        yield from _stage_faults(self.start, self.stages, last)
        yield from _range("probe.window_size", probe.window_size, 1)
        yield from _head_faults(probe.heads, self.start, num_layers, num_heads)
        yield from _range("probe.score_carry", probe.score_carry, 0, 1)
        yield from _range("probe.rank", probe.rank, 0)
        yield from _range("sink_tokens", self.sink_tokens, 0, what=always)
        yield from _range("recent_tokens", self.recent_tokens, 1, what=always)
        yield from _range("min_length", self.min_length, 0)
        if (width := probe.kernel_size) < 1 or width % 2 == 0:
            yield "probe.kernel_size", f"probe.kernel_size is {width}; it must be odd and at least 1"
        if (selection := self.ffn_selection) not in FFN_SELECTIONS:
            yield "ffn_selection", f"ffn_selection is {selection!r}; it must be one of {', '.join(FFN_SELECTIONS)}"
        for name, what in (("proxy", "the number of proxies"), ("update", "the number of updates")):
            count = len(getattr(self, name))
            if num_layers is not None and count not in (0, 1, num_layers - self.start):
                yield what, f"{name} has {count} entries for {num_layers - self.start} skipping layers"
        if not self.proxy and self.uses_proxies:
            what = "ffn_selection, which needs a proxy,"
            yield what, f"ffn_selection is {selection!r} and there is no proxy; take attention or all"
        for size in self.proxy:
            yield from _range("proxy.channels", size.channels, 1)
            yield from _range("proxy.rank", size.rank, 0)
        for update in self.update:
            yield from _range("update.attention_rank", update.attention_rank, 0, what="update")
            yield from _range("update.ffn_rank", update.ffn_rank, 0, what="update")
        if self.kv is not None and not 0 < self.kv <= 1:
            yield "kv", f"kv is {self.kv}; it must be more than 0 and at most 1"

    def check(self: Any, num_layers: int, num_heads: int | None = None) -> None:
        """Raises ValueError if a value is out of range: what would otherwise be a wrong answer or an odd error."""
        numbers = [self.start, self.sink_tokens, self.recent_tokens, self.min_length]
        probe = self.probe
        numbers += [probe.window_size, probe.kernel_size, *(stage.end for stage in self.stages)]
        numbers += [amount.floor for stage in self.stages for amount in stage.amounts().values()]
        heads = () if isinstance(probe.heads, str) else probe.heads
        for values, kind, what in (
            (numbers, int, "a number of tokens"),
            ([self.enabled], bool, f"enabled, {self.enabled!r},"),
            ([head for _, head in heads], int, f"probe.heads, {heads!r},"),
            ([probe.rank], int, f"probe.rank, {probe.rank!r},"),
            ([size for proxy in self.proxy for size in vars(proxy).values()], int, "proxy"),
            ([rank for update in self.update for rank in vars(update).values()], int, "update"),
        ):
            if any(type(value) is not kind for value in values):
                raise ValueError(f"{what} is out of range")
        for what, _ in self.faults(num_layers, num_heads):
            raise ValueError(f"{what} is out of range")
