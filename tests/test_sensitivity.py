"""The sensitivity study on a tiny model."""

import json

import pytest
from click.testing import CliRunner
from tiny import TEXT, tiny_base

from spts_compress.cli import main
from spts_compress.modeling.configuration_spts import Proxy
from spts_compress.recipe import ProxySection, load_study

sensitivity = load_study("proxy_sensitivity")

RECIPE = """
model: {path: BASE}
calibration: {source: python-docs, tokens: 2000, length: 256}
proxy: {channels: 12, rank: 4, max_flop_fraction: 1.0, steps: 6}
schedule: {start: 2, stages: [{end: 4, budget: 100}]}
report: {lengths: [128]}
export: {path: out}
"""


def sweep(folder, *options):
    return CliRunner().invoke(main, ["sweep", str(folder / "recipe.yaml"), "--output", str(folder / "out"), *options])


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("matplotlib")
    tiny_base(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("BASE", str(tmp_path / "base")))
    (tmp_path / "fox.jsonl").write_text("\n".join(json.dumps({"text": f"{n} {TEXT * 10}"}) for n in range(30)))
    return tmp_path


def test_a_study_writes_table_numbers_and_picture_and_goes_on_where_it_stopped(folder, monkeypatch):
    options = ("--layers", "2,4", "--text", f"fox={folder / 'fox.jsonl'}")
    first = sweep(folder, *options)
    assert first.exit_code == 0, first.output
    study = json.loads((folder / "out/sweep.json").read_text())
    assert study["setting"]["sources"] == ["python-docs", "python-code", "fox"]
    assert {row["layer"] for row in study["rows"]} == {2, 4}
    for row in study["rows"]:
        assert set(row["ranked"]) == {"python-docs", "python-code", "fox"}
        assert 0 < row["ranked"]["fox"]["norm"]["proxy"]["recall"] <= 1
    factors = {row["factor"] for row in study["rows"]}
    assert {"size", "rho", "tokens", "objective", "fitted on", "init", "paper's, no step"} <= factors
    assert "(recommended)" in (folder / "out/sweep.md").read_text()
    tables = (folder / "out/sweep.md").read_text()
    assert tables in first.output
    assert (folder / "out/sweep.png").read_bytes()[:4] == b"\x89PNG"

    def refuse(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr(sensitivity, "fit", refuse)
    again = sweep(folder, *options)
    assert again.exit_code == 0 and tables in again.output
    only = sweep(folder, *options, "--vary", "rho")
    assert "rho" in only.output and "objective" not in only.output


def test_hidden_states_are_kept_under_the_order_of_their_sources(folder, monkeypatch):
    keys, texts = [], [f"--text=a={folder / 'fox.jsonl'}", f"--text=b={folder / 'owl.jsonl'}"]
    (folder / "owl.jsonl").write_text((folder / "fox.jsonl").read_text().replace("fox", "owl"))

    def stopped(model, sequences, layers, store, key, *_):
        keys.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity.capture, "feed_forward", stopped)
    for order in (texts, texts[::-1]):
        assert sweep(folder, *order).exit_code == 130
    assert len(set(keys)) == 2


def test_sources_that_share_documents_are_refused(folder):
    result = sweep(folder, *(f"--text={name}={folder / 'fox.jsonl'}" for name in ("a", "b")))
    assert result.exit_code == 2 and "a and b share documents" in result.output


def test_bad_options_are_named(folder):
    for options, message in (
        (("--layers", "two"), "--layers two: give whole numbers"),
        (("--layers", "9"), "--layers: give numbers from 1 to 4"),
        (("--vary", "colour"), "--vary colour: give one of size,"),
        (("--text", "nowhere"), "--text nowhere: give it as NAME=FILE"),
        (("--text", "a=nowhere.txt"), "nowhere.txt does not exist"),
        (("--text", "python-docs=x.txt"), "--text python-docs: there is a source of this name already"),
        (("--text", "a=x.txt", "--text", "a=y.txt"), "the name a is given twice"),
    ):
        result = sweep(folder, *options)
        assert result.exit_code == 2 and message in result.output, result.output


def test_one_thing_is_changed_at_a_time():
    section = ProxySection(channels=64, rank=16)
    made = sensitivity.variants(section, ("a",), ["a", "b", "c"])
    for variant in made:
        changed = {k for k, v in variant.section.model_dump().items() if v != getattr(section, k)}
        others = (variant.size != Proxy(64, 16)) + (variant.sources != ("a",)) + (variant.part != 1)
        if variant.factor == "paper's, no step":
            assert changed - {"init"} == {"regression", "steps"}
        else:
            assert len(changed) + others == (0 if variant.factor == "recipe" else 1), variant
    mixes = {variant.sources for variant in made if variant.factor == "fitted on"}
    assert mixes == {("b",), ("c",), ("a", "b", "c"), ("b", "c"), ("a", "c"), ("a", "b")}


def test_of_a_regression_alone_only_the_text_is_varied(folder):
    made = sensitivity.variants(ProxySection(channels=64, rank=0), ("a",), ["a", "b"])
    assert made[0].factor == "recipe" and {variant.size for variant in made} == {Proxy(1, 0)}
    assert {variant.factor for variant in made} == {"recipe", "tokens", "fitted on"}
    options = ("--layers", "4", "--set", "proxy.rank=0", "--set", "proxy.regression=false", "--vary")
    done = sweep(folder, *options, "tokens")
    assert done.exit_code == 0 and "(recommended)" not in done.output, done.output
    refused = sweep(folder, *options, "rho")
    assert refused.exit_code == 2 and "--vary rho: nothing of it can be varied" in refused.output


def test_the_recommended_size_is_the_cheapest_good_one():
    rows = [
        {"factor": "size", "value": name, "cost": cost, "own_recall": own, "other_recall": other}
        for name, cost, own, other in (("s", 0.1, 0.70, 0.60), ("m", 0.2, 0.79, 0.69), ("l", 0.4, 0.80, 0.70))
    ]
    assert sensitivity.recommended(rows, 0.02)["value"] == "m"
    assert sensitivity.recommended(rows, 0.0)["value"] == "l"
    assert sensitivity.recommended(rows, 0.2)["value"] == "s"
    assert sensitivity.recommended(rows[:1], 0.2) is None
