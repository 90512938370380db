"""Fitting what a layer would have added to the tokens it skips."""

import json
import weakref

import numpy as np
import pytest
import torch
import yaml
from helpers import recipe_for, run
from tiny import tiny_base, tiny_model, with_updates
from transformers import AutoModelForCausalLM

from spts_compress.fit.updates import BLOCK, PENALTY, LayerFit, blank, fit_updates, prompt_length, solve
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.modeling.update import LowRankUpdate
from spts_compress.pipeline import prepare
from spts_compress.recipe import load
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store

SCHEDULE = {
    "start": 1,
    "stages": [{"end": 2, "budget": {"fraction": 0.5}}, {"end": 4, "budget": {"fraction": 0.3}}],
    "ffn_selection": "attention",
    "update": {"attention_rank": 4, "ffn_rank": 8},
    "kv": 1.0,
}


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_the_map_is_the_reduced_rank_ridge_regression(rank):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 6))
    targets = inputs @ rng.normal(size=(6, 6)) + 0.1 * rng.normal(size=(400, 6)) + 2
    update = LowRankUpdate(6, rank)
    solve(update, torch.tensor(inputs[:300]).float(), torch.tensor(targets[:300]).float(), 1 + torch.arange(300) // 200)
    inputs, targets = (np.concatenate([part[:300], part[200:300]]) for part in (inputs, targets))  # weighed by two
    centred, wanted = inputs - inputs.mean(0), targets - targets.mean(0)
    gram = centred.T @ centred
    gram += PENALTY * np.trace(gram) / 6 * np.eye(6)
    full = np.linalg.solve(gram, centred.T @ wanted)
    # Of all maps of this rank, the best one projects the full solution on the main directions of what it explains.
    values, vectors = np.linalg.eigh(wanted.T @ centred @ full)
    kept = vectors[:, np.argsort(values)[::-1][:rank]]
    expected = centred @ full @ kept @ kept.T + targets.mean(0)
    with torch.no_grad():
        found = update(torch.tensor(inputs).float()[None])[0]
    np.testing.assert_allclose(found.expand(400, 6).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "mixtral", "deepseek_v3"])
