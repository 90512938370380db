"""What several test files share. Costly things are made once, for all workers, and are never written to."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, so each takes one thread; so do their subprocesses
    os.environ["OMP_NUM_THREADS"] = "1"
# Code of checkpoints: not among the user's, nor another worker's, whose new folders this one might not see.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="spts-modules-")

import pytest
import torch
import warm
from filelock import FileLock
from helpers import PROSE, recipe_for, run, write_corpus
from hub_server import Hub
from tiny import tiny_base

from spts_compress.calibrate.base_model import resolve
from spts_compress.export import fresh, write
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ModelSection
from spts_compress.utils.store import Store

gc.freeze()  # what is imported stays; looking through it takes each of the many collections a third of a second


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def warm_checks(monkeypatch):
    """Exports are checked by a warm process. The shared ones, made before this applies, have a new interpreter."""
    new = subprocess.run

    def run_warm(command, *arguments, **options):
        if list(command[1:3]) != ["-P", fresh.__file__]:
            return new(command, *arguments, **options)
        return warm.run(*command[1:], env=options["env"], cwd=options["cwd"])

    monkeypatch.setattr(subprocess, "run", run_warm)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the folder `name` that `make(folder)` filled, in whichever worker came first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # a worker's own folder is inside the session's

    def folder_of(name, make):
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def corpus(once):
    """A folder of calibration text."""
    return once("corpus", write_corpus)


@pytest.fixture(scope="session", params=["llama"])
def built(request, corpus, once):
    """A recipe's whole run: its folder (with the checkpoint in out/), the base, the recipe and what was printed."""

    def make(folder):
        base = tiny_base(folder / "base", request.param, shards=True, tie_word_embeddings=False)
        (folder / "printed.txt").write_text(run("recipe", recipe_for(base, corpus, folder)))

    folder = once(f"built-{request.param}", make)
    return folder, folder / "base", folder / "recipe.yaml", (folder / "printed.txt").read_text()


@pytest.fixture(scope="session")
def checkpoint(once):
    """An exported tiny checkpoint, without the pipeline around it; prose.txt for prompts lies beside it."""

    def make(folder):
        tiny_base(folder / "base")
        base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
        stages = [{"end": 2, "budget": 100, "prune_to": 120}, {"end": 4, "budget": 80}]
        block = {"start": 1, "stages": stages, "proxy": {"channels": 1, "rank": 0}, "recent_tokens": 4}
        parameters = {
            f"model.layers.{n}.proxy.{name}": torch.zeros(shape, dtype=torch.bfloat16)
            for n in range(1, 5)
            for name, shape in (("down", (1, 32)), ("square", (32,)), ("constants", (2,)))
        }
        (folder / "out").mkdir()
        write.write(base, write.carry(base), Schedule.from_dict(block, 5), parameters, folder / "out")
        (folder / "out/README.md").write_text("# A card\n")
        (folder / "prose.txt").write_text(PROSE)

    return once("checkpoint", make) / "out"


@pytest.fixture(scope="session")
def updating(once):
    """An exported tiny checkpoint whose skipped tokens are updated, and which has no proxies."""

    def make(folder):
        tiny_base(folder / "base")
        base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
        ranks, generator = {"attention_rank": 2, "ffn_rank": 0}, torch.Generator().manual_seed(0)
        block = {"start": 2, "stages": [{"end": 4, "budget": 30}], "update": ranks, "kv": 0.6, "recent_tokens": 4}
        parameters = {
            f"model.layers.{n}.{name}": torch.randn(shape, generator=generator).bfloat16() / 4
            for n in range(2, 5)
            for name, shape in (
                ("attention_update.bias", (32,)),
                ("attention_update.down", (2, 32)),
                ("attention_update.up", (32, 2)),
                ("ffn_update.bias", (32,)),
            )
        }
        (folder / "out").mkdir()
        schedule = Schedule.from_dict({**block, "ffn_selection": "attention"}, 5)
        write.write(base, write.carry(base), schedule, parameters, folder / "out")

    return once("updating", make) / "out"


@pytest.fixture
def hub():
    """A Hub in this process, empty."""
    made = Hub()
    yield made
    made.close()
