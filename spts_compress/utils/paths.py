"""Paths as people write them."""

import os


def expand(path: str) -> str:
    """The path with a home folder in place of `~`, without slashes at its end.

    Raises:
        ValueError: if it is empty, names no user's home, or can be no path.
    """
    if not path.strip():
        raise ValueError("is empty; give a path")
    if "\0" in path:
        raise ValueError("has a null character, which no path may have")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"is {path}, and there is no such user; a file of that name is ./{path}")
    return expanded.rstrip("/") or "/"
