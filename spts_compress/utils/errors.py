"""The one error that users are meant to see."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input or environment. The message says what is wrong, where, and what would be right, in one line each."""


def reason(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
