"""The schema of schedules, a recipe's `schedule` and a checkpoint's `spts` block alike: every fault at once, with its
path. What values may be, `spts_block.py` says, for a checkpoint's own code, too, which stops at the first fault."""

from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from .modeling.configuration_spts import Amount, Proxy, Schedule
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
    if found := [f"{path}.{fault}" for _, fault in schedule.faults(num_layers, num_heads)]:
        raise ValueError(*found)
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
