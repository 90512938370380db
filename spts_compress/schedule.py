"""The schema of schedules, a recipe's `schedule` and a checkpoint's `spts` block alike: every fault at once, with its
path. What a checkpoint's own code checks, `spts_block.py` says again: it stops at the first fault."""

from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from .modeling.configuration_spts import Amount, Proxy, Schedule
from .modeling.spts_block import FFN_SELECTIONS, HEAD_REDUCTIONS, covers
from .utils.errors import unknown_key


def read(
    block: dict[str, Any],
    num_layers: int | None = None,
    num_heads: int | None = None,
    path: str = "spts",
    proxy: Proxy | None = None,
) -> Schedule:
    """Read and check the schedule of a model with `num_layers` layers of `num_heads` heads (None: not known yet).

    Args:
        path: of `block`, for the faults.
        proxy: size of the proxies where `block` is a recipe's, which says nothing of them.

    Raises:
        ValueError: with one argument for each fault found in `block`.
    """
    if found := list(_form(Schedule, block, path, () if proxy is None else ("proxy", "enabled"))):
        raise ValueError(*found)
    schedule = Schedule.from_dict(block if proxy is None else {**block, "proxy": asdict(proxy)}, None)
    if found := faults(schedule, num_layers, num_heads):
        raise ValueError(*(f"{path}.{fault}" for fault in found))
    return schedule


def are_heads(value: Any) -> bool:
    """Whether plain data has the form of lists of heads by layer; JSON makes text of the layers' numbers."""
    if not isinstance(value, dict) or not all(str(layer).isdecimal() for layer in value):
        return False
    return all(isinstance(own, list) and all(type(head) is int for head in own) for own in value.values())


def _form(kind: type, value: Any, path: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """What is unknown, missing or of another type in the plain data of dataclass `kind`, by its annotations, `without`
    some fields."""
    if kind is Amount and type(value) is int:
        return
    if not isinstance(value, dict):
        yield f"{path} is {value!r}; it must be {'a number of tokens or ' if kind is Amount else ''}a mapping"
        return
    known = {field.name: field for field in fields(kind) if field.name not in without}
    yield from (unknown_key(f"{path}.{key}", [*known]) for key in value if key not in known)
    yield from (f"{path}.{key} is missing" for key, own in known.items() if own.default is MISSING and key not in value)
    hints = get_type_hints(kind)
    for key, own in known.items():
        if key not in value or (own.default in (None, ()) and value[key] is None):  # which is as good as nothing
            continue
        item, place = value[key], f"{path}.{key}"
        types = get_args(hints[key]) or (hints[key],)
        nested: Any = next((each for each in types if is_dataclass(each)), None)
        if nested and ... in types and isinstance(item, list | tuple):
            for number, part in enumerate(item):
                yield from _form(nested, part, f"{place}.{number}")
        elif key == "heads":
            if not (isinstance(item, str) or are_heads(item)):
                yield f"{place} is {item!r}; it must be mean, max, or lists of heads by layer, as {{3: [5], 7: [0, 8]}}"
        elif nested and key != "stages":
            yield from _form(nested, item, place)
        elif type(item) not in types and not (type(item) is int and float in types):
            yield f"{place} is {item!r}, which is not of the right type"


def faults(schedule: Schedule, num_layers: int | None = None, num_heads: int | None = None) -> list[str]:
    """Everything that is out of range or contradictory, each with what would be right; empty if all is well."""
    probe, last = schedule.probe, None if num_layers is None else num_layers - 1
    found = [
        *_range("start", schedule.start, 1, last),
        *_stages(schedule, last),
        *_range("probe.window_size", probe.window_size, 1),
        *_heads(schedule, num_layers, num_heads),
        *_range("probe.score_carry", probe.score_carry, 0, 1),
        *_range("sink_tokens", schedule.sink_tokens, 0),
        *_range("recent_tokens", schedule.recent_tokens, 1),
        *_range("min_length", schedule.min_length, 0),
    ]
    if probe.kernel_size < 1 or probe.kernel_size % 2 == 0:
        found.append(f"probe.kernel_size is {probe.kernel_size}; it must be odd and at least 1")
    if schedule.ffn_selection not in FFN_SELECTIONS:
        found.append(f"ffn_selection is {schedule.ffn_selection!r}; it must be one of {', '.join(FFN_SELECTIONS)}")
    return [*found, *_sizes(schedule, num_layers)]


def _range(path: str, value: float, least: int, most: int | None = None) -> Iterator[str]:
    if not (value >= least and (most is None or value <= most)):
        yield f"{path} is {value}; it must be " + (f"at least {least}" if most is None else f"{least} to {most}")


def _sizes(schedule: Schedule, num_layers: int | None) -> Iterator[str]:
    """Proxies and updates, and the share of tokens cached."""
    for name in ("proxy", "update"):
        sizes = getattr(schedule, name)
        if num_layers is not None and len(sizes) not in (0, 1, num_layers - schedule.start):
            yield f"{name} has {len(sizes)} entries for {num_layers - schedule.start} skipping layers"
    if not schedule.proxy and schedule.uses_proxies:
        yield f"ffn_selection is {schedule.ffn_selection!r} and there is no proxy; take attention or all"
    for size in schedule.proxy:
        yield from _range("proxy.channels", size.channels, 1)
        yield from _range("proxy.rank", size.rank, 0)
    for update in schedule.update:
        yield from _range("update.attention_rank", update.attention_rank, 0)
        yield from _range("update.ffn_rank", update.ffn_rank, 0)
    if schedule.kv is not None and not 0 < schedule.kv <= 1:
        yield f"kv is {schedule.kv}; it must be more than 0 and at most 1"


def _stages(schedule: Schedule, last: int | None) -> Iterator[str]:
    if not schedule.stages:
        yield "stages is empty; there must be at least one"
    previous = schedule.start - 1
    for i, stage in enumerate(schedule.stages):
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
        following = schedule.stages[i + 1] if i + 1 < len(schedule.stages) else None
        if following is None:
            if stage.prune_to is not None:
                yield f"{path}.prune_to is set; nothing is pruned after the last stage"
        elif stage.prune_to is not None:
            for name in ("budget", "ffn_budget"):
                if not covers(stage.prune_to, following.amounts().get(name, stage.prune_to)):
                    yield f"{path}.prune_to is less than stages.{i + 1}.{name}; it must be at least that"


def _heads(schedule: Schedule, num_layers: int | None, num_heads: int | None) -> Iterator[str]:
    heads, start = schedule.probe.heads, schedule.start
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
