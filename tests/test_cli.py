"""The command line: paths as people write them, devices, and faults in one line each."""

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny import TEXT, tiny_base

from spts_compress.cli import main
from spts_compress.utils import devices
from spts_compress.utils.errors import UserError
from spts_compress.utils.paths import expand


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a space in its name, a base behind a link, and text; the working folder is another one."""
    home = tmp_path / "home of ours"
    home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "elsewhere")
    tiny_base(tmp_path / "models" / "base")
    (home / "linked").symlink_to(tmp_path / "models" / "base")
    (home / "text.jsonl").write_text("".join(json.dumps({"text": f"{n}. " + TEXT * 6}) + "\n" for n in range(12)))
    (home / "prose.txt").write_text(TEXT * 30)
    data = {
        "model": {"path": "~/linked/"},
        "calibration": {"source": "files", "path": "~/text.jsonl", "tokens": 1200, "length": 128},
        "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0, "steps": 5},
        "schedule": {"start": 2, "stages": [{"end": 4, "budget": 24}]},
        "report": {"lengths": [300], "pairs": 1, "needles": 0, "answers": 0, "text": "~/prose.txt"},
        "export": {"path": "~/never made/"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(data))
    return home


def test_paths_in_recipes_options_and_edits_are_read_as_people_write_them(home, tmp_path):
    run("recipe", "~/recipe.yaml", "--set", "export.path=~/out of it/", "--work", "~/work/")
    assert "is whole" in run("verify", "~/out of it/")
    assert "24 of" in run("inspect", tmp_path / "home of ours" / "out of it")
    run("strip", "~/out of it", "--output", "~/stock/")
    assert {p.name for p in (home / "stock").iterdir()} == {p.name for p in (home / "linked").iterdir()}
    assert sorted(p.name for p in home.iterdir() if not p.name.startswith(".")) == sorted(
        ["linked", "prose.txt", "recipe.yaml", "text.jsonl", "out of it", "work", "stock"]
    )
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("path", ["", "  ", "~nobody-of-that-name/x", "a\0b"])
def test_what_can_be_no_path_is_refused(path):
    with pytest.raises(ValueError):
        expand(path)


def test_an_empty_model_path_is_not_the_working_folder(home):
    shutil.copytree(home / "linked", "base", dirs_exist_ok=True)
    assert "model.path is empty" in run("recipe", "~/recipe.yaml", "--set", "model.path=''", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "wanted"), [(0, 0, "cpu"), (1, 0, "cuda:0"), (2, 1, "cuda:1"), (2, 5, "cuda:1")]
)
def test_a_gpu_is_used_if_there_is_one_and_processes_share_them_in_turn(monkeypatch, gpus, local_rank, wanted):
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert devices.choose("auto") == wanted
    assert devices.choose("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda" if not torch.cuda.is_available() else "cuda:99", "meta", "gpu", "cpu:x", ""])
def test_a_device_that_can_not_be_used_is_named(name):
    with pytest.raises(UserError, match=r"--device .*not usable here"):
        devices.choose(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe"],
        ["no-such-command"],
        ["recipe", "quickstart.yaml", "--outptu", "x"],
        ["--no-such-option"],
        ["evaluate", ".", "--suite", "ruler", "--output", ""],
        ["evaluate", "~nobody-of-that-name", "--suite", "ruler", "--output", "x"],
        ["bench", ".", "--lengths", "x", "--output", "x"],
    ],
)
def test_a_wrong_command_line_gets_one_line(arguments):
    lines = run(*arguments, code=2).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


def test_a_fault_of_ours_is_said_to_be_one_and_debug_shows_where(monkeypatch, tmp_path):
    monkeypatch.setattr("spts_compress.export.hub.push", lambda *_: 1 / 0)
    monkeypatch.setattr("spts_compress.export.hub.listing", lambda *_: "")
    assert run("push", tmp_path, "a/b", code=1).strip() == (
        "error: unexpected ZeroDivisionError: division by zero (spts-compress --debug ... shows where)"
    )
    assert "Traceback" in run("--debug", "push", tmp_path, "a/b", code=1)
