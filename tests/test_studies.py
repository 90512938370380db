"""The studies' scripts: nothing of others is lost, and what they keep is theirs."""

import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import PROSE, recipe_for
from tiny import stock_twin, tiny_base, tiny_model

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"


@pytest.fixture(autouse=True)
def studies_path(monkeypatch):
    """The studies import each other: `python recipes/studies/x.py` puts their folder first, `runpy` does not; and some
    switch gradients off for good."""
    monkeypatch.setattr(sys, "path", [str(STUDIES), *sys.path])
    with torch.set_grad_enabled(True):
        yield


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


close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.fixture
def peers():
    """The methods, and a tiny stock model with a prompt that is long enough for all of them."""
    import peer_methods

    model = stock_twin(tiny_model(max_position_embeddings=1024))
    return peer_methods, model, torch.randint(3, 97, (1, 600), generator=torch.Generator().manual_seed(0))


def ways(peer, model, ids, half=False):
    """What every method's prefill gives, where it keeps all, or half."""
    share = 0.5 if half else 1.0
    return {
        "plain": peer.plain(model, ids),
        "pop": peer.pop(model, ids, 2 if half else 0, 3),
        "gemfilter": peer.gemfilter(model, ids, 2, share),
        "fastkv": peer.fastkv(model, ids, 2, share),
        "uniprefill": peer.uniprefill(model, ids, 0.3 if half else 2.0),
        "drafted": peer.drafted(model, ids, peer.importance(model, ids), share),
    }


@torch.no_grad()
def test_peers_that_keep_everything_are_the_stock_model_and_go_on_as_it_does(peers):
    peer, model, ids = peers
    later = torch.tensor([[5, 6, 7]])
    expected = model(torch.cat([ids, later], dim=1)).logits[0, -4:]
    for name, (logits, cache, position, _) in ways(peer, model, ids).items():
        assert position == 600, name
        found = torch.cat([logits, peer.extend(model, cache, later, position)])
        close(found, expected, msg=name)


@torch.no_grad()
def test_peers_that_skip_do_what_their_papers_say(peers):
    peer, model, ids = peers
    made = ways(peer, model, ids, half=True)
    caches = {name: cache.layers for name, (_, cache, _, _) in made.items()}
    lengths = {name: [held.keys.shape[2] for held in cache] for name, cache in caches.items()}
    assert lengths["pop"] == [600] * 5 and lengths["gemfilter"] == [300] * 5 and lengths["drafted"] == [312] * 5
    assert lengths["fastkv"] == [600] * 3 + [300] * 2 and made["gemfilter"][2] == 300 and made["fastkv"][2] == 600
    assert lengths["uniprefill"][0] == 600 and 216 <= lengths["uniprefill"][1] < 600
    assert all(flops < made["plain"][3] for name, (_, _, _, flops) in made.items() if name != "plain")
    model.set_attn_implementation("eager")
    out = model.model(ids, output_hidden_states=True, output_attentions=True)

    def values(layer, states):
        return model.model.layers[layer].self_attn.v_proj(model.model.layers[layer].input_layernorm(states))

    def cached(name, layer):
        return caches[name][layer].values[0].transpose(0, 1).flatten(1)

    # POP: what the last layers cache of most tokens is made of the states after the last layer that ran
    close(cached("pop", 4)[:-3], values(4, out.hidden_states[3])[0, :-3])
    # FastKV: the tokens that go on have the most attention of the last 8 queries
    scores = out.attentions[2][0, :, -8:].mean((0, 1))
    pooled = torch.tensor([float(scores[max(0, i - 3) : i + 4].sum()) for i in range(592)] + [float("inf")] * 8)
    chosen = pooled.topk(300).indices.sort().values
    close(cached("fastkv", 3), values(3, out.hidden_states[3][:, chosen])[0])


@torch.no_grad()
def test_steps_after_caches_of_several_lengths_are_the_same_one_by_one_and_at_once(peers):
    peer, model, ids = peers
    later = torch.tensor([[5, 6, 7]])
    for name, (_, cache, position, _) in ways(peer, model, ids, half=True).items():
        together = peer.extend(model, cache, later, position)
        cache.crop(-3)
        single = torch.cat([peer.extend(model, cache, later[:, i : i + 1], position + i) for i in range(3)])
        close(together, single, msg=name)


def test_scores_are_carried_from_one_tokenizer_to_another_by_characters(peers):
    peer = peers[0]
    scores = peer.carried(torch.tensor([1.0, 3.0]), [(0, 2), (2, 4)], [(0, 1), (1, 3), (3, 4), (4, 4)])
    assert scores.tolist() == [1.0, 2.0, 3.0, 0.0]


