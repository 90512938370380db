"""Several processes end in what one process ends in."""

import json
import os
import subprocess
import sys

import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import checkpoint  # noqa: F401
from test_pipeline import contents, corpus, recipe_for  # noqa: F401
from tiny import tiny_base

from spts_compress.ranks import Ranks, _in_order


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_shares_are_put_together_in_order(items, size):
    parts = [Ranks(rank, size).mine(items) for rank in range(size)]
    assert _in_order(parts) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def start(folder, *arguments, processes=1):
    """Run spts-compress in one or several processes, each with one thread: sums differ with their number."""
    command = [sys.executable, "-m", "spts_compress"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "-m", "spts_compress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_processes_make_the_checkpoint_that_one_makes(corpus, tmp_path):  # noqa: F811
    base = tiny_base(tmp_path / "base")
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        path = recipe_for(base, corpus, folder)
        data = yaml.safe_load(path.read_text())
        del data["schedule"]
        data["search"] = {
            "speedup": 1.15, "lengths": [600], "kinds": ["free"], "prompts": 3, "answer_tokens": 8, "starts": [2],
            "candidates": 4, "rounds": 1,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(data))
        done = start(folder, "recipe", path, processes=processes)
        assert done.stdout.count("is ready") == 1  # one of them speaks
        found = json.loads((folder / "out.search" / "search.json").read_text())
        del found["seconds"]
        made[processes] = contents(folder / "out"), found
    assert made[1] == made[2]
    lines = [len(p.read_text().splitlines()) for p in sorted((tmp_path / "2" / "out.work").glob("search-*.jsonl"))]
    assert len(lines) == 2 and abs(lines[0] - lines[1]) <= made[2][1]["evaluations"] // 2  # both took part
    assert not list((tmp_path / "2" / "out.work").glob("hidden-*"))


def test_two_processes_evaluate_what_one_evaluates(checkpoint, tmp_path):  # noqa: F811
    options = ["--task", "niah_single_1", "--task", "vt", "--lengths", "900", "--items", "3", "--dtype", "float32"]
    results = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        start(tmp_path, "evaluate", checkpoint, *options, "--output", output, processes=processes)
        found = json.loads((output / "evaluation.json").read_text())
        assert found["missing"] == 0
        results[processes] = found["tasks"], found["fidelity"]
    assert results[1] == results[2]
    own = (tmp_path / "2" / "answers.1.jsonl").read_text().splitlines()
    assert len(own) == 3 * 2 + 1  # of 6 items in two modes and 3 free answers
