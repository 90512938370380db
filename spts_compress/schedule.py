"""Every fault of a schedule at once. A checkpoint's own code reads the same block and stops at the first one."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .modeling.configuration_spts import Amount, Probe, Proxy, Schedule, Stage, Update
from .modeling.spts_block import FFN_SELECTIONS, HEAD_REDUCTIONS

NESTED = {
    "budget": Amount, "prune_to": Amount, "ffn_budget": Amount, "probe": Probe, "stages": Stage, "proxy": Proxy,
    "update": Update,
}  # fmt: skip
LISTS = ("stages", "proxy", "update")
REQUIRED = {
    Stage: ("end", "budget"), Proxy: ("channels", "rank"), Update: ("attention_rank", "ffn_rank"),
    Schedule: ("start", "stages"),
}  # fmt: skip
OPTIONAL = ("cap", "prune_to", "ffn_budget", "proxy", "update", "kv")  # None is as good as nothing
KINDS: dict[str, tuple[type, ...]] = {
    "fraction": (int, float), "score_carry": (int, float), "ffn_selection": (str,), "enabled": (bool,),
    "kv": (int, float),
}  # fmt: skip


def read(block: dict[str, Any], num_layers: int, num_heads: int | None = None) -> Schedule:
    """Read and check an `spts` block of a model with `num_layers` layers of `num_heads` heads each.

    Raises:
        ValueError: with one argument for each fault found in `block`.
    """
    if found := list(_form(Schedule, block, "spts")):
        raise ValueError(*found)
    schedule = Schedule.from_dict(block, None)
    if found := faults(schedule, num_layers, num_heads):
        raise ValueError(*found)
    return schedule


def are_heads(value: Any) -> bool:
    """Whether plain data has the form of lists of heads by layer; JSON makes text of the layers' numbers."""
    if not isinstance(value, dict) or not all(str(layer).isdecimal() for layer in value):
        return False
    return all(isinstance(own, list) and all(type(head) is int for head in own) for own in value.values())


def _form(kind: type, value: Any, where: str) -> Iterator[str]:
    """What is unknown, missing or of another type in the plain data of dataclass `kind`."""
    if kind is Amount and type(value) is int:
        return
    if not isinstance(value, dict):
        yield f"{where} is {value!r}; it must be a mapping"
        return
    known = [field.name for field in fields(kind)]
    yield from (f"{where}.{key} is unknown; known are {', '.join(known)}" for key in value if key not in known)
    yield from (f"{where}.{key} is missing" for key in REQUIRED.get(kind, ()) if key not in value)
    for key in known:
        if key not in value or (key in OPTIONAL and value[key] is None):
            continue
        item, place = value[key], f"{where}.{key}"
        if key in LISTS and isinstance(item, list | tuple):
            for number, part in enumerate(item):
                yield from _form(NESTED[key], part, f"{place}[{number}]")
        elif key in NESTED and (key != "stages"):
            yield from _form(NESTED[key], item, place)
        elif not _fits(key, item):
            yield f"{place} is {item!r}, which is not of the right type"


def _fits(key: str, item: Any) -> bool:
    if key == "heads":
        return isinstance(item, str) or are_heads(item)
    return type(item) in KINDS.get(key, (int,))


def covers(amount: Amount, other: Amount) -> bool:
    """Whether an amount is at least `other` at every prompt length."""
    more = amount.fraction >= other.fraction and amount.floor >= other.floor
    return more and _limit(amount) >= _limit(other)


def _limit(amount: Amount) -> float:
    """The most tokens an amount can stand for."""
    if amount.cap is not None:
        return amount.cap
    return float("inf") if amount.fraction else amount.floor


