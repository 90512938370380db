"""Paths as people write them."""

import os
from argparse import ArgumentTypeError
from pathlib import Path


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


def new_result(text: str) -> Path:
    """A study's argument OUT.json, beside which OUT.md is written; an argparse type, so it is checked before the work.

    Raises:
        ArgumentTypeError: if one of the two exists or can't be there.
    """
    path = Path(text)
    if path.suffix != ".json":
        raise ArgumentTypeError(f"{text}: give a file OUT.json; a table OUT.md may come beside it")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"{text}: {path.parent} is no folder; make it first")
    for made in (path, path.with_suffix(".md")):
        if os.path.lexists(made):
            raise ArgumentTypeError(f"{made} exists, and would be overwritten; give another OUT.json")
    return path
