"""The studies' scripts: nothing of others is lost, and what they keep is theirs."""

import runpy
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"


@pytest.fixture
def refused(monkeypatch, capsys):
    """`refused(script, *arguments)`: the last line of a study that ends by its arguments alone."""

    def start(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(STUDIES / script), run_name="__main__")
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return start


def test_the_memory_curve_deletes_no_folder_that_was_there(refused, tmp_path):
    kept = tmp_path / "8-layers" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    line = refused("memory_curve.py", tmp_path / "no-model", tmp_path, tmp_path / "out.json", "--layers", "4,8")
    assert "8-layers exists" in line and kept.read_text() == "mine" and not (tmp_path / "4-layers").exists()
