"""Publishing to a Hub and loading from it, with the real client over HTTP."""

import os
import shutil

import warm
from helpers import recipe_for

LOAD = """
import sys
sys.modules["spts_compress"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
ids = torch.arange(3, 203)[None]
out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
print("cached", model.skipped(out.past_key_values)[-1]["active"])
"""


def call(hub, tmp_path, *command, token="hf_test"):
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return warm.run(*command, env=environment)


def push(hub, tmp_path, *arguments, **options):
    return call(hub, tmp_path, "-m", "spts_compress", "push", *arguments, **options)


def test_a_checkpoint_goes_to_the_hub_and_back(built, hub, tmp_path):
    folder = built[0] / "out"
    done = push(hub, tmp_path, folder, "user/model", "--private")
    assert done.returncode == 0, done.stderr
    assert "spts-proxies.safetensors" in done.stdout and f"{hub.address}/user/model" in done.stdout
    assert "hf_test" not in done.stdout + done.stderr
    assert hub.private == {"user/model": True}
    assert hub.files("user/model") == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sum("/commit/" in request for request in hub.requests) == 1
    loaded = call(hub, tmp_path, "-c", LOAD, "user/model", hub.branches["user/model"]["main"])
    assert loaded.stdout.strip() == "cached 24", loaded.stderr

    other = push(hub, tmp_path, folder, "user/model", "--revision", "later")
    assert other.returncode == 0, other.stderr
    assert hub.files("user/model", "later") == hub.files("user/model")


def holding(hub, private=False, **files):
    """A repository that is there already, user/theirs."""
    hub.repos["user/theirs"] = {
        "0" * 40: {},
        "1" * 40: {name.replace("__", "."): content for name, content in files.items()},
    }
    hub.branches["user/theirs"], hub.private["user/theirs"] = {"main": "1" * 40}, private
    return hub.files("user/theirs")


def test_only_what_the_export_made_is_uploaded(built, hub, tmp_path):
    folder = shutil.copytree(built[0] / "out", tmp_path / "out")
    theirs = {".env", "customers.csv", "notes.zip", ".cache/token"}
    (folder / ".cache").mkdir()
    for name in theirs:
        (folder / name).write_text("secret")
    done = push(hub, tmp_path, folder, "user/model")
    assert done.returncode == 0, done.stderr
    assert set(hub.files("user/model")) == {p.name for p in (built[0] / "out").iterdir()}
    assert {line.split()[-1] for line in done.stdout.splitlines() if "left out" in line} == theirs


def test_a_repository_of_a_model_or_card_of_others_is_not_written_to(built, hub, tmp_path):
    theirs = holding(hub, model__safetensors=b"plain", README__md=b"my own card", __gitattributes=b"")
    refused = push(hub, tmp_path, built[0] / "out", "user/theirs")
    assert refused.returncode == 2 and "user/theirs: holds files of others: README.md" in refused.stderr
    named = push(hub, tmp_path, built[0] / "out", "user/theirs", "--revision", "main")
    assert named.returncode == 2 and hub.files("user/theirs") == theirs
    hub.branches["user/theirs"]["stable"] = "1" * 40  # at main's commit, but theirs
    stable = push(hub, tmp_path, built[0] / "out", "user/theirs", "--revision", "stable")
    assert stable.returncode == 2 and "holds files of others: README.md" in stable.stderr
    assert hub.files("user/theirs", "stable") == theirs
    # on a branch of its own, where a plain model.safetensors would hide the index
    hub.fail, hub.status = "/commit/", 400
    assert push(hub, tmp_path, built[0] / "out", "user/theirs", "--revision", "spts").returncode == 2
    assert hub.files("user/theirs", "spts") == {}  # as a kill leaves it, too
    hub.fail = ""
    done = push(hub, tmp_path, built[0] / "out", "user/theirs", "--revision", "spts")
    assert done.returncode == 0 and "removed there" not in done.stdout, done.stderr
    made = {p.name: p.read_bytes() for p in (built[0] / "out").iterdir()}
    assert hub.files("user/theirs", "spts") == made
    assert hub.files("user/theirs") == theirs

    del hub.repos["user/theirs"]["0" * 40]  # of a history that was squashed, the first commit holds all
    done = push(hub, tmp_path, built[0] / "out", "user/theirs", "--revision", "spts2")
    assert done.returncode == 0 and "removed there: model.safetensors" in done.stdout, done.stderr
    assert hub.files("user/theirs", "spts2") == {**made, ".gitattributes": b""}


def test_a_checkpoint_made_here_is_replaced_whole_and_what_says_nothing_of_it_stays(built, hub, tmp_path):
    old = {"model__safetensors": b"plain", "vocab__txt": b"", "spts_evaluation__json": b"{}"}
    mine = {name: b"mine" for name in ("notes.md", "LICENSE", "notebook.ipynb", "examples/demo.txt")}
    holding(hub, spts_files__json=b"{}", **old, **{name.replace(".", "__"): data for name, data in mine.items()})
    done = push(hub, tmp_path, built[0] / "out", "user/theirs")
    assert done.returncode == 0, done.stderr
    assert hub.files("user/theirs") == {
        **{p.name: p.read_bytes() for p in (built[0] / "out").iterdir()},
        **mine,
    }


def test_private_is_kept_to(built, corpus, hub, tmp_path):
    before = holding(hub)
    done = push(hub, tmp_path, built[0] / "out", "user/theirs", "--private")
    assert done.returncode == 2 and "user/theirs: is public, not private" in done.stderr
    options = {"export__push_to_hub": "user/theirs", "export__private": True}
    recipe = recipe_for(built[1], corpus, tmp_path, **options)
    early = call(hub, tmp_path, "-m", "spts_compress", "recipe", recipe)
    assert early.returncode == 2 and "is public, not private" in early.stderr and not (tmp_path / "out").exists()
    assert hub.files("user/theirs") == before and hub.private == {"user/theirs": False}
    assert not any("create" not in request for request in hub.requests if request.startswith("POST"))


def test_a_recipe_pushes_what_it_made(built, corpus, hub, tmp_path):
    _, base, _, _ = built
    recipe = recipe_for(base, corpus, tmp_path, export__push_to_hub="user/made", export__private=True)
    early = call(hub, tmp_path, "-m", "spts_compress", "recipe", recipe, token=None)
    assert early.returncode == 2 and "no Hub token" in early.stderr and not (tmp_path / "out.work").exists()
    done = call(hub, tmp_path, "-m", "spts_compress", "recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/user/made" in done.stdout and hub.private == {"user/made": True}
    assert hub.files("user/made") == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_what_the_hub_refuses_is_one_line_and_nothing_is_half_published(built, hub, tmp_path):
    folder = built[0] / "out"
    for options, fail, status, message in (
        ({"token": None}, "", 0, "no Hub token"),
        ({"token": "hf_wrong"}, "", 0, "user/model: not uploaded: the Hub does not accept this token"),
        ({}, "/api/repos/create", 403, "user/model: not uploaded: the token has no right to write there"),
        ({}, "/large/", 400, "user/model: not uploaded: "),
        ({}, "/commit/", 400, "user/model: not uploaded: "),
        ({}, "/commit/", 0, "user/model: not uploaded: "),
    ):
        hub.fail, hub.status = fail, status
        done = push(hub, tmp_path, folder, "user/model", **options)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
        assert "Traceback" not in done.stderr and "hf_" not in done.stdout + done.stderr
        assert not any(hub.files(repo) for repo in hub.repos)
