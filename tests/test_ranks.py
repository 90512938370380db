"""Several processes end in what one process ends in."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest
import warm
import yaml
from helpers import contents, recipe_for
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_base

from spts_compress.utils.distributed import Ranks, interleaved


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_shares_are_put_together_in_order(items, size):
    parts = [Ranks(rank, size).shard(items) for rank in range(size)]
    assert interleaved(parts) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
options = {"trust_remote_code": True, "dtype": torch.float32}
dist.init_process_group("gloo")
spread = DistributedConfig(tp_plan="auto")
split = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=spread, **options)
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
layer = split.model.layers[-1]
assert getattr(layer.self_attn, layer.by_heads).weight.placements
ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(1))
first = split.config.spts["start"]
some = {first: [0], first + 1: [1, 3]}  # a layer's from one device alone, and from both
plain, windowed = {"heads": "mean"}, {"heads": "max", "window_size": 4, "score_carry": 1.0, "kernel_size": 3}
for probe in (plain, windowed, {"heads": some, "score_carry": 0.5}):
    made = []
    for model in (split.eval(), whole.eval()):
        with torch.no_grad():
            out = model(ids, logits_to_keep=1, spts={"probe": probe, "positions": True})
        made.append((out.logits, [row["positions"] for row in model.skipped(out.past_key_values)[2:]]))
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True)), "other tokens"
    assert torch.allclose(made[0][0], made[1][0], atol=1e-4), "other logits"
print("ALIKE", flush=True)
dist.destroy_process_group()
"""


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for each process: sums differ with their number


def recipe_in(folder, path, processes):
    """Run a recipe in a process of its own, or in several that torchrun starts."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "spts_compress", "recipe", str(path)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def together(processes, *command, cwd):
    """Run `python *command` in warm processes with what torchrun tells its own; the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**os.environ, **ONE_THREAD, **(address | place if processes > 1 else {})}
        started.append(warm.start(*command, env=environment, cwd=cwd))
    ended = [process.finish() for process in started]
    assert not any(done.returncode for done in ended), ended
    return [done.stdout for done in ended]


def test_two_processes_make_the_checkpoint_that_one_makes(corpus, tmp_path):
    base = tiny_base(tmp_path / "base")
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        path = recipe_for(base, corpus, folder)
        data = yaml.safe_load(path.read_text())
        del data["schedule"]
        data["search"] = {
            "speedup": 1.15, "lengths": [512, 560], "kinds": ["free"], "prompts": 2, "answer_tokens": 8, "starts": [2],
            "candidates": 4, "rounds": 1, "heads_from": 1, "choices": {"heads": [0.9]},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(data))
        assert recipe_in(folder, path, processes).count("is ready") == 1  # one of them speaks
        found = json.loads((folder / "out.search" / "search.json").read_text())
        del found["seconds"]
        made[processes] = contents(folder / "out"), found
    assert made[1] == made[2]
    kept = sorted((tmp_path / "2" / "out.work").glob("search-*.jsonl"))
    shares = [Counter(json.loads(line)["length"] for line in path.read_text().splitlines()) for path in kept]
    count = made[2][1]["evaluations"]  # of which both do as much, of long prompts and of short ones
    assert len(shares) == 2 and all(abs(shares[0][n] - shares[1][n]) <= count // 10 for n in (512, 560)), shares
    assert not list((tmp_path / "2" / "out.work").glob("hidden-*"))


def test_two_processes_evaluate_what_one_evaluates(checkpoint, tmp_path):
    options = ["--task", "niah_single_1", "--task", "vt", "--lengths", "900", "--items", "3", "--dtype", "float32"]
    results = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        together(processes, "-m", "spts_compress", "evaluate", checkpoint, *options, "--output", output, cwd=tmp_path)
        found = json.loads((output / "evaluation.json").read_text())
        assert found["missing"] == 0
        results[processes] = found["tasks"], found["fidelity"]
    assert results[1] == results[2]
    own = (tmp_path / "2" / "answers.1.jsonl").read_text().splitlines()
    assert len(own) == 3 * 2 + 1  # of 6 items in two modes and 3 free answers


@pytest.mark.parametrize("built", ["llama", "deepseek_v2"], indirect=True)
def test_devices_that_share_the_heads_choose_the_same_tokens(built, tmp_path):
    assert [text.count("ALIKE") for text in together(2, "-c", PARALLEL, built[0] / "out", cwd=tmp_path)] == [1, 1]


def test_devices_that_share_the_heads_update_the_same_tokens(updating, tmp_path):
    assert [text.count("ALIKE") for text in together(2, "-c", PARALLEL, updating, cwd=tmp_path)] == [1, 1]
