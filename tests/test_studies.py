"""The studies' scripts: nothing of others is lost, and what they keep is theirs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from helpers import recipe_for
from tiny import tiny_base

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


BEFORE_OUT = {
    "front": 3,
    "budgets": 3,
    "families": 1,
    "offline_costs": 1,
    "memory_curve": 2,
    "random_schedules": 3,
    "peers": 1,
    "second_look": 2,
    "decoding": 0,
}


@pytest.mark.parametrize("study", BEFORE_OUT)
@pytest.mark.parametrize("there", ["out.json", "out.md"])
def test_a_study_overwrites_nothing(study, there, refused, tmp_path):
    (tmp_path / there).write_text("mine")
    arguments = [tmp_path / "nothing"] * BEFORE_OUT[study] + [tmp_path / "out.json"]
    line = refused(f"{study}.py", *arguments, *[tmp_path / "search.json"] * (study == "front"))
    assert f"{there} exists" in line and [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("out", ["notes.md", "notes", "nowhere/out.json"])
def test_a_study_says_at_its_start_where_it_can_not_write(out, refused, tmp_path):
    assert str(tmp_path / out) in refused("offline_costs.py", "model", tmp_path / out)


def test_shards_of_updates_stay_and_only_they_are_merged(refused, tmp_path):
    row = {"task": "qa", "index": 0, "length": 4096, "ways": {}}
    for name, rows in (("s0.json", [row]), ("s1.json", [row]), ("other.json", {"rows": []})):
        (tmp_path / name).write_text(json.dumps(rows))
    shards, out = [tmp_path / "s0.json", tmp_path / "s1.json"], tmp_path / "out.json"
    assert "s1.json exists" in refused("updates.py", "c", "o", *shards)
    for stranger in ("other.json", "missing.json", "."):
        line = refused("updates.py", "c", "o", *shards, tmp_path / stranger, out)
        assert f"{tmp_path / stranger}: no file that a shard" in line
    assert "have a prompt in common" in refused("updates.py", "c", "o", *shards, out)
    assert json.loads(shards[1].read_text()) == [row] and not out.exists()


def test_tiny_gpu_results_have_a_folder_of_their_own_and_no_result_is_replaced(refused, monkeypatch, tmp_path):
    arguments = ["profile", "--out", "a", "--models", "llama-3.1-8b", "--tiny"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    study = runpy.run_path(str(STUDIES / "gpu.py"))
    own = study["main"].__globals__
    for name, made in (("check", None), ("build", (None, None)), ("prompts", None)):
        monkeypatch.setitem(own, name, lambda *_, made=made, **__: made)
    rows = {"wall_ms": 1, "busy_ms": 1, "host_waits": {}, "kernels": []}
    monkeypatch.setitem(own, "profile", lambda *_: rows)
    study["main"]()
    [path] = tmp_path.rglob("*.json")
    assert path.relative_to(tmp_path).as_posix() == "a/llama-3.1-8b-tiny/profile.json"
    assert json.loads(path.read_text())["command"] == (
        "python recipes/studies/gpu.py profile --out DIR --models llama-3.1-8b "
        "--lengths 8192,16384,32768,65536,131072 --pairs 5 --tiny"
    )
    assert f"a/llama-3.1-8b-tiny/{path.name} exists" in refused("gpu.py", "batch", *arguments)
    assert "unknown stage x; there are headline, ablation" in refused("gpu.py", "x", "--out", "a")


def test_decoding_is_timed_to_all_numbers_of_tokens_with_dynamic_and_with_compiled_static_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--models", "qwen2.5-0.5b", "--lengths", "100", "--new-tokens", "3,5", "--rounds", "2", "--tiny"]
    monkeypatch.setattr(sys, "argv", ["decoding.py", str(tmp_path / "o.json"), *arguments, "--backend", "eager"])
    runpy.run_path(str(STUDIES / "decoding.py"), run_name="__main__")
    result, text = json.loads((tmp_path / "o.json").read_text()), (tmp_path / "o.md").read_text()
    assert (
        result["command"]
        == f"python recipes/studies/decoding.py OUT.json {' '.join(arguments[:-1])} --backend eager --tiny"
    )
    [row] = result["rows"]
    for way, graphs in (("dense", 0), ("SPTS", 0), ("dense static", 1), ("SPTS static", 1)):
        assert f"| {way} " in text and row["ways"][way]["graphs"]["made"] == graphs
        for round in zip(*row["ways"][way]["seconds"].values(), strict=True):
            assert len(round) == 3 and sorted(round) == list(round)


SCHEDULE = {"start": 2, "stages": [{"end": 4, "budget": {"fraction": 0.4}}], "ffn_selection": "attention"}


def random_schedules(folder, recipe, out):
    study = STUDIES / "random_schedules.py"
    paths = recipe, folder / "work", folder / "search.json", folder / out
    sys.argv = [str(study), *map(str, paths), "--count", "1", "--prompts", "1"]
    runpy.run_path(str(study), run_name="__main__")
    return json.loads((folder / out).read_text())["rows"]


def test_random_schedules_have_the_counted_cost_and_figures_of_the_proxies_that_are_there(
    corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [])
    search = {"speedup": 1.1, "cost": "measured", "lengths": [600], "kinds": ["free"], "answer_tokens": 8}
    point = {"winner": {"schedule": SCHEDULE, "params": {}, "cost": {"speedup": 1.4, "flop_speedup": 1.15}}}
    (tmp_path / "search.json").write_text(json.dumps({"points": [point]}))
    recipe = recipe_for(tiny_base(tmp_path / "base"), corpus, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    data |= {"search": {**search, "prompts": 1, "starts": [2], "candidates": 4, "rounds": 0}, "schedule": None}
    for number, rank in enumerate((4, 3)):
        data["proxy"] = {"channels": 12, "rank": rank, "max_flop_fraction": 1.0, "steps": 5, "regression": False}
        recipe.write_text(yaml.safe_dump(data))
        rows = random_schedules(tmp_path, recipe, f"{number}.json")
        assert all(row["cost"]["speedup"] == pytest.approx(1.15, abs=0.02) for row in rows if row["name"] != "searched")
        assert len(rows) > 1 and len(list((tmp_path / "work").glob("random-*.jsonl"))) == number + 1


@pytest.mark.parametrize("study", ["front", "budgets"])
def test_a_study_keeps_figures_under_all_that_they_depend_on(study):
    """What `Prepared.key` is made of, and not a part of it."""
    assert "fingerprint(ready.key(" in (STUDIES / f"{study}.py").read_text()
