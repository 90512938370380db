"""The `spts` block of a `config.json` as plain data: read, written and checked. No part of the method.

It travels with every exported checkpoint, so it imports nothing of spts_compress.
"""

import difflib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

HEAD_REDUCTIONS = ("mean", "max")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", tuple: "a list"}
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
    return inner(**{name: read(_hints(inner).get(name), each) for name, each in value.items()})


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in HINTS:  # by hand: vLLM pickles this file's names by value, which what functools.cache makes refuses
        HINTS[kind] = get_type_hints(kind)
    return HINTS[kind]


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


def unknown_key(path: str, known: list[str]) -> str:
    """A line for the key at the end of the dotted `path`, with the nearest of those that are `known`."""
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1)
    return f"{path} is unknown{f' (did you mean {near[0]}?)' if near else ''}; known here: {', '.join(known)}"


def _are_heads(value: Any) -> bool:
    """Whether plain data has the form of lists of heads by layer; JSON makes text of the layers' numbers."""
    if not isinstance(value, dict) or not all(str(layer).isdecimal() for layer in value):
        return False
    return all(isinstance(own, list | tuple) and all(type(head) is int for head in own) for own in value.values())


def _form(kind: Any, value: Any, path: str, without: Any = ()) -> Iterator[str]:
    """What is unknown, missing or of another type in the plain data of dataclass `kind`, by its annotations, `without`
    some fields."""
    known = {field.name: field for field in fields(kind) if field.name not in without}
    if (is_amount := "floor" in known) and type(value) is int:
        return
    if not isinstance(value, dict):
        yield f"{path} is {value!r}; it must be {'a number of tokens or ' if is_amount else ''}a mapping"
        return
    yield from (unknown_key(f"{path}.{key}", [*known]) for key in value if key not in known)
    yield from (f"{path}.{key} is missing" for key, own in known.items() if own.default is MISSING and key not in value)
    for key, own in known.items():
        if key not in value or (own.default in (None, ()) and value[key] is None):  # which is as good as nothing
            continue
        item, place = value[key], f"{path}.{key}"
        types = get_args(_hints(kind)[key]) or (_hints(kind)[key],)
        nested: Any = next((each for each in types if is_dataclass(each)), None)
        if nested and ... in types and isinstance(item, list | tuple):
            for number, part in enumerate(item):
                yield from _form(nested, part, f"{place}.{number}")
        elif key == "heads":
            if not (isinstance(item, str) or _are_heads(item)):
                yield f"{place} is {item!r}; it must be mean, max, or lists of heads by layer, as {{3: [5], 7: [0, 8]}}"
        elif nested and key != "stages":
            yield from _form(nested, item, place)
        elif type(item) not in types and not (float in types and isinstance(item, int | float) and item is not True):
            right = " or ".join(WORDS[each] for each in types if each in WORDS)
            yield f"{place} is {item!r}, which is not of the right type; it must be {right}"


def _range(path: str, value: float, least: int, most: int | None = None) -> Iterator[str]:
    if not (value >= least and (most is None or value <= most)):
        yield f"{path} is {value}; it must be {f'at least {least}' if most is None else f'{least} to {most}'}"


def _stage_faults(start: int, stages: Any, last: int | None) -> Iterator[str]:
    if not stages:
        yield "stages is empty; there must be at least one"
    previous = start - 1
    for i, stage in enumerate(stages):
        path = f"stages.{i}"
        yield from _range(f"{path}.end", stage.end, previous + 1, last)
        previous = stage.end
        for name, amount in stage.amounts().items():
            yield from _range(f"{path}.{name}.fraction", amount.fraction, 0, 1)
            yield from _range(f"{path}.{name}.floor", amount.floor, 0)
            if amount.fraction == amount.floor == 0:
                yield f"{path}.{name} is 0; it must keep some tokens"
            if amount.cap is not None and amount.cap < max(1, amount.floor):
                yield f"{path}.{name}.cap is {amount.cap}; it must be at least the floor"
        following = stages[i + 1] if i + 1 < len(stages) else None
        if following is None:
            if stage.prune_to is not None:
                yield f"{path}.prune_to is set; nothing is pruned after the last stage"
        elif stage.prune_to is not None:
            for name in ("budget", "ffn_budget"):
                if not covers(stage.prune_to, following.amounts().get(name, stage.prune_to)):
                    yield f"{path}.prune_to is less than stages.{i + 1}.{name}; it must be at least that"