def test_fitted_updates_bring_skipped_states_nearer_to_the_dense_ones(family):
    model = tiny_model(family, SCHEDULE, max_position_embeddings=64)
    model.load_state_dict({**model.state_dict(), **blank(model.config.schedule(), model.config, torch.float32)})
    generator = torch.Generator().manual_seed(3)
    fit, held_out = (list(torch.randint(3, 97, (count, 64), generator=generator)) for count in (24, 6))

    def distance():
        ids = torch.stack(held_out)
        with torch.no_grad():
            dense, skipping = (model.model(ids, spts=spts).last_hidden_state for spts in (False, True))
        return float((dense - skipping).square().mean())

    before, modules = distance(), [name for name, _ in model.named_modules()]
    rows = fit_updates(model, fit, held_out, 64)
    assert distance() < before
    assert [row["layer"] for row in rows] == [1, 2, 3, 4]
    assert all(row["attention"] < 1 and row["ffn"] < 1 for row in rows)
    assert [name for name, _ in model.named_modules()] == modules  # nothing of the fitting is left
    again = tiny_model(family, SCHEDULE, max_position_embeddings=64)
    again.load_state_dict({**again.state_dict(), **blank(again.config.schedule(), again.config, torch.float32)})
    fit_updates(again, fit, held_out, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_states_of_one_layer_at_a_time_are_held(monkeypatch):
    held, alive = [], []

    def enter(self, *args, enter=LayerFit.enter):
        alive.append(sum(reference() is not None for reference in held))
        found = enter(self, *args)
        held.extend(map(weakref.ref, self.dense.values()))
        return found

    monkeypatch.setattr(LayerFit, "enter", enter)
    fitted({**SCHEDULE, "update": {"attention_rank": 2, "ffn_rank": 2}})
    assert alive == [0, 0, 0, 0] and len(held) == 8


def fitted(schedule, prompts=24):
    """A tiny model with updates fitted on so many prompts, what they were fitted on, and its held-out prompts."""
    return with_updates("llama", schedule, 64, (prompts, 16))


def test_tokens_that_skip_the_feed_forward_network_alone_are_fitted_on():
    stages = [{"end": 4, "budget": {"fraction": 1.0}, "ffn_budget": 32}]
    block = {
        **SCHEDULE,
        "start": 4,
        "stages": stages,
        "recent_tokens": 32,
        "update": {"attention_rank": 0, "ffn_rank": 0},
    }
    model, fit, _, _ = fitted(block)  # the last 32 of 64 tokens are the ones that the network runs on
    outputs = []
    model.model.layers[4].mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(torch.stack(fit), spts=False)
    skipped, others = outputs[0].split(32, dim=1)
    expected = (skipped.mean((0, 1)) + 0.25 * others.mean((0, 1))) / 1.25
    torch.testing.assert_close(model.model.layers[4].ffn_update.bias.data, expected)


def test_nothing_is_fitted_where_nothing_is_skipped():
    block = {**SCHEDULE, "stages": [{"end": 4, "budget": 5000}], "update": {"attention_rank": 0, "ffn_rank": 2}}
    model, _, _, rows = fitted(block)
    assert rows == [{"layer": layer} for layer in range(1, 5)] and not model.model.layers[4].ffn_update.bias.any()


def test_maps_for_a_search_tell_what_a_dense_layer_adds():
    stages = [{"end": 4, "budget": 16}]  # the last 16 of 64 tokens are active
    ranks = {"attention_rank": 0, "ffn_rank": 0}
    block = {**SCHEDULE, "stages": stages, "recent_tokens": 16, "update": ranks}
    model, fit, held_out, _ = fitted(block)
    fit_updates(model, fit, held_out, 64, on_dense=True)
    layer, outputs = model.model.layers[3], []
    layer.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(torch.stack(fit), spts=False)
    skipped, others = outputs[0].split([48, 16], dim=1)
    expected = (3 * skipped.mean((0, 1)) + 0.25 * others.mean((0, 1))) / 3.25
    torch.testing.assert_close(layer.attention_update.bias.data, expected, atol=1e-5, rtol=1e-4)


def test_a_search_may_give_its_candidates_updates(corpus, tmp_path):
    recipe = recipe_for(tiny_base(tmp_path / "base"), corpus, tmp_path)
    data = {name: part for name, part in yaml.safe_load(recipe.read_text()).items() if name != "schedule"}
    search = {
        "speedup": 1.15, "lengths": [600], "kinds": ["free"], "prompts": 1, "answer_tokens": 8, "candidates": 4,
        "rounds": 1, "starts": [2, 3],
        "choices": {"kv": [0.75], "ffn_selection": ["attention"], "floor": [128]},
    }  # fmt: skip
    data["distill"] = {"steps": 4, "length": 64, "following": 16}
    recipe.write_text(yaml.safe_dump({**data, "search": search}))
    assert "search has choices.kv, but no update" in run("recipe", recipe, code=2)
    recipe.write_text(yaml.safe_dump({**data, "search": {**search, "update": {"attention_rank": 0, "ffn_rank": 4}}}))
    assert "uses no update in 64 tokens, so there is none" in run("recipe", recipe)
    resolved = load(tmp_path / "out/recipe.resolved.yaml")
    assert resolved.distill.steps == 0  # or the schedule that was found would be refused
    prepare(resolved, Store(tmp_path / "out.work"), "cpu")
    schedule = json.loads((tmp_path / "out/config.json").read_text())["spts"]
    assert schedule["update"] == {"attention_rank": 0, "ffn_rank": 4} and schedule["kv"] == 0.75
    assert "proxy" not in schedule and "No proxies" in (tmp_path / "out/README.md").read_text()
    assert "is whole" in run("verify", tmp_path / "out")
    winner = json.loads((tmp_path / "out.search/search.json").read_text())["points"][0]["winner"]
    assert winner["params"]["kv"] == 0.75 and winner["cost"]["speedup"] >= 1.15


def test_a_few_skipped_tokens_are_not_all_that_a_map_is_fitted_on():
    stages = [{"end": 4, "budget": {"fraction": 0.95}}]
    _, _, _, rows = fitted(
        {**SCHEDULE, "start": 3, "stages": stages, "update": {"attention_rank": 0, "ffn_rank": 24}}, 12
    )
    assert rows[0]["ffn"] > 0  # it knows tokens that it has not seen better than their mean does


def test_a_recipe_with_updates_makes_a_checkpoint_that_uses_them(corpus, tmp_path, monkeypatch):
    longest = []

    def fit(*arguments):
        longest.append(arguments[3])
        return fit_updates(*arguments)

    monkeypatch.setattr("spts_compress.pipeline.fit_updates", fit)
    base = tiny_base(tmp_path / "base")
    schedule = {**SCHEDULE, "start": 2, "stages": [{"end": 4, "budget": {"fraction": 0.3, "floor": 20}}], "kv": 0.5}
    recipe = recipe_for(base, corpus, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**data, "schedule": schedule}))
    run("recipe", recipe)
    assert longest == [400]  # quality is reported of prompts so long
    out = tmp_path / "out"
    assert "is whole" in run("verify", out)
    assert "R^2 of the update, attention" in run("inspect", out)
    report = json.loads((out / "spts_report.json").read_text())
    assert all({"attention", "ffn"} <= fit["update"].keys() for fit in report["proxies"])
    assert report["speed"][0]["spts"]["kv_bytes"] < report["speed"][0]["dense"]["kv_bytes"]
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with_updates, without = (model(ids, logits_to_keep=1, spts=spts).logits for spts in (None, {"update": None}))
    assert not torch.equal(with_updates, without)
    assert yaml.safe_load((out / "recipe.resolved.yaml").read_text())["schedule"]["update"] == SCHEDULE["update"]


def test_maps_are_fitted_on_prompts_that_every_layer_skips_in():
    stages = [{"end": 2, "budget": 9000}, {"end": 4, "budget": 2000}]
    schedule = Schedule.from_dict({**SCHEDULE, "stages": stages, "min_length": 10**6}, 5)
    assert prompt_length(schedule, 5, 4000, 10**5, 10**5) == BLOCK  # the first stage skips nothing there, either
    assert prompt_length(schedule, 5, 32768, 10**5, 10**5) == 4 * BLOCK
    assert prompt_length(schedule, 5, 32768, 2500, 10000) == 10000
    with pytest.raises(UserError, match="layer 1 skips nothing of a prompt of 8000 tokens"):
        prompt_length(schedule, 5, 32768, 10**5, 8000)
    # attention and the feed-forward network have a map each, so it does not do that one of them skips
    apart = Schedule.from_dict({**SCHEDULE, "stages": [{"end": 4, "budget": 9000, "ffn_budget": 2000}]}, 5)
    assert prompt_length(apart, 5, 32768, 10**5, 10**5) == 4 * BLOCK
