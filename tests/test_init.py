"""The recipe that `init` prints: it loads, it suits the model, and its plan can be made."""

import json

import pytest
import torch
import yaml
from helpers import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, TEXT, tiny_base, tiny_config

from spts_compress import pipeline, plan
from spts_compress.checkpoint.families import context_of
from spts_compress.cost import LayerShape, has_experts, predicted, proxy_flop_fraction
from spts_compress.fit.ltp import FeedForward, Tokens
from spts_compress.fit.size import choose
from spts_compress.modeling.configuration_spts import Proxy
from spts_compress.modeling.stock_layer import layer_windows
from spts_compress.recipe import ModelSection, ProxySection, load
from spts_compress.search.space import DEFAULT_SPEEDUPS, default_schedule
from spts_compress.starter import model_section, starter
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store

GOALS = [{"speedup": 2.0}, {"kv_share": 0.5}, {"quality": 0.97}, {"speedup": 1.5, "quality": 0.9}]
SHIPPED = [  # hidden size, width of the feed-forward network, and the proxies of the shipped recipes
    (576, 1536, Proxy(192, 48)),
    (896, 4864, Proxy(512, 128)),
    (4096, 14336, Proxy(512, 192)),
]


def config_of(family, layers, **changes):
    if "layer_types" in tiny_config(family).to_diff_dict():
        types = tiny_config(family).layer_types
        changes["layer_types"] = [types[number % len(types)] for number in range(layers)]
    return tiny_config(family, num_hidden_layers=layers, **changes)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(2, 40),
    context=st.integers(512, 200_000),
    hidden=st.sampled_from([32, 256, 2048]),
    times=st.sampled_from([1.5, 2.7, 5]),
    goal=st.sampled_from(GOALS),
    length=st.sampled_from([512, 3000, 8192, 131_072]),
)
def test_it_suits_every_family(tmp_path, family, layers, context, hidden, times, goal, length):
    width = int(hidden * times)
    config = config_of(family, layers, max_position_embeddings=context, hidden_size=hidden, intermediate_size=width)
    text = starter(ModelSection(path="a/model: of ours"), config, context_of(config), goal, length)
    path = tmp_path / "starter.yaml"
    path.write_text(text)
    recipe = load(path)
    assert recipe.model.path == "a/model: of ours"
    assert {name: getattr(recipe.search, name) for name in goal} == goal
    completed, schedule = pipeline.suited(recipe, config)
    assert max(completed.report.lengths) <= context and max(recipe.search.lengths) == min(length, context)
    assert min(recipe.search.starts) >= 1 and max(recipe.search.starts) < layers
    for layer in range(schedule.start, layers):
        size, shape = schedule.proxy_of(layer), LayerShape.of(config, layer)
        if has_experts(config, layer) or not size.rank:
            continue
        assert proxy_flop_fraction(hidden, shape.intermediate, size) <= recipe.proxy.max_flop_fraction
        assert size.channels <= width and size.rank <= min(hidden, 3 * size.channels // 8)


@pytest.mark.parametrize(("hidden", "width", "size"), SHIPPED)
def test_default_proxies_are_those_of_the_shipped_recipes(hidden, width, size, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {path: x}\nexport: {path: out}\n")
    config = tiny_config("llama", hidden_size=hidden, intermediate_size=width)
    proxy = plan.complete(load(tmp_path / "recipe.yaml"), config, 8192).proxy
    assert Proxy(proxy.channels, proxy.rank) == size


def test_what_can_not_be_searched_is_refused():
    for context, layers, message in ((300, 5, "prompts of 300 tokens"), (4096, 1, "one layer")):
        with pytest.raises(UserError, match=message):
            starter(ModelSection(path="x"), tiny_config("llama", num_hidden_layers=layers), context, GOALS[0], 8192)


def test_a_model_is_a_folder_a_gguf_file_or_a_hub_id(tmp_path):
    assert model_section("org/model") == ModelSection(path="org/model")
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).touch()
    assert model_section(f"{tmp_path}/one.gguf") == ModelSection(path=str(tmp_path), gguf_file="one.gguf")
    with pytest.raises(UserError, match=r"one\.gguf, two\.gguf"):
        model_section(str(tmp_path))
    (tmp_path / "two.gguf").unlink()
    assert model_section(str(tmp_path)) == ModelSection(path=str(tmp_path), gguf_file="one.gguf")
    (tmp_path / "config.json").touch()
    assert model_section(str(tmp_path)) == ModelSection(path=str(tmp_path))


def test_the_command_prints_a_recipe_whose_plan_can_be_made(tmp_path):
    base = tiny_base(tmp_path / "base")
    printed = run("init", base, "--kv", 0.6, "--quality", 0.9, "--length", 1024)
    (tmp_path / "recipe.yaml").write_text(printed)
    data = yaml.safe_load(printed)
    assert data["search"]["kv_share"] == 0.6 and data["search"]["quality"] == 0.9 and data["model"]["path"] == str(base)
    assert "search    kv_share 0.6, quality at least 0.9" in run("recipe", tmp_path / "recipe.yaml", "--dry-run")
    assert "speedup: 2 " in run("init", base)
    assert "takes one of speedup and kv_share" in run("init", base, "--kv", 0.5, "--speedup", 2, code=2)
    assert "speedup is 0.5; input should be greater than 1" in run("init", base, "--speedup", 0.5, code=2)
    assert "does not exist" in run("init", tmp_path / "nowhere", code=2)


def test_the_smallest_recipe_is_model_and_export(tmp_path):
    base = tiny_base(tmp_path / "base", hidden_size=256, intermediate_size=1024, max_position_embeddings=700)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": {"path": str(base)}, "export": {"path": "out"}}))
    shown = run("recipe", tmp_path / "recipe.yaml", "--dry-run")
    assert "skips from layer 2, 3 stages" in shown and "700 tokens" in shown
    assert (
        "the recipe gives no schedule, so this is a default: 1.50 times fewer" in shown
        and "`search:` finds a better one" in shown
    )
    assert "128 channels and rank 16" in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_schedule_suits_every_family(family):
    config = config_of(family, 20, hidden_size=512, intermediate_size=2048, max_position_embeddings=8192)
    sizes = dict.fromkeys(range(20), Proxy(1, 0))
    schedule = default_schedule(config, sizes, 8192)
    assert schedule.start == 8 and [stage.end for stage in schedule.stages] == [10, 13, 16, 19]
    budgets = [stage.budget.fraction for stage in schedule.stages]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > budgets[-1]
    assert None not in layer_windows(config) or plan.blind_ends(config, schedule) == []
    speedup = predicted(config, schedule, 8192)["speedup"]
    assert any(wanted <= speedup < wanted + 0.01 for wanted in DEFAULT_SPEEDUPS)
    if family not in ("deepseek_v2", "deepseek_v3", "gemma3_text", "ministral"):
        assert speedup >= 1.5
    with pytest.raises(UserError, match="give a schedule"):
        default_schedule(config, sizes, 36)  # as many as are always active


@pytest.mark.parametrize(("selection", "proxies"), [("relative", 3), ("attention", 0), ("all", 0)])
def test_proxies_that_nothing_uses_are_not_made(tmp_path, selection, proxies):
    schedule = {"start": 2, "stages": [{"end": 4, "budget": 24}], "ffn_selection": selection}
    data = {"model": {"path": "x"}, "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**data, "schedule": schedule, "export": {"path": "out"}}))
    _, found = pipeline.suited(load(tmp_path / "recipe.yaml"), tiny_config("llama"))
    assert len(found.proxy) == proxies


def test_a_proxy_whose_layer_skips_nothing_yet_is_chosen_by_its_ranking(tmp_path, monkeypatch):
    """As if its network ran on a quarter; of all candidates any ranking finds the best."""
    shares = []

    def choose(ffn, full, tokens, check, section, share, relative):
        shares.append(share)
        raise KeyboardInterrupt

    monkeypatch.setattr("spts_compress.fit.proxies.choose", choose)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{TEXT} {n}" for n in range(200)))
    block = {"start": 4, "stages": [{"end": 4, "budget": 5000}]}
    data = {"model": {"path": str(tiny_base(tmp_path / "base"))}, "schedule": block, "export": {"path": "out"}}
    data["calibration"] = {"source": "files", "path": str(tmp_path / "text.txt"), "tokens": 1200, "length": 128}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**data, "report": {"lengths": [600]}}))
    with pytest.raises(KeyboardInterrupt):
        pipeline.prepare(load(tmp_path / "recipe.yaml"), Store(tmp_path / "work"), "cpu")
    assert shares == [0.25]