def test_a_second_look_is_made_anew_for_another_speed_checkpoint_or_text(updating, tmp_path, monkeypatch, capsys):
    peers_beside(tmp_path, "qasper")
    config = json.loads((updating / "config.json").read_text())
    for name, fraction in {"one": 0.4, "other": 0.3}.items():
        shutil.copytree(updating, tmp_path / name)
        config["spts"]["stages"] = [{"end": 4, "budget": {"fraction": fraction}}]
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def plain(checkpoint, speedup, name):
        arguments = [tmp_path / checkpoint, tmp_path, tmp_path / f"{name}.json", "--work", tmp_path / "work"]
        arguments += ["--items", "3-3"]
        arguments += ["--length", "400", "--speedup", speedup]
        monkeypatch.setattr(sys, "argv", ["second_look.py", *map(str, arguments)])
        runpy.run_path(str(STUDIES / "second_look.py"), run_name="__main__")
        [row] = json.loads((tmp_path / f"{name}.json").read_text())
        return row

    first = plain("one", 1.2, "a")
    assert first["index"] == 3 and plain("one", 1.2, "b") == first
    assert plain("one", 1.4, "c") != first and plain("other", 1.2, "d")  # scaled to the same speed
    (tmp_path / "qasper.jsonl").write_text((tmp_path / "qasper.jsonl").read_text().replace("who?", "what?"))
    assert plain("one", 1.2, "e") != first and len(list((tmp_path / "work").iterdir())) == 4


def test_peers_know_a_draft_and_texts_by_what_their_files_hold(tmp_path, updating, monkeypatch, capsys):
    options = [*peers_beside(tmp_path, "qasper"), "--no-scores", "--rounds", "1", "--choose-on", "0", "--ours"]
    draft = shutil.copytree(updating.parent / "base", tmp_path / "draft")

    def keys(name):
        arguments = [updating, tmp_path / f"{name}.json", *options, "--draft", draft]
        monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, arguments)])
        study = runpy.run_path(str(STUDIES / "peers.py"), run_name="__main__")
        prompt = study["to_measure_on"][-1]
        ways = study["speculative"](0.5), study["stock"]("POP", layers=1, tokens=1)
        return [prompt.example.text, *(study["key_of"](way, prompt, False) for way in ways)]

    first = keys("a")
    (draft / "notes.txt").write_text("trained on")
    second = keys("b")
    assert [old == new for old, new in zip(first, second, strict=True)] == [True, False, True]
    (tmp_path / "qasper.jsonl").write_text((tmp_path / "qasper.jsonl").read_text().replace("who?", "what?"))
    assert "what?" in keys("c")[0]


def peers_beside(folder, task):
    """Arguments of a small run of peers.py on needles and a task of LongBench, whose files are put into `folder`."""
    line = {"input": "who?", "answers": ["fox"], "all_classes": None}
    lines = [{**line, "context": f"{n} {PROSE[:500]}"} for n in range(10)]
    (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "dataset2prompt.json").write_text(json.dumps({task: "{context} {input}"}))
    (folder / "dataset2maxlen.json").write_text(json.dumps({task: 6}))
    (folder / "prose.txt").write_text(PROSE)
    options = ["--longbench", folder, "--haystack", folder / "prose.txt", "--work", folder / "work", "--device", "cpu"]
    options += ["--length", "1200", "--tasks", "niah_single_2", "--needles", "1", "--items", "8-9", "--choose-on", "2"]
    return [*options, "--targets", "1.2"]


def test_scores_that_nobody_wants_need_no_package(updating, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)  # can't be imported
    options = [*peers_beside(tmp_path, "gov_report"), "--no-scores", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, [updating, tmp_path / "out.json", *options])])
    runpy.run_path(str(STUDIES / "peers.py"), run_name="__main__")
    ways = {way["method"]: way for way in json.loads((tmp_path / "out.json").read_text())["ways"]}
    for way in ways.values():
        scores = {(row[0], row[2] is None) for row in way["rows"]}
        assert scores == {("gov_report", True), ("niah_single_2", False)}
        assert way["longbench"]["score"] is None and way["needles"]["tasks"]["niah_single_2"]["score"] is not None
    assert ways["FastKV"]["longbench"]["kl"]["mean"] > 0


def test_peers_are_measured_once_and_a_run_goes_on_where_one_stopped(updating, tmp_path, monkeypatch, capsys):
    options = peers_beside(tmp_path, "qasper")
    made = []
    for name in ("a", "b"):
        arguments = [updating, tmp_path / f"{name}.json", *options, "--rounds", "2"]
        monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, arguments)])
        runpy.run_path(str(STUDIES / "peers.py"), run_name="__main__")
        made.append((json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / "work/rows.jsonl").read_text()))
    assert made[0] == made[1]
    ways = {way["method"]: way for way in made[0][0]["ways"]}
    assert {"dense", "SPTS, out", "POP", "GemFilter", "FastKV", "UniPrefill"} <= {*ways}
    assert all(
        way["counted"] == pytest.approx(1.2, abs=0.1) for name, way in ways.items() if name in ("GemFilter", "FastKV")
    )
    assert ways["dense"]["longbench"]["kl"]["mean"] == 0 and ways["FastKV"]["longbench"]["kl"]["mean"] > 0
    assert {choice["method"] for choice in made[0][0]["choices"]} == {"POP", "GemFilter", "FastKV"}
    assert str(tmp_path) not in (tmp_path / "a.json").read_text() + (tmp_path / "a.md").read_text()