def faults(schedule: Schedule, num_layers: int, num_heads: int | None = None) -> list[str]:
    """Everything that is out of range or contradictory, each with what would be right; empty if all is well."""
    probe, layers = schedule.probe, num_layers - schedule.start
    found = [
        (1 <= schedule.start < num_layers, f"start is {schedule.start}; it must be 1 to {num_layers - 1}"),
        *_stages(schedule, num_layers),
        (probe.window_size >= 1, f"probe.window_size is {probe.window_size}; it must be at least 1"),
        *_heads(schedule, num_layers, num_heads),
        (0 <= probe.score_carry <= 1, f"probe.score_carry is {probe.score_carry}; it must be 0 to 1"),
        (
            probe.kernel_size >= 1 and probe.kernel_size % 2 == 1,
            f"probe.kernel_size is {probe.kernel_size}; it must be odd and at least 1",
        ),
        (
            schedule.ffn_selection in FFN_SELECTIONS,
            f"ffn_selection is {schedule.ffn_selection!r}; it must be one of {', '.join(FFN_SELECTIONS)}",
        ),
        (schedule.sink_tokens >= 0, f"sink_tokens is {schedule.sink_tokens}; it must not be negative"),
        (schedule.recent_tokens >= 1, f"recent_tokens is {schedule.recent_tokens}; the last token is always active"),
        (schedule.min_length >= 0, f"min_length is {schedule.min_length}; it must not be negative"),
        *_sizes(schedule, layers),
    ]
    return [message for fine, message in found if not fine]


def _sizes(schedule: Schedule, layers: int) -> Iterator[tuple[bool, str]]:
    """Proxies and updates of `layers` skipping layers, and the share of tokens cached."""
    proxy, update, kv = schedule.proxy, schedule.update, schedule.kv
    yield len(proxy) in (0, 1, layers), f"proxy has {len(proxy)} sizes for {layers} skipping layers"
    yield len(update) in (0, 1, layers), f"update has {len(update)} entries for {layers} skipping layers"
    bare = not proxy and schedule.ffn_selection in ("proxy", "relative")
    yield not bare, f"ffn_selection is {schedule.ffn_selection!r} and there is no proxy; take attention or all"
    for size in proxy:
        yield size.channels >= 1, f"proxy.channels is {size.channels}; it must be at least 1"
        yield size.rank >= 0, f"proxy.rank is {size.rank}; it must not be negative"
    for name in ("attention_rank", "ffn_rank"):
        for ranks in update:
            yield getattr(ranks, name) >= 0, f"update.{name} is {getattr(ranks, name)}; it must not be negative"
    yield kv is None or 0 < kv <= 1, f"kv is {kv}; it must be more than 0 and at most 1"


def _stages(schedule: Schedule, num_layers: int) -> Iterator[tuple[bool, str]]:
    yield len(schedule.stages) > 0, "stages is empty; there must be at least one"
    previous = schedule.start - 1
    for i, stage in enumerate(schedule.stages):
        where, end = f"stages[{i}]", stage.end
        yield previous < end < num_layers, f"{where}.end is {end}; it must be {previous + 1} to {num_layers - 1}"
        previous = end
        for name, amount in stage.amounts().items():
            yield 0 <= amount.fraction <= 1, f"{where}.{name}.fraction is {amount.fraction}; it must be 0 to 1"
            yield amount.floor >= 0, f"{where}.{name}.floor is {amount.floor}; it must not be negative"
            yield amount.fraction > 0 or amount.floor > 0, f"{where}.{name} is 0; it must keep some tokens"
            fine = amount.cap is None or amount.cap >= max(1, amount.floor)
            yield fine, f"{where}.{name}.cap is {amount.cap}; it must be at least the floor"
        following = schedule.stages[i + 1] if i + 1 < len(schedule.stages) else None
        if following is None:
            yield stage.prune_to is None, f"{where}.prune_to is set; nothing is pruned after the last stage"
        elif stage.prune_to is not None:
            for name in ("budget", "ffn_budget"):
                amount = following.amounts().get(name, stage.prune_to)
                less = f"{where}.prune_to is less than stages[{i + 1}].{name}; it must be at least that"
                yield covers(stage.prune_to, amount), less


def _heads(schedule: Schedule, num_layers: int, num_heads: int | None) -> Iterator[tuple[bool, str]]:
    heads, start = schedule.probe.heads, schedule.start
    if isinstance(heads, str):
        fine = heads in HEAD_REDUCTIONS
        yield fine, f"probe.heads is {heads!r}; it must be mean, max, or lists of heads by layer"
        return
    for layer, head in heads:
        there = start <= layer < num_layers and head >= 0 and (num_heads is None or head < num_heads)
        yield there, f"probe.heads has head {head} of layer {layer}; no skipping layer has such a head"
    yield len(set(heads)) == len(heads), "probe.heads has a head twice"
    first = any(layer == start for layer, _ in heads)
    yield first, f"probe.heads has none in layer {start}, which skips with nothing carried to it"
