"""What the package imports is declared, and what it needs at run time is in the wheel's configuration."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from spts_compress import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", requirement)[0].replace("_", "-").lower() for requirement in requirements}


def imported(optional: bool) -> set[str]:
    """Top-level modules that are imported: at the start of a module, or only inside a function (`optional`)."""
    found = set()
    own = (path for path in (ROOT / "spts_compress").rglob("*.py") if path.parent.name != "vllm_plugin")
    for path in own:  # the plugin runs inside vLLM alone, in an environment without these tests
        tree = ast.parse(path.read_text())
        for node in tree.body if not optional else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"spts_compress"}


def test_what_is_imported_is_declared():
    of_module = packages_distributions()
    needed = names(PROJECT["dependencies"])
    extra = {name for group in PROJECT["optional-dependencies"].values() for name in names(group)}
    for modules, declared in ((imported(optional=False), needed), (imported(optional=True), needed | extra)):
        for module in modules:
            assert {name.replace("_", "-").lower() for name in of_module[module]} & declared, module


def test_the_versions_named_are_this_one():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_types_and_licence_travel_with_the_package():
    assert (ROOT / "spts_compress/py.typed").is_file()
    assert [(ROOT / path).is_file() for path in PROJECT["license-files"]] == [True]
