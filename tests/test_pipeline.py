"""The main job on tiny models: from a recipe to a checkpoint that plain transformers loads."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
import yaml
from helpers import contents, recipe_for, run
from safetensors.torch import load_file, save_file
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from spts_compress import pipeline
from spts_compress.recipe import load as load_recipe
from spts_compress.utils import store as store_module
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store, file_hash, writing


def test_the_checkpoint_is_complete(built):
    folder, _, recipe, output = built
    out = folder / "out"
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "skipping.py",
        "configuration_spts.py",
        "README.md",
        "recipe.yaml",
        "tokenizer.json",
    } <= names
    assert not [p for p in folder.iterdir() if p.name.endswith((".new", ".partial", ".old"))]
    assert (out / "recipe.yaml").read_text() == recipe.read_text()
    assert yaml.safe_load((out / "recipe.resolved.yaml").read_text())["calibration"]["seed"] == 0
    assert "dense / SPTS" in output
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["spts"]["start"] == 2
    report = json.loads((out / "spts_report.json").read_text())
    assert list(report["stages"]) == ["model and text", "proxies", "export", "check"]
    assert all(cost["seconds"] > 0 for cost in report["stages"].values())
    assert [f["layer"] for f in report["proxies"]] == [2, 3, 4]
    assert report["speed"][0]["spts"]["kv_bytes"] < report["speed"][0]["dense"]["kv_bytes"]
    assert 350 < report["fidelity"][0]["tokens"] <= 400  # of the prompts, and not of the answers
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "2601.13155" in card


def test_base_weights_are_carried_over_byte_for_byte(built):
    folder, base, _, _ = built
    ours = {file_hash(p) for p in (folder / "out").glob("*.safetensors")}
    assert {file_hash(p) for p in base.glob("*.safetensors")} < ours
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {k: v for p in (folder / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert stored.keys() == index.keys()


def test_a_process_without_this_package_gets_the_same_answer_as_dense_on_a_short_prompt(built, tmp_path):
    folder, base, _, _ = built
    script = f"""
import sys; sys.modules["spts_compress"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder / "out")!r}, trust_remote_code=True)
stock = AutoModelForCausalLM.from_pretrained({str(base)!r})
assert AutoModel.from_pretrained({str(folder / "out")!r}, trust_remote_code=True).layers[2].proxy.down.abs().sum() > 0
for length, equal in ((20, True), (200, False)):
    ids = torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, dense = model(ids, logits_to_keep=1), stock(ids, logits_to_keep=1)
    assert torch.equal(ours.logits, dense.logits) == equal
    made, plain = (m.generate(ids, max_new_tokens=3, do_sample=False) for m in (model, stock))
    assert made.shape[1] > length and (not equal or torch.equal(made, plain))
print("fine")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_inspect_shows_it(built):
    folder, base, _, _ = built
    shown = run("inspect", folder / "out")
    assert "24 of 48" in shown
    assert "spts-proxies.safetensors" in shown
    assert "Measured in bfloat16" in shown and "of disk" not in shown  # which a run needs
    assert "no spts block" in run("inspect", base, code=2)


def test_the_plan_counts_weights_as_they_are_stored(corpus, tmp_path):
    base = tiny_base(tmp_path / "base")
    needs = []
    for dtype in (torch.bfloat16, torch.float32):
        weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        shown = run("recipe", recipe_for(base, corpus, tmp_path), "--dry-run")
        needs.append(float(re.search(r"([\d.]+) KiB of disk", shown)[1]) * 1024)
    tensors = sum(tensor.numel() for tensor in weights.values())
    assert needs[1] - needs[0] == pytest.approx(2 * tensors, rel=0.02)


def test_push_names_what_is_wrong_in_one_line(built, monkeypatch):
    folder, base, _, _ = built
    assert "spts_files.json: missing" in run("push", base, "user/name", code=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("refused"))
    )
    output = run("push", folder / "out", "user/name", code=2)
    assert output.splitlines()[-1] == "error: user/name: not uploaded: refused"


