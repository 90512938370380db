"""What all measurements share: tables declared by column, pictures in one style, ways of answering, and the card."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import run
from tiny import SCHEDULE, tiny_model

from spts_compress.evaluate import columns, suites
from spts_compress.export import card
from spts_compress.recipe import load_study
from spts_compress.tasks.example import hide
from spts_compress.timing import pairs
from spts_compress.utils import tables
from spts_compress.utils.errors import UserError


def test_a_table_shows_rows_as_its_columns_declare():
    shown = {"name": "{name}", "first": "{times[0]:.1f} s", "sum": lambda row: sum(row["times"])}
    rows = [{"name": "dense", "times": [1.0, 2.5]}, {"name": "SPTS", "times": [0.25, 1.0]}]
    assert tables.columns_table(shown, rows).splitlines() == [
        "| name  | first | sum  |",
        "|-------|-------|------|",
        "| dense | 1.0 s | 3.5  |",
        "| SPTS  | 0.2 s | 1.25 |",
    ]


def test_every_column_is_shown_of_a_row_and_of_an_older_one():
    spts = {"seconds": [4.0], "speedup": [{"median": 2.0, "range": [1.9, 2.1]}], "kv_bytes": 2**20}
    row = {"tokens": 8191, "dense": {"seconds": [8.0], "kv_bytes": 2**22}, "spts": spts, "flops": {"speedup": 2.2}}
    head, _, short, older = tables.columns_table(columns.SPEED, [{**row, "skips": False}, row]).splitlines()
    shown = "TTFT dense TTFT SPTS dense / SPTS (range) FLOPs, dense / SPTS KV dense KV SPTS"
    assert " ".join(head.replace("|", " ").split()) == f"prompt tokens {shown}"
    assert " ".join(short.replace("|", " ").split()).startswith("8191 (not skipped) 8.00 s")
    cells = [cell.strip() for cell in older.strip("|").split("|")]
    assert cells == ["8191", "8.00 s", "4.00 s", "2.00x (1.90-2.10)", "2.20x", "4.0 MiB", "1.0 MiB (25%)"]


def test_a_result_is_saved_in_every_form_and_an_earlier_picture_goes(tmp_path):
    pytest.importorskip("matplotlib")
    shown = tables.save([1], "table", tmp_path, "x", lambda figure: figure.subplots().plot([1, 2]))
    assert shown == "table" and (tmp_path / "x.md").read_text() == "table\n"
    assert (tmp_path / "x.json").read_text() == "[\n 1\n]\n"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    tables.save([1], "table", tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]


def test_tables_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    tables.save(["模"], "模", tmp_path, "x")
    assert (tmp_path / "x.md").read_bytes() == "模\n".encode()


def test_a_kill_leaves_no_files_of_two_results(tmp_path, monkeypatch):
    """Here whenever a file has just taken, or is about to take, its name."""
    replace, kills = os.replace, [(number, after) for number in range(2) for after in (False, True)]
    for number, after in kills:
        tables.save("old", "old", tmp_path, "x")
        left = [number]

        def killed(source, target, left=left, after=after):
            left[0] -= 1
            if left[0] >= 0 or after:
                replace(source, target)
            if left[0] < 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            tables.save("new", "new", tmp_path, "x")
        assert len({path.read_text().strip('"\n') for path in tmp_path.iterdir()}) == 1


def test_intervals_are_drawn_along_the_numbers():
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    tables.plot_interval(axis, [1, 2], [5.0, 6.0], [(4, 7), (6, 6)])
    tables.plot_interval(axis, [5.0], ["a task"], [(4, 7)])
    upright, lying = (container.lines[2][0].get_segments() for container in axis.containers)
    assert [segment[:, 1].tolist() for segment in upright] == [[4, 7], [6, 6]]
    assert [segment[:, 0].tolist() for segment in lying] == [[4, 7]]


@pytest.mark.parametrize(("lengths", "maps"), [((4096,), 0), ((4096, 8192), 1)])
def test_needles_are_mapped_by_depth_only_where_there_are_several_lengths(lengths, maps):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    score = {"task": "t", "items": 2, "dense": 1.0, "spts": 0.5, "recovery": 0.5, "interval": None}
    depths = [{"limit": n, "depth": 0.1, "mode": mode, "score": 1.0} for n in lengths for mode in ("dense", "spts")]
    suites.draw({"tasks": [{**score, "length": n} for n in lengths], "depths": depths}, figure)
    assert sum(len(axis.images) for axis in figure.axes) == maps


def test_facts_lie_at_their_depths():
    assert hide(["x", "y", "z"], [0.0, 0.5, 1.0], list("abcd")) == ["x", "a", "b", "y", "c", "d", "z"]


def test_ways_are_compared_with_dense_round_by_round():
    model, calls = tiny_model(), []
    ids = torch.arange(3, 63)[None]
    ways = {"dense": (model, {"spts": False}), "spts": (model, {}), "all": (model, {"spts": {"min_length": 10_000}})}
    row = pairs.compare(ways, ids, 2, (1, 3), lambda: calls.append(1))
    assert (row["batch"], row["tokens"], row["new_tokens"], len(calls)) == (1, 60, [1, 3], 3)
    for name in ways:
        assert [len(rounds) for rounds in row[name]["rounds"]] == [2, 2]
        ratios = sorted(a / b for a, b in zip(row["dense"]["rounds"][1], row[name]["rounds"][1], strict=True))
        assert row[name]["speedup"][1]["range"] == pytest.approx([ratios[0], ratios[-1]])
    assert row["spts"]["kv_bytes"] < row["dense"]["kv_bytes"] == row["all"]["kv_bytes"]


def test_the_card_cites_the_paper_whole_and_says_what_engines_do(tmp_path):
    model = tiny_model(schedule=SCHEDULE)
    base = SimpleNamespace(
        folder=tmp_path,
        title="Tiny",
        name="tiny",
        revision=None,
        repository=None,
        trusted=False,
        dequantised=False,
        config=model.config,
        family="llama",
    )
    setting = {"device": "a CPU", "threads": 2, "torch": "2", "transformers": "5", "spts_compress": "0"}
    speed = [{"tokens": 60, "dense": {"rounds": [[1.0, 2.0]]}}]
    report = {"hardware": setting, "keys": 4, "dtype": "float32", "speed": speed}
    text = card.render(base, model.config.schedule(), report, "SPEED", "QUALITY", "PROXIES", None)
    cited = text.replace("\n", " ")
    assert "Probe and Skip: Self-Predictive Token Skipping for Efficient Long-Context LLM Inference" in cited
    assert all(name in cited for name in ("Zimeng Wu", "Donghao Wang", "Chaozhe Jin", "Jiaxin Chen", "Yunhong Wang"))
    assert "dequantised" not in text and "No proxies, since attention's scores" not in text
    base.dequantised = True
    every = model.config.schedule(ffn_selection="all")
    text = card.render(base, dataclasses.replace(every, proxy=()), report, "SPEED", "QUALITY", "PROXIES", None)
    assert "are a GGUF file's, dequantised" in text and "runs on all candidates" in text
    assert "H100" not in text and "runs it dense" in cited and "median of 2 pairs" in cited
    assert [text.count(name) for name in ("SPEED", "QUALITY", "PROXIES", "## Search")] == [1, 1, 1, 0]
    for same, words in ((False, "searched on is not that of"), (True, "searched on is also that of")):
        shown = card.render(base, model.config.schedule(), {**report, "same_text": same}, "", "", "", "TABLES")
        assert "## Search" in shown and words in shown


def test_a_licence_is_read_whatever_else_the_bases_card_says(tmp_path):
    base = SimpleNamespace(folder=tmp_path)
    assert card.license_of(base) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nmodel-index: [{name: a}]\n---\n")
    assert card.license_of(base) == {"license": "mit"}
    for said, languages in (("no", "no"), ("[en, no]", ["en", "no"]), ("sv", "sv")):  # Norwegian is false in YAML
        (base.folder / "README.md").write_text(f"---\nlanguage: {said}\n---\n")
        assert card.license_of(base) == {"language": languages}
    for text in (b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", b"caf\xe9"):
        (tmp_path / "README.md").write_bytes(text)
        with pytest.raises(UserError, match=r"README\.md: its metadata can't be read: "):
            card.license_of(base)


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"studies/nothing\.py is missing"):
        load_study("nothing")


def test_a_full_disk_leaves_an_earlier_result_whole(tmp_path, monkeypatch):
    tables.save([1], "table", tmp_path, "x")

    def write_text(path, text, **_):
        path.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(UserError, match=r"no space left on the disk while writing x\.json"):
        tables.save([2], "other", tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]
    assert (tmp_path / "x.json").read_text() == "[\n 1\n]\n"


def test_a_cards_results_of_others_stay():
    task, words = {"type": "text-generation"}, "---\nwords\n"
    theirs = [
        {"name": name, "note": "ours", "results": [{"task": task, "dataset": {"type": "mmlu", "name": "MMLU"}}]}
        for name in ("one", "two", "ours")
    ]
    for entry, value in zip(theirs, (50, 60.0, "61 +- 2"), strict=True):
        entry["results"][0]["metrics"] = [{"type": "acc", "value": value, "name": "accuracy"}]
    text = f"---\nlicense: mit\nmodel-index: {json.dumps(theirs)}\nzebra: [{{a: 1}}]\n{words}"
    row = {"task": "vt", "length": 512, "items": 2, "dense": 1.0, "spts": 0.5}
    for rows, expected in (([row], 1), ([row, {**row, "task": "cwe"}], 2), ([{**row, "unskipped": 2}], 0), ([], 0)):
        text = card.with_results(text, "ours", rows)
        data, after = metadata(text)
        assert list(data) == ["license", "zebra", "model-index"] and data["zebra"] == [{"a": 1}] and after == words
        assert data["model-index"][:3] == theirs
        assert [len(entry["results"]) for entry in data["model-index"][3:]] == ([expected] if expected else [])
    head = "---\nlanguage:\n- en\n- no\nversion: 1.10\n# kept\nzebra: 1\nmodel-index:\n- name: a\n  results: []\n---\n"
    kept = card.with_results(head, "ours", [])
    assert kept == head and card.with_results(card.with_results(head, "ours", [row]), "ours", []) == head
    [entry] = metadata(card.with_results("words", "ours", [row]))[0]["model-index"]
    assert entry["name"] == "ours" and [m["value"] for m in entry["results"][0]["metrics"]] == [100.0, 50.0]
    assert "model-index" not in card.with_results(card.with_results("words", "ours", [row]), "ours", [])


def metadata(text):
    """A card's metadata as plain data, and the rest of it."""
    head, rest = text.removeprefix("---\n").split("\n---", 1)
    return yaml.safe_load(head), f"---{rest}"


def test_inspect_says_what_changed_since_the_measurements(built, tmp_path):
    folder = shutil.copytree(built[0] / "out", tmp_path / "out")
    assert "Warning" not in run("inspect", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "spts": {**config["spts"], "sink_tokens": 3}}))
    assert "Warning: config.json changed or gone since the export" in run("inspect", folder)
    (folder / "spts-proxies.safetensors").write_bytes(bytes(4000))
    (folder / "tokenizer.json").unlink()
    assert "Warning: config.json, spts-proxies.safetensors, tokenizer.json changed or" in run("inspect", folder)
    (folder / "spts_files.json").unlink()
    assert "Warning: spts_files.json changed or gone since the export" in run("inspect", folder)
    for content in ("{", "[]", '{"speed": [1]}', '{"speed": []}'):
        (folder / "spts_report.json").write_text(content)
        assert f"error: {folder / 'spts_report.json'}: " in run("inspect", folder, code=2)
