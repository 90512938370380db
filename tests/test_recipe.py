"""Recipes are read strictly, and every shipped one is valid."""

from dataclasses import fields

import pytest
import yaml
from tiny import tiny_model

from spts_compress.recipe import Recipe, ScheduleParams, find, load, shipped_recipes
from spts_compress.search import run
from spts_compress.utils.errors import UserError

GOOD = """
model: {path: somewhere}
proxy: {channels: 8, rank: 4}
schedule:
  start: 1
  stages:
    - {end: 2, budget: 12, prune_to: {fraction: 0.25, floor: 16}}
    - {end: 4, budget: {fraction: 0.25, floor: 8, cap: 16}}
export: {path: out}
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def faults(tmp_path, text, edits=()):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text), edits)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path):
    recipe = load(path)
    recipe.read_schedule(40)
    assert find(path.name) == path or find(path.name).read_text() == path.read_text()


def test_every_fault_is_reported_with_its_path_and_the_nearest_spelling(tmp_path):
    text = GOOD.replace("path: somewhere", "pth: somewhere").replace("rank: 4", "rank: many, rang: 3")
    text = text.replace("budget: 12", "budget: -3").replace("export: {path: out}", "expotr: {}")
    lines = "\n".join(faults(tmp_path, text))
    for expected in (
        "model.pth is unknown (did you mean path?)",
        "proxy.rank is 'many'; input should be a valid integer",
        "proxy.rang is unknown (did you mean rank?)",
        "schedule.stages.0.budget.floor is -3; it must be at least 0",
        "expotr is unknown (did you mean export?)",
        "export is missing",
    ):
        assert expected in lines


def test_prompts_are_not_counted_twice(tmp_path):
    edits = ["search.lengths=[512,512]", "search.kinds=[free,vt,free]", "report.lengths=[64,64]"]
    lines = "\n".join(faults(tmp_path, GOOD, edits))
    for expected in (
        "search.lengths must not have 512 twice",
        "must not have free twice",
        "not have 64 twice",
    ):
        assert expected in lines


def test_choices_of_a_search_are_checked_and_taken(tmp_path):
    text = "model: {path: somewhere}\nproxy: {channels: 8, rank: 4}\nsearch: {speedup: 2.0}\nexport: {path: out}\n"
    recipe = load(write(tmp_path, text), ("search.choices={window_size: [32], margin: [0, 1.2]}",))
    choices = recipe.search.choices.from_starts([2, 3])
    assert {name: choices[name] for name in ("start", "window_size", "margin", "stages")} == {
        "start": (2, 3), "window_size": (32,), "margin": (0, 1.2), "stages": (1, 2, 3, 4, 5)
    }  # fmt: skip
    assert list(choices) == [field.name for field in fields(ScheduleParams)]
    recipe = load(write(tmp_path, text), ("search.heads_from=3", "search.starts=[2]", "search.lengths=[512]"))
    [line] = faults(tmp_path, text, ("search.heads_from=3", "search.choices.heads=[mean]"))
    assert "search has heads_from, but no number in choices.heads" in line
    with pytest.raises(UserError, match="3 is after the first start"):
        run.widest(recipe.search, tiny_model(max_position_embeddings=2048).config)
    for wrong, expected in (
        ("{window_sizes: [8]}", "search.choices.window_sizes is unknown (did you mean window_size?)"),
        ("{kernel_size: [4]}", "search.choices.kernel_size.0 must be odd"),
        ("{margin: [0.5]}", "search.choices.margin.0 must be 0 or at least 1"),
        ("{score_carry: []}", "search.choices.score_carry is []"),
        ("{heads: [0.9, median]}", "search.choices.heads.1 must be mean, max, or above 0"),
    ):
        assert expected in faults(tmp_path, text, (f"search.choices={wrong}",))[0]


def test_duplicate_keys_name_their_line(tmp_path):
    [line] = faults(tmp_path, GOOD + "export: {path: other}\n")
    assert line.endswith("recipe.yaml:10: export is given twice in one section")


@pytest.mark.parametrize("text", ["model: [", "- a\n- b", "", "a: \x00", "!!python/object/apply:os.system [ls]"])
def test_what_is_not_a_recipe_is_refused(tmp_path, text):
    [line] = faults(tmp_path, text)
    assert "recipe.yaml" in line


def test_edits_change_the_recipe_and_are_checked_like_it(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load(path, ("schedule.stages.0.budget=14", "report.lengths=[512]", "calibration.seed=3"))
    assert recipe.schedule["stages"][0]["budget"] == 14
    assert recipe.report.lengths == [512]
    assert recipe.calibration.seed == 3
    assert "proxy.rnk is unknown (did you mean rank?)" in faults(tmp_path, GOOD, ("proxy.rnk=3",))[0]
    for edit in ("proxy.rank", "=3", "schedule.stages.7.end=3", "proxy.rank.x=3"):
        assert edit in faults(tmp_path, GOOD, (edit,))[0]


def test_an_edit_of_an_alias_leaves_what_else_has_its_anchor(tmp_path):
    stages = "[{end: 2, budget: &half {fraction: 0.5}}, {end: 3, budget: *half}, {end: 4, budget: *half}]"
    text = f"model: {{path: a}}\nschedule: {{start: 1, stages: {stages}}}\nexport: {{path: out}}\n"
    for changed in range(3):
        recipe = load(write(tmp_path, text), (f"schedule.stages.{changed}.budget.fraction=0.4",) * 2)
        shares = [stage["budget"]["fraction"] for stage in recipe.schedule["stages"]]
        assert shares == [0.4 if number == changed else 0.5 for number in range(3)]
    text = "model: {path: a}\nsearch: {lengths: &some [1024, 2048]}\nreport: {lengths: *some}\nexport: {path: out}\n"
    recipe = load(write(tmp_path, text), ("report.lengths.1=4096",))
    assert (recipe.search.lengths, recipe.report.lengths) == ([1024, 2048], [1024, 4096])


def test_heads_that_score_are_lists_by_layer(tmp_path):
    recipe = load(
        write(tmp_path, GOOD), ("schedule.probe.heads={1: [0, 3], 3: [1]}", "schedule.stages.0={end: 2, budget: 12}")
    )
    assert recipe.read_schedule(5, 4).probe.heads == ((1, 0), (1, 3), (3, 1))
    text = GOOD.replace("  stages:", "  probe: {heads: {1: [3], 2: [0]}}\n  stages:")
    edited = load(write(tmp_path, text), ("schedule.probe.heads.1=[2]", "schedule.probe.heads.3=[1]"))
    assert edited.read_schedule(5, 4).probe.heads == ((1, 2), (2, 0), (3, 1))  # in place of what was there
    with pytest.raises(UserError, match="has head 3 of layer 1"):
        recipe.read_schedule(5, 2)
    [line] = faults(tmp_path, GOOD, ("schedule.probe.heads=[2, 0]",))
    assert "schedule.probe.heads is [2, 0]; it must be mean, max, or lists of heads by layer" in line


def test_contradictions_with_the_model_are_all_named(tmp_path):
    edits = ("schedule.start=9", "schedule.stages=[{end: 12, budget: 9}]", "schedule.probe.heads={9: [5]}")
    recipe = load(write(tmp_path, GOOD), edits)
    with pytest.raises(UserError) as caught:
        recipe.read_schedule(5, 4)
    assert str(caught.value).splitlines() == [
        "schedule.start is 9; it must be 1 to 4",
        "schedule.stages.0.end is 12; it must be 9 to 4",
        "schedule.probe.heads has head 5 of layer 9; no skipping layer has such a head",
    ]


def test_faults_of_a_schedule_are_told_with_all_others_before_the_model_is_known(tmp_path):
    text = GOOD.replace("budget: 12,", "budget: 12, bugdet: 3,").replace("rank: 4", "rang: 4")
    told = "\n".join(faults(tmp_path, text))
    assert "schedule.stages.0.bugdet is unknown (did you mean budget?); known here: end, budget" in told
    assert "proxy.rang is unknown (did you mean rank?)" in told
    edits = ("schedule.stages.0.prune_to=9", "schedule.probe={kernel_size: 4}", "schedule.proxy={}", "schedule.stat=1")
    told = "\n".join(faults(tmp_path, GOOD, edits[:2]))
    assert "schedule.stages.0.prune_to is less than stages.1.budget; it must be at least that" in told
    assert "schedule.probe.kernel_size is 4; it must be odd and at least 1" in told
    told = "\n".join(faults(tmp_path, GOOD, edits[2:]))
    assert "schedule.proxy is unknown" in told and "schedule.stat is unknown (did you mean start?)" in told
    assert "schedule is 3; input should be a valid dictionary" in faults(tmp_path, GOOD, ("schedule=3",))[0]


def test_the_resolved_values_load_as_the_same_recipe(tmp_path):
    recipe = load(write(tmp_path, GOOD))
    again = load(write(tmp_path, yaml.safe_dump(recipe.model_dump())))
    assert again == recipe
    assert isinstance(again, Recipe)