def test_a_checkpoint_is_verified_and_every_change_is_named(built, tmp_path):
    whole = built[0] / "out"
    assert "is whole" in run("verify", whole)
    folder = shutil.copytree(whole, tmp_path / "copy")

    def changed(name, change, message):
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        change(path)
        assert message in run("verify", folder, code=2), message
        path.unlink(missing_ok=True) if before is None else path.write_bytes(before)

    def edit(**values):
        def change(path):
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    def moved(path):
        data = json.loads(path.read_text())
        data["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
        path.write_text(json.dumps(data))

    changed(
        "skipping.py", lambda p: p.write_text(p.read_text() + "# more\n"), "skipping.py: not the code of spts-compress"
    )
    changed("spts-proxies.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-3]), "can't be read")
    changed("modeling_extra.py", lambda p: p.write_text("import os"), "modeling_extra.py: not among the exported files")
    changed("tokenizer.json", Path.unlink, "tokenizer.json: missing")
    changed("config.json", edit(hidden_size=64), "the config asks for")
    changed("config.json", edit(spts={"start": 9}), "config.json: spts.stages is missing")
    changed("model.safetensors.index.json", moved, "../elsewhere.safetensors points outside the folder")
    changed("spts_files.json", edit(sha256={"../x": "0"}), "../x points outside the folder")
    other = lambda path: path.write_text('{"checkpoint": "another"}')  # noqa: E731
    changed("spts_evaluation.json", other, "spts_evaluation.json: of another checkpoint")
    (folder / "README.md").write_text("another card")  # says nothing about what is loaded
    assert "is whole" in run("verify", folder)
    (folder / "config.json").write_text("{}")
    assert "not a checkpoint of spts-compress" in run("strip", folder, "--output", tmp_path / "stock", code=2)
    assert not (tmp_path / "stock").exists()


def test_strip_gives_back_the_stock_checkpoint_byte_for_byte(built, tmp_path):
    folder, base, _, _ = built
    run("strip", folder / "out", "--output", tmp_path / "stock")
    made = {p.name: p.read_bytes() for p in (tmp_path / "stock").iterdir()}
    assert made == {p.name: p.read_bytes() for p in base.iterdir()}
    assert "exists; give another --output" in run("strip", folder / "out", "--output", tmp_path / "stock", code=2)


def test_an_existing_output_is_kept_without_force(built):
    folder, _, recipe, _ = built
    before = file_hash(folder / "out" / "config.json")
    assert "--force" in run("recipe", recipe, code=2)
    assert file_hash(folder / "out" / "config.json") == before


def test_dry_run_prints_the_plan_and_writes_nothing(corpus, tmp_path):
    base = tiny_base(tmp_path / "base")
    before = sorted(p.name for p in tmp_path.iterdir())
    output = run("recipe", recipe_for(base, corpus, tmp_path), "--dry-run")
    assert "24 of 48" in output
    assert "needs" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "recipe.yaml"])


