"""The method stays readable in one sitting."""

import re
from pathlib import Path

from spts_compress import modeling

ROOM = Path(modeling.__file__).parent


def test_the_method_is_read_in_at_most_650_lines():
    said = re.search(r"The method is (\d+) lines: (.+?)\.\n", (ROOM / "README.md").read_text(), re.DOTALL)
    files = re.findall(r"`(\w+\.py)`", said[2])
    lines = sum(len((ROOM / name).read_text().splitlines()) for name in files)
    assert "skipping.py" in files and lines == int(said[1])
    assert lines <= 650
