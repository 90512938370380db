"""The `spts` block of a `config.json` as plain data: read, written and checked. No part of the method.

It travels with every exported checkpoint, so it imports nothing of spts_compress, and stops at the first fault. The
toolkit's own check of the same rules, `schedule.py`, names all faults at once: a new rule goes into both.
"""

from dataclasses import asdict, astuple, is_dataclass
from itertools import pairwise
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

    def check(self: Any, num_layers: int, num_heads: int | None = None) -> None:
        """Raises ValueError if a value is out of range: what would otherwise be a wrong answer or an odd error."""
        ends = [self.start - 1, *(stage.end for stage in self.stages)]
        amounts = [amount for stage in self.stages for amount in stage.amounts().values()]
        numbers = [*ends, self.sink_tokens, self.recent_tokens, self.probe.window_size, self.probe.kernel_size]
        numbers += [self.min_length]
        left = [(s.prune_to, a) for s, n in pairwise(self.stages) if s.prune_to for a in (n.budget, n.ffn_budget) if a]
        heads = self.probe.heads
        if isinstance(heads, str):
            fine_heads = heads in HEAD_REDUCTIONS
        else:
            first, most = [layer for layer, _ in heads[:1]], float("inf") if num_heads is None else num_heads
            there = (layer < num_layers and type(head) is int and 0 <= head < most for layer, head in heads)
            fine_heads = first == [self.start] and all(there) and len(set(heads)) == len(heads)
        for fine, what in (
            (all(type(number) is int for number in numbers + [a.floor for a in amounts]), "a number of tokens"),
            (0 <= ends[0] < num_layers - 1, "start"),
            (len(ends) > 1 and ends == sorted(set(ends)) and ends[-1] < num_layers, "the stages' ends"),
            (all(s.prune_to is None for s in self.stages[-1:]), "prune_to of the last stage"),
            (all(0 <= a.fraction <= 1 and a.floor >= 0 and (a.fraction or a.floor) for a in amounts), "a budget"),
            (all(a.cap is None or a.cap >= max(1, a.floor) for a in amounts), "a cap"),
            (all(covers(*pair) for pair in left), "prune_to, less than a budget of the next stage,"),
            (self.sink_tokens >= 0 and self.recent_tokens >= 1, "sink_tokens or recent_tokens"),
            (type(self.enabled) is bool, f"enabled, {self.enabled!r},"),
            (self.probe.window_size >= 1, "probe.window_size"),
            (self.probe.kernel_size >= 1 and self.probe.kernel_size % 2 == 1, "probe.kernel_size"),
            (0 <= self.probe.score_carry <= 1, "probe.score_carry"),
            (self.ffn_selection in FFN_SELECTIONS, "ffn_selection"),
            (fine_heads, f"probe.heads, {heads!r},"),
            (len(self.proxy) in (0, 1, num_layers - self.start), "the number of proxies"),
            (self.proxy or self.ffn_selection in ("attention", "all"), "ffn_selection, which needs a proxy,"),
            (len(self.update) in (0, 1, num_layers - self.start), "the number of updates"),
            (all(type(rank) is int and rank >= 0 for u in self.update for rank in astuple(u)), "update"),
            (self.kv is None or 0 < self.kv <= 1, "kv"),
        ):
            if not fine:
                raise ValueError(f"{what} is out of range")