def test_bad_input_gets_one_clear_line_and_no_traceback(corpus, tmp_path):
    base = tiny_base(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jsonl").write_text('{"text": "fine"}\n{"txt": 3}\n')
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "x.txt").write_text("too short")

    def fails(needle, *edits, **changes):
        output = run("recipe", recipe_for(base, corpus, tmp_path, **changes), *edits, code=2)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, output
        assert needle in lines[0]
        assert "Traceback" not in output

    fails("no text in", calibration__path=str(tmp_path / "empty"))
    fails("x.jsonl:2:", calibration__path=str(tmp_path / "bad"))
    fails("only", calibration__path=str(tmp_path / "short"))
    fails("does not exist", calibration__path=str(tmp_path / "nowhere"))
    copied = shutil.copytree(corpus, tmp_path / "copied")
    for text in (copied, corpus, corpus / "documents.jsonl"):
        fails(f"report.text: the calibration fits on 6 of the 12 documents in {text}", report__text=str(text))
    rows = [json.loads(line) for line in (corpus / "documents.jsonl").read_text().splitlines()]
    columns = tmp_path / "columns.jsonl"
    columns.write_text("\n".join(json.dumps({"text": f"A title. {r['text']}", "body": r["text"]}) for r in rows))
    calibration = {"calibration__path": str(columns), "report__text": str(columns)}
    fails("report.text: the calibration fits on", "--set", "calibration.column=body", **calibration)
    other = tmp_path / "other.jsonl"  # what was fitted on is the text of prompts, beside other text
    other.write_text("\n".join(json.dumps({"text": r["text"], "body": f"{n} words"}) for n, r in enumerate(rows)))
    calibration = {"calibration__path": str(columns), "report__text": str(other)}
    fails("report.text: the calibration fits on", "--set", "calibration.column=body", **calibration)
    fails("model.path", model__path=str(tmp_path / "nowhere"))
    fails("schedule.stages.0.end is 9; it must be 2 to 4", "--set", "schedule.stages=[{end: 9, budget: 20}]")
    fails("--device", "--device", "nonsense")
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails("damaged or cut short", model__path=str(tmp_path / "cut"))
    shutil.copyfile(base / "model.safetensors", weights)
    (tmp_path / "cut" / "README.md").write_text("---\nlicense: [mit\n---\n")
    fails("README.md: its metadata can't be read: ", model__path=str(tmp_path / "cut"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    fails("family gpt2 is not supported; supported are ", model__path=str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    fails("family gemma2 is not supported", model__path=str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text("{")
    fails("config.json: can't be read", model__path=str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    fails("not a usable configuration", model__path=str(tmp_path / "other"))


def test_a_killed_run_goes_on_and_ends_in_the_same_checkpoint(built, corpus, tmp_path):
    folder, base, _, _ = built
    recipe = recipe_for(base, corpus, tmp_path)
    for wait in ("proxy-2-*", "proxy-4-*"):
        process = warm.start("-m", "spts_compress", "recipe", recipe, cwd=tmp_path)
        while not list((tmp_path / "out.work").glob(wait)) and process.running():
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.spts-compress" / "new").is_dir()  # which the next run clears away
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work").glob("proxy-*.safetensors")}
    assert kept
    run("recipe", recipe)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out", "out.work"]
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert contents(tmp_path / "out") == contents(folder / "out")


def test_a_run_killed_at_random_moments_ends_in_the_same_checkpoint(built, corpus, tmp_path):
    folder, base, _, _ = built
    recipe = recipe_for(base, corpus, tmp_path)
    draw = random.Random(0)
    for _ in range(3):
        process = warm.start("-m", "spts_compress", "recipe", recipe, cwd=tmp_path)
        while not (tmp_path / "out.work").exists() and process.running():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))  # somewhere between the first unit and the finished checkpoint
        process.kill()
    run("recipe", recipe, "--force")
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out", "out.work"]
    assert contents(tmp_path / "out") == contents(folder / "out")


def test_a_second_run_in_the_same_folder_stops(built, corpus, tmp_path):
    _, base, _, _ = built
    recipe = recipe_for(base, corpus, tmp_path)
    with Store(tmp_path / "out.work").lock():
        assert "another run is using this work folder" in run("recipe", recipe, code=2)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(built, corpus, tmp_path, monkeypatch):
    _, base, _, _ = built
    recipe = recipe_for(base, corpus, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    assert "no space left on the disk" in run("recipe", recipe, code=2)
    assert not (tmp_path / "out.work").exists()
    monkeypatch.undo()
    run("recipe", recipe)


def test_writing_leaves_the_old_file_when_it_fails(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), writing(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_damaged_unit_is_made_anew(tmp_path):
    store = Store(tmp_path)
    store.put_tensors("unit", "key", {"a": torch.ones(3)})
    path = store.path("unit", "key", ".safetensors")
    path.write_bytes(path.read_bytes()[:-2])
    assert store.tensors("unit", "key") is None


def test_a_unit_that_can_not_be_read_now_stays(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put_tensors("unit", "key", {"a": torch.ones(3)})

    def too_many_open_files(path):
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors says it

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "load_file", too_many_open_files)
        with pytest.raises(UserError, match=r"unit-key\.safetensors: can't be read now: .*; it is kept, so run again"):
            store.tensors("unit", "key")
    assert store.tensors("unit", "key") is not None


def test_reload_of_a_saved_checkpoint_is_exact(built, tmp_path):
    folder, _, _, _ = built
    model = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(ids, logits_to_keep=1).logits, model(ids, logits_to_keep=1).logits)
    assert again.config.spts == model.config.spts


def test_a_finished_run_forgets_its_own_times_alone(tmp_path):
    store, other = Store(tmp_path), Store(tmp_path)
    (tmp_path / "speed-mine.json").write_text("[]")
    other.json("speed-512", "b" * 16, list)
    store.json("speed-512", "a" * 16, list)
    store.json("needle-0", "a" * 16, list)
    store.forget("speed")
    assert {path.name for path in tmp_path.iterdir()} == {
        "speed-mine.json", f"speed-512-{'b' * 16}.json", f"needle-0-{'a' * 16}.json"
    }  # fmt: skip


def test_short_prompts_run_dense_up_to_the_break_even_that_was_timed(built, corpus, tmp_path, monkeypatch):
    _, base, _, _ = built
    recipe, timed = recipe_for(base, corpus, tmp_path), []
    text = recipe.read_text()
    monkeypatch.setattr(
        "spts_compress.pipeline.shortest_paying_length", lambda dense, spts: timed.append(type(spts)) or 128
    )
    prepare = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *given: recipe.write_text(text + "# later\n") and prepare(*given))
    run("recipe", recipe, "--set", "export.break_even=true")
    assert (tmp_path / "out/recipe.yaml").read_text() == "# --set export.break_even=true\n" + text
    run("recipe", recipe, "--set", "export.break_even=true", "--force")
    assert len(timed) == 2 and "spts" in timed[0].__module__  # anew: the machine may have been busy
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.spts["min_length"] == 128
    ids = torch.randint(3, 300, (1, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length, dense in ((127, True), (128, False)):
            skipped, plain = (model(ids[:, :length], logits_to_keep=1, spts=spts).logits for spts in (None, False))
            assert torch.equal(skipped, plain) is dense
    resolved = load_recipe(tmp_path / "out" / "recipe.resolved.yaml")
    assert resolved.schedule["min_length"] == 128 and not resolved.export.break_even


def test_a_searched_schedule_is_exported_and_its_figures_are_kept(corpus, tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base", tie_word_embeddings=False)
    search = {"speedup": 1.15, "lengths": [600], "kinds": ["free"], "prompts": 2, "answer_tokens": 8, "starts": [2, 3]}
    path = recipe_for(base, corpus, tmp_path)
    data = yaml.safe_load(path.read_text())
    del data["schedule"]
    search["choices"] = {"ffn_selection": ["relative"]}  # so that proxies are used
    path.write_text(yaml.safe_dump({**data, "search": {**search, "candidates": 4, "rounds": 1}}))
    assert "search    speedup 1.15; 4 candidates and 1 rounds of 2" in run("recipe", path, "--dry-run")
    run("recipe", path)
    found = json.loads((tmp_path / "out.search/search.json").read_text())
    [point] = found["points"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["spts"] == point["winner"]["schedule"] and point["cost"]["speedup"] >= 1.15
    assert point["held_out"]["prompts"] == 2 and found["evaluations"] > 8
    assert "## Search" in (tmp_path / "out/README.md").read_text() and (tmp_path / "out/search.png").is_file()
    assert "next token as dense" in run("inspect", tmp_path / "out")
    # prompts were of all documents, those that nothing was fitted on
    assert len(json.loads((tmp_path / "out/spts_report.json").read_text())["fitted_on"]) == 12
    weights = {p.name: file_hash(p) for p in (tmp_path / "out").glob("*.safetensors")}

    with monkeypatch.context() as patch:  # what was evaluated is not evaluated again, and the choice is the same
        patch.setattr("spts_compress.search.evaluator.compare", lambda *_: 1 / 0)
        run("recipe", path, "--force")
    assert json.loads((tmp_path / "out/spts_report.json").read_text())["stages"] == {}  # of that run they'd say nothing
    again = json.loads((tmp_path / "out.search/search.json").read_text())
    assert again["evaluations"] == found["evaluations"] and again["points"] == found["points"]
    assert {p.name: file_hash(p) for p in (tmp_path / "out").glob("*.safetensors")} == weights

    resolved = tmp_path / "again.yaml"  # the schedule that was found, without its search
    resolved.write_text((tmp_path / "out/recipe.resolved.yaml").read_text())
    assert "may choose other sizes" in resolved.read_text() or config["spts"]["proxy"] is None
    assert "skips from layer" in run("recipe", resolved, "--dry-run")
    run("recipe", resolved, "--output", tmp_path / "again")
    proxies = [json.loads((tmp_path / name / "spts_report.json").read_text())["proxies"] for name in ("out", "again")]
    assert len(proxies[0]) == 5 - config["spts"]["start"]
    names = "layer", "share", "input_norm"  # judged by the schedule that was found
    assert [[fit[n] for n in names] for fit in proxies[0]] == [[fit[n] for n in names] for fit in proxies[1]]

    assert [p.name for p in (tmp_path / "out.search").glob("search*.json")] == ["search.json"]
    run("recipe", path, "--force", "--set", "search.speedup=1.1")  # what another search found moves aside
    assert json.loads((tmp_path / "out.search/search-1.json").read_text()) == again

    front = run(
        "recipe", path, "--force", "--set", "search.speedup=null", "--set", "search.speedups=[1.1, 1.15]", code=2
    )
    assert "search has no target, so nothing is exported" in front and "1.15x has" in front
    missed = run("recipe", path, "--force", "--set", "search.quality=1.0", "--set", "search.speedup=2.5", code=2)
    assert "no schedule meets the target" in missed
    (tmp_path / "out/README.md").write_text("my card")
    edits = [f"--set=search.{edit}" for edit in ("quality=1.0", "speedup=1.4", "on_failure=export")]
    assert "out: README.md changed since the export" in run("recipe", path, "--force", *edits, code=2)
    (tmp_path / "out/README.md").unlink()
    nearest = run("recipe", path, "--force", *edits)
    for said in (nearest, run("inspect", tmp_path / "out"), (tmp_path / "out/README.md").read_text()):
        assert "no schedule meets the target of quality 1; by search.on_failure the nearest is exported: 0." in said
    for edit, message in (
        ("schedule={start: 2}", "has both schedule and search; give one of them, or none"),
        ("search.lengths=[9999]", "search.lengths: 9999 is more than the model's context of 2048"),
        ("search.starts=[5]", "search.starts: 5 is out of range; it must be 1 to 4"),
        ("search.kinds=[multi-hop]", "does not fit into 600 tokens"),
        ("search.kv_share=0.5", "takes one of speedup and kv_share, not both"),
    ):
        assert message in run("recipe", path, "--force", "--set", edit, code=2)


MAPPED = """
import sys
from pathlib import Path
from spts_compress.calibrate.base_model import resolve
from spts_compress.recipe import ModelSection
from spts_compress.utils.store import Store
base = resolve(ModelSection(path=sys.argv[1]), Store(Path(sys.argv[2])))
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = anonymous()
model = base.load("bfloat16", "cpu")
total = sum(float(p.detach().sum()) for p in model.parameters())  # all pages are read
print(sum((base.folder / name).stat().st_size for name in base.weights), anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_weights_are_pages_of_their_files_and_not_copies(tmp_path):
    base = tiny_base(tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=5)
    done = warm.run("-c", MAPPED, base, tmp_path / "work")
    assert done.returncode == 0, done.stderr
    weights, grown = map(int, done.stdout.split())
    assert weights > 100e6 and grown < weights / 2, (weights, grown)