def test_layers_that_skip_in_longer_prompts_alone_are_told(tmp_path):
    stages = [{"end": 2, "budget": 600}, {"end": 4, "budget": 250}]
    schedule = {
        "start": 1,
        "stages": stages,
        "ffn_selection": "attention",
        "update": {"attention_rank": 1, "ffn_rank": 1},
    }
    data = {"model": {"path": "x"}, "schedule": schedule, "export": {"path": "out"}}
    for lengths, told in (([430], "430 tokens, layers 1, 2 skip nothing"), ([100, 700], "")):
        notes = []
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**data, "report": {"lengths": lengths}}))
        config = tiny_config("llama", max_position_embeddings=2048)
        pipeline.suited(load(tmp_path / "recipe.yaml"), config, notes.append)
        assert [told in note for note in notes] == [True] * bool(told)


@pytest.mark.parametrize(("size", "regression"), [(Proxy(1, 0), False), (Proxy(1, 0), True), (Proxy(20, 6), False)])
def test_a_proxy_of_rank_0_is_the_regression_alone(size, regression):
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((40, 16), (40, 16), (16, 40)))
    ffn = FeedForward(gate, up, down, torch.ones(16), 1e-6, "silu")
    tokens, check = (
        Tokens.of(ffn, torch.randn(count, 16, generator=generator), torch.rand(count, generator=generator) + 1)
        for count in (300, 100)
    )
    proxy, tried = choose(ffn, size, tokens, check, ProxySection(steps=2, regression=regression), 0.25, True)
    assert [row["rank"] for row in tried["candidates"]] == [size.rank] and proxy.rank == size.rank