def _head_faults(heads: Any, start: int, num_layers: int | None, num_heads: int | None) -> Iterator[str]:
    if isinstance(heads, str):
        if heads not in HEAD_REDUCTIONS:
            yield f"probe.heads is {heads!r}; it must be mean, max, or lists of heads by layer"
        return
    for layer, head in heads:
        there = layer >= start and (num_layers is None or layer < num_layers)
        if not (there and head >= 0 and (num_heads is None or head < num_heads)):
            yield f"probe.heads has head {head} of layer {layer}; no skipping layer has such a head"
    if len(set(heads)) < len(heads):
        yield "probe.heads has a head twice"
    if all(layer != start for layer, _ in heads):
        yield f"probe.heads has none in layer {start}, which skips with nothing carried to it"


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
    def from_dict(
        cls,
        block: Any,
        num_layers: int | None,
        num_heads: int | None = None,
        path: str = "spts",
        given: dict[str, Any] | None = None,
    ) -> Any:
        """Read and check the `spts` block of a model with `num_layers` layers of `num_heads` heads (None: not known).

        Args:
            given: what `block` may not say.

        Raises:
            ValueError: with a line for each fault found in `block`, which is called `path`.
        """
        if found := list(_form(cls, block, path, given or ())):
            raise ValueError("\n".join(found))
        block = {**block, **(given or {})}
        probe = {**block.get("probe", {})}
        if isinstance(probe.get("heads"), dict):
            pairs = ((int(layer), head) for layer, heads in probe["heads"].items() for head in heads)
            probe["heads"] = tuple(sorted(pairs))
        schedule = read(cls, {**block, "probe": probe})
        if found := [f"{path}.{fault}" for fault in schedule.faults(num_layers, num_heads)]:
            raise ValueError("\n".join(found))
        return schedule

    def faults(self: Any, num_layers: int | None = None, num_heads: int | None = None) -> Iterator[str]:
        """Everything that is out of range or contradictory."""
        probe, last = self.probe, None if num_layers is None else num_layers - 1
        yield from _range("start", self.start, 1, last)
        yield from _stage_faults(self.start, self.stages, last)
        yield from _range("probe.window_size", probe.window_size, 1)
        yield from _head_faults(probe.heads, self.start, num_layers, num_heads)
        yield from _range("probe.score_carry", probe.score_carry, 0, 1)
        yield from _range("probe.rank", probe.rank, 0)
        yield from _range("sink_tokens", self.sink_tokens, 0)
        yield from _range("recent_tokens", self.recent_tokens, 1)
        yield from _range("min_length", self.min_length, 0)
        if (width := probe.kernel_size) < 1 or width % 2 == 0:
            yield f"probe.kernel_size is {width}; it must be odd and at least 1"
        if (selection := self.ffn_selection) not in FFN_SELECTIONS:
            yield f"ffn_selection is {selection!r}; it must be one of {', '.join(FFN_SELECTIONS)}"
        for name in ("proxy", "update"):
            count = len(getattr(self, name))
            if num_layers is not None and count not in (0, 1, num_layers - self.start):
                yield f"{name} has {count} entries for {num_layers - self.start} skipping layers"
        if not self.proxy and self.uses_proxies:
            yield f"ffn_selection is {selection!r} and there is no proxy; take attention or all"
        for size in self.proxy:
            yield from _range("proxy.channels", size.channels, 1)
            yield from _range("proxy.rank", size.rank, 0)
        for update in self.update:
            yield from _range("update.attention_rank", update.attention_rank, 0)
            yield from _range("update.ffn_rank", update.ffn_rank, 0)
        if self.kv is not None and not 0 < self.kv <= 1:
            yield f"kv is {self.kv}; it must be more than 0 and at most 1"
