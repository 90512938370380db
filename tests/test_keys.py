"""Whatever decides an answer is in the key that it is kept under, and nothing else is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import TEXT
from tiny_checkpoint import BLOCK, tiny_checkpoint

from spts_compress import pipeline
from spts_compress.calibrate import base_model
from spts_compress.calibrate.base_model import resolve
from spts_compress.checkpoint import keys
from spts_compress.checkpoint.keys import environment, folder_key, tensors_key
from spts_compress.cli import main
from spts_compress.evaluate import suites
from spts_compress.export.verify import verify
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ModelSection, Recipe
from spts_compress.tasks import runner
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("keys")).parent


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def edit(**values):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def more(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n")


def weights(path):
    """One bit of one tensor, in place: neither size nor name changes."""
    tensors = load_file(path)
    first = next(iter(sorted(tensors)))
    tensors[first] = tensors[first].clone()
    tensors[first].view(torch.uint8)[..., :1] ^= 1
    save_file(tensors, path, {"format": "pt"})


DECIDE = {  # what decides dense answers, too
    "config.json": edit(rope_theta=7),
    "generation_config.json": edit(repetition_penalty=5.0),
    "tokenizer.json": more,
    "tokenizer_config.json": edit(padding_side="left"),
    "chat_template.jinja": more,
    "additional_chat_templates/tool.jinja": more,
    "special_tokens_map.json": more,
    "tokenization_own.py": more,
    "helper_of_it.py": more,
    "words.tiktoken": more,
    "spiece.model": more,
    "merges.txt": more,
    **dict.fromkeys(("rules.yaml", "words.bin", "words.jsonl", "words.csv"), more),
}
NOTHING = [
    "README.md", "README_zh.md", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "spts_report.json", "spts_evaluation.json",
    "spts_files.json", "recipe.yaml", "search.png", ".gitattributes", "pytorch_model.bin", "model.gguf", "runs/log",
    "notes.md",
]  # fmt: skip


@pytest.mark.parametrize("name", DECIDE)
def test_what_decides_changes_every_key(name, folder):
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    before = base.key, folder_key(folder / "out"), folder_key(folder / "out", dense=True)
    for place in ("base", "out"):
        DECIDE[name](folder / place / name)
    listed = json.loads((folder / "out/spts_files.json").read_text())
    edit(sha256={**listed["sha256"], name: "0"})(folder / "out/spts_files.json")  # as what the tokenizer reads is
    assert base.key == before[0]  # as it was
    after = base.key_now(), folder_key(folder / "out"), folder_key(folder / "out", dense=True)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_what_an_export_lists_in_a_subfolder_changes_its_keys(folder):
    out = folder / "out"
    (out / "words").mkdir()
    (out / "words/of.it").touch()
    listed = json.loads((out / "spts_files.json").read_text())
    unlisted = folder_key(out)
    edit(sha256={**listed["sha256"], "words/of.it": "0", "../base/config.json": "0"})(out / "spts_files.json")
    before = folder_key(out), folder_key(out, dense=True)
    more(out / "words/of.it")
    more(folder / "base/config.json")
    assert len({unlisted, before[0], folder_key(out)}) == 3 and folder_key(out, dense=True) != before[1]


@pytest.mark.parametrize("name", NOTHING)
def test_what_only_tells_changes_none(name, folder):
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    before = base.key, folder_key(folder / "out"), folder_key(folder / "out", dense=True)
    for place in ("base", "out"):
        more(folder / place / name)
    assert before == (base.key_now(), folder_key(folder / "out"), folder_key(folder / "out", dense=True))


@pytest.mark.parametrize("name", ["notes.md", "results.csv", "prompts.jsonl", "plot.png", "bench.json"])
def test_what_verify_takes_for_a_note_changes_no_key(name, folder):
    out = folder / "out"
    before = folder_key(out), folder_key(out, dense=True)
    unchanged = keys.watch(out, [])
    (out / name).write_text("mine")
    assert verify(out) == [] and before == (folder_key(out), folder_key(out, dense=True))
    unchanged()


def test_weights_change_every_key_and_links_none(folder):
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    out, link = folder / "out", folder / "link"
    before = base.key, folder_key(out), folder_key(out, dense=True)
    link.mkdir()
    for path in out.iterdir():  # as the Hub's cache has them
        (link / path.name).symlink_to(path)
    assert (folder_key(link), folder_key(link, dense=True)) == before[1:]
    weights(folder / "base/model.safetensors")
    weights(out / "base_model.safetensors")
    assert base.key_now() != before[0]
    assert folder_key(out) != before[1] and folder_key(out, dense=True) != before[2]
    assert folder_key(link) == folder_key(out)


def test_dense_answers_depend_on_nothing_of_the_skipping(folder):
    out = folder / "out"
    before = folder_key(out), folder_key(out, dense=True)

    def index(path):
        data = json.loads(path.read_text())
        data["weight_map"]["model.layers.4.proxy.more"] = "spts-proxies.safetensors"
        path.write_text(json.dumps({**data, "metadata": {"total_size": 3}}))

    block = json.loads((out / "config.json").read_text())["spts"]
    found = {before[0]}
    for name, change in (
        ("config.json", edit(spts={**block, "recent_tokens": 9})),
        ("spts-proxies.safetensors", weights),
        ("model.safetensors.index.json", index),
    ):
        change(out / name)
        assert folder_key(out, dense=True) == before[1]
        found.add(folder_key(out))
    assert len(found) == 4


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy"])
def test_versions_are_in_the_environment(package, monkeypatch):
    before = environment()
    environment.cache_clear()
    version = keys.version
    monkeypatch.setattr(keys, "version", lambda name: "0.0" if name == package else version(name))
    if package == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    changed = environment()
    monkeypatch.undo()
    environment.cache_clear()
    assert f"{package} 0.0" in changed and environment() == before != changed


def test_the_code_is_in_the_environment(monkeypatch, tmp_path):
    before = environment()
    copy = shutil.copytree(Path(keys.__file__).parent.parent, tmp_path / "copy")
    monkeypatch.setattr(keys, "__file__", str(copy / "checkpoint/keys.py"))
    found = []
    for name in (None, "tasks/runner.py", "modeling/selection.py", "plan.py"):
        if name:
            (copy / name).write_text((copy / name).read_text() + "# another\n")
        environment.cache_clear()
        found.append(environment())
    monkeypatch.undo()
    environment.cache_clear()
    assert found[0] == before and len(set(found)) == 4


def test_tensors_are_told_apart_by_name_type_shape_and_order():
    one = torch.tensor([1.0, 2.0])
    others = [
        {"b": one}, {"a": one.flip(0)}, {"a": one.double()}, {"a": one[None]}, {"a": one, "b": one}, {"a": one + 1e-6},
    ]  # fmt: skip
    assert len({tensors_key(made) for made in [{"a": one}, *others]}) == 7
    assert tensors_key({"a": one, "b": one}) == tensors_key({"b": one.clone(), "a": one})


def recipe_of(folder, **changes):
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {n}. {TEXT * 3} Ends at {n}."}) + "\n" for n in range(8))
    )
    data = {
        "model": {"path": str(folder / "base")},
        "calibration": {"source": "files", "path": str(folder / "text.jsonl"), "tokens": 600, "length": 64},
        "proxy": {"channels": 4, "rank": 1, "max_flop_fraction": 1.0, "steps": 1},
        "schedule": {"start": 4, "stages": [{"end": 4, "budget": 24}]},
        "report": {"lengths": [300], "needles": 1, "answers": 1, "quality_length": 400},
        "export": {"path": str(folder / "new")},
        **changes,
    }
    return Recipe.model_validate(data)


def test_proxies_are_fitted_anew_for_another_model_or_program_only(folder, monkeypatch):
    def fitted():
        pipeline.prepare(recipe_of(folder), Store(folder / "work"), "cpu")
        return len(list((folder / "work").glob("proxy-4-*.safetensors")))

    assert fitted() == 1
    more(folder / "base/README.md")
    assert fitted() == 1
    edit(rope_parameters={"rope_type": "default", "rope_theta": 20.0})(folder / "base/config.json")
    assert fitted() == 2
    weights(folder / "base/model.safetensors")
    assert fitted() == 3
    monkeypatch.setattr(pipeline, "environment", lambda: "another")
    assert fitted() == 4


def test_measurements_of_the_report_and_the_break_even_are_made_anew(folder, monkeypatch):
    """For another model, dtype, machine, program, proxy or schedule; what is measured is replaced by a count."""
    count = [0]

    def measured(*_):
        count[0] += 1
        return count[0]

    monkeypatch.setattr(pipeline.write, "load", lambda *_: None)
    monkeypatch.setattr(pipeline, "stock_twin", lambda _: None)
    monkeypatch.setattr(pipeline, "measure_all", lambda *values: values[-1]("speed", measured))
    monkeypatch.setattr(pipeline, "shortest_paying_length", measured)
    machine = {"device": "a CPU"}
    monkeypatch.setattr(pipeline, "hardware", lambda _: machine)
    store, proxies = Store(folder / "work"), {"a": torch.ones(2)}

    def key(dtype="bfloat16", block=BLOCK, **changes):
        base = resolve(ModelSection(path=str(folder / "base")), store)
        recipe = recipe_of(folder, model={"path": str(folder / "base"), "dtype": dtype}, **changes)
        monkeypatch.setattr(pipeline, "replace", lambda _, min_length: min_length)
        ready = SimpleNamespace(
            recipe=recipe,
            base=base,
            tokenizer=None,
            haystack="prose",
            model=SimpleNamespace(dtype=getattr(torch, dtype)),
            schedule=Schedule.from_dict(block, 5),
            parameters=proxies,
            skipping=lambda: None,
        )
        return pipeline._measure(ready, folder, "cpu", store), pipeline._from_break_even(ready, "cpu", store, print)

    first = key()
    more(folder / "base/README.md")
    assert key() == first
    found = [first, key("float32"), key(block={**BLOCK, "recent_tokens": 3})]
    edit(repetition_penalty=5.0)(folder / "base/generation_config.json")
    found.append(key())
    more(folder / "base/chat_template.jinja")
    found.append(key())
    machine["device"] = "another"
    found.append(key())
    monkeypatch.setattr(pipeline, "environment", lambda: "another")
    found.append(key())
    assert all(len(set(numbers)) == len(found) for numbers in zip(*found, strict=True))
    proxies["a"] = torch.tensor([0.5, 1.5])  # the same sum
    assert key()[0] not in {report for report, _ in found}


def test_evaluations_of_a_search_are_made_anew_for_another_model_or_program(folder, monkeypatch):
    seen = []

    def search(model, whole, asked, store, key, say, ranks):
        seen.append(key)
        raise UserError("far enough")

    monkeypatch.setattr(pipeline.searching, "run", search)
    recipe = recipe_of(
        folder, schedule=None, search={"speedup": 1.1, "lengths": [512], "prompts": 1, "kinds": ["free"], "starts": [4]}
    )

    def key():
        with pytest.raises(UserError, match="far enough"):
            pipeline.run(recipe, "", folder / "new", work=folder / "work", log=lambda _: None)
        return seen[-1]

    first = key()
    more(folder / "base/README.md")
    assert key() == first
    edit(repetition_penalty=5.0)(folder / "base/generation_config.json")
    second = key()
    monkeypatch.setattr(pipeline, "environment", lambda: "another")
    assert len({first, second, key()}) == 3
    assert not (folder / "new").exists() and not (folder / "new.search").exists()


def test_an_evaluation_that_goes_on_has_the_answers_of_a_new_one(folder, monkeypatch):
    (folder / "prose.txt").write_text(TEXT * 80)

    def answered(output):
        options = ["--suite", "ruler", "--task", "niah_single_1", "--items", 1, "--lengths", 600, "--dtype", "float32"]
        options += ["--haystack", folder / "prose.txt", "--output", folder / output]
        done = CliRunner().invoke(main, ["evaluate", *map(str, [folder / "out", *options])])
        assert done.exit_code == 0, (done.output, done.exception)
        lines = (folder / output / "answers.jsonl").read_text().splitlines()
        wanted = json.loads((folder / output / "setting.json").read_text())["answers"]
        rows = {row["key"]: row["answer"] for row in map(json.loads, lines)}
        return len(lines), [rows[key] for mode in ("dense", "spts") for key in wanted[mode]]

    count, first = answered("results")
    assert count == 2
    more(folder / "out/README.md")
    assert answered("results") == (2, first)
    edit(repetition_penalty=5.0)(folder / "out/generation_config.json")
    count, second = answered("results")
    assert count == 4 and first != second == answered("fresh")[1]
    block = json.loads((folder / "out/config.json").read_text())["spts"]
    edit(spts={**block, "recent_tokens": 9})(folder / "out/config.json")
    count, third = answered("results")
    assert count == 5 and third[0] == second[0]  # dense did not change
    how = suites.computed_how(SimpleNamespace(
        dtype=torch.float32, device=torch.device("cpu"), config=SimpleNamespace(_attn_implementation="sdpa")
    ))  # fmt: skip
    now = suites.mode_keys(suites.FolderKeys(folder / "out"), how)
    assert now == json.loads((folder / "results/setting.json").read_text())["keys"]
    for number in range(len(how)):  # each of them counts
        changed = [*how[:number], "another", *how[number + 1 :]]
        assert suites.mode_keys(suites.FolderKeys(folder / "out"), changed) != now


@pytest.mark.parametrize("moment", ["load", "_try_forward"])
def test_nothing_is_kept_of_a_base_that_changes_before_or_after_it_is_loaded(moment, folder, monkeypatch):
    place, file = (base_model.Base if moment == "load" else pipeline), folder / "base/model.safetensors"
    whole, before = getattr(place, moment), file.read_bytes()

    def changed(*arguments):
        file.write_bytes(before[:-4000] + bytes(4000))  # in place
        return whole(*arguments)

    def fitted(work):
        return tensors_key(pipeline.prepare(recipe_of(folder), Store(folder / work), "cpu").parameters)

    with monkeypatch.context() as patch:
        patch.setattr(place, moment, changed)
        with pytest.raises(UserError, match="base was changed during the run"):
            fitted("work")
    assert not list((folder / "work").glob("*"))
    file.write_bytes(before)
    assert fitted("work") == fitted("fresh")


def test_answers_of_a_checkpoint_that_changes_during_its_evaluation_are_not_kept(folder, monkeypatch):
    (folder / "prose.txt").write_text(TEXT * 80)
    file, whole, count = folder / "out/base_model.safetensors", runner.answers, [0]
    before = file.read_bytes()

    def evaluated(output, code=0):
        options = ["--suite", "ruler", "--task", "niah_single_1", "--items", 2, "--lengths", 600, "--dtype", "float32"]
        options += ["--haystack", folder / "prose.txt", "--output", folder / output]
        done = CliRunner().invoke(main, ["evaluate", *map(str, [folder / "out", *options])])
        assert done.exit_code == code, done.output
        rows = (folder / output / "answers.jsonl").read_text().splitlines()
        return done.output, {row["key"]: row["answer"] for row in map(json.loads, rows)}

    def changed(*arguments, **options):
        count[0] += 1
        if count[0] == 3:
            file.write_bytes(before[:-4000] + bytes(4000))
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answers", changed)
        said, kept = evaluated("results", code=2)
    assert "out was changed during the run" in said and len(kept) == 2
    file.write_bytes(before)
    assert evaluated("results")[1] == evaluated("fresh")[1]


def test_updates_are_fitted_anew_where_other_layers_skip(folder):
    def fitted(lengths):
        stages = [{"end": 3, "budget": 400}, {"end": 4, "budget": 40}]
        block = {"start": 2, "stages": stages, "ffn_selection": "attention"}
        block["update"] = {"attention_rank": 1, "ffn_rank": 0}
        report = {"lengths": lengths, "needles": 1, "answers": 1, "quality_length": 400}
        recipe, store = recipe_of(folder, schedule=block, report=report), Store(folder / "work")
        pipeline._with_updates(pipeline.prepare(recipe, store, "cpu"), store)
        return len(list((folder / "work").glob("updates-*")))

    assert [fitted([300]), fitted([300, 450]), fitted([450])] == [1, 2, 2]


@pytest.mark.parametrize("documents", [8, 1])  # one is cut into pieces, of which some are fitted on
def test_a_report_on_the_text_that_was_searched_on_knows_it(folder, documents):
    search = {"speedup": 1.1, "lengths": [512], "prompts": 1, "kinds": ["free"], "starts": [4]}
    recipe, text = recipe_of(folder, schedule=None, search=search), folder / "text.jsonl"
    if documents == 1:
        text.write_text(json.dumps({"text": " ".join(json.loads(line)["text"] for line in text.open())}))
    assert pipeline.prepare(recipe, Store(folder / "work"), "cpu").same_text
