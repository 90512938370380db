"""The README's claims: every row of its matrix names tests that exist, and its commands are the ones CI runs."""

import re
from pathlib import Path

from spts_compress.base import ALIASES, FAMILIES

ROOT = Path(__file__).parent.parent


def test_every_row_of_the_matrix_names_existing_tests():
    there = set(re.findall(r"def test_(\w+)\(", "".join(p.read_text() for p in ROOT.glob("tests/test_*.py"))))
    rows = re.findall(r"^\| .* \| .* \| (`.*`) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(rows) >= 25
    assert named <= there, named - there


def test_the_table_of_families_is_the_supported_ones():
    part = (ROOT / "README.md").read_text().split("## Model families")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE)[1:] == [*FAMILIES, *ALIASES]


def test_every_shipped_recipe_is_listed():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in (ROOT / "recipes").glob("*.yaml"))
