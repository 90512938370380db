"""Distillation of updates: gradient steps toward the dense model's next tokens."""

import json

import pytest
import torch
import yaml
from helpers import recipe_for, run
from scipy.special import rel_entr
from tiny import tiny_base, with_updates
from transformers import AutoTokenizer

from spts_compress.calibrate.data import blocks, documents
from spts_compress.fit.descent import trained
from spts_compress.fit.distill import distill, loss
from spts_compress.recipe import DistillSection, load
from spts_compress.utils.errors import UserError

SCHEDULE = {
    "start": 1,
    "stages": [{"end": 2, "budget": {"fraction": 0.5}}, {"end": 4, "budget": {"fraction": 0.3}}],
    "ffn_selection": "attention",
    "update": {"attention_rank": 0, "ffn_rank": 8},
    "kv": 0.8,
}
SECTION = DistillSection(steps=24, length=64, following=16)


def fitted(family="llama", schedule=SCHEDULE):
    """A tiny model whose updates are fitted, what they were fitted on, and held-out text."""
    return with_updates(family, schedule, 128, (24, 5))[:3]


def test_the_loss_is_the_divergence_of_what_follows_a_skipped_prompt():
    model, _, held_out = fitted()
    ids = torch.cat(held_out)[None, :80]
    with torch.no_grad():
        first = model(ids[:, :64], use_cache=True, logits_to_keep=1, spts={"min_length": 0})
        later = model(ids[:, 64:], past_key_values=first.past_key_values)
        skipped = torch.cat([first.logits, later.logits], dim=1)[0].softmax(-1).double().numpy()
        dense = model(ids, spts=False).logits[0, 63:].softmax(-1).double().numpy()
        found = float(loss(model, ids, 16))
    assert found == pytest.approx(rel_entr(dense, skipped).sum(-1).mean(), rel=1e-3) and found > 0


@pytest.mark.parametrize(
    "family, selection",
    [("llama", "attention"), ("llama", "proxy"), ("gemma3_text", "attention"), ("deepseek_v3", "attention")],
)
def test_steps_bring_held_out_text_nearer_and_change_updates_alone(family, selection):
    proxy = {"proxy": {"channels": 4, "rank": 2}} if selection == "proxy" else {}
    model, fit, held_out = fitted(family, {**SCHEDULE, "ffn_selection": selection, **proxy})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in model.parameters()]
    brought = distill(model, fit, held_out, SECTION)
    assert brought["after"] < brought["before"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("_update." in name for name in changed)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    with torch.no_grad():
        checked = torch.cat(held_out)[: 4 * 80].view(4, 1, 80)
        kept = sum(float(loss(model, ids, 16)) for ids in checked) / 4
    assert kept == pytest.approx(brought["after"], rel=1e-5)


def test_the_same_steps_bring_the_same():
    runs = [distill(*fitted(), SECTION) for _ in range(2)]
    assert runs[0] == runs[1]


def test_scores_get_no_gradient(monkeypatch):
    model, _, held_out = fitted()
    kind, scores = type(model.model.layers[-1]), []
    own = kind._scores
    monkeypatch.setattr(kind, "_scores", lambda *args: scores.append(own(*args)) or scores[-1])
    with trained(model, [each for name, each in model.named_parameters() if "_update." in name]):
        loss(model, torch.cat(held_out)[None, :80], 16).backward()
    assert len(scores) > 1 and not any(score.requires_grad for score in scores)


def test_the_gradient_is_that_of_finite_differences():
    model, _, held_out = fitted()
    model, ids = model.double(), torch.cat(held_out)[None, :80]
    with trained(model, [each for name, each in model.named_parameters() if "_update." in name]) as parameters:
        loss(model, ids, 16).backward()
        for parameter in parameters[:4]:  # of the first skipping layer, through all later ones
            gradient, step = parameter.grad.flatten(), 1e-4
            place = int(gradient.abs().argmax())
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * step
                    ends.append(float(loss(model, ids, 16)))
                    parameter.view(-1)[place] -= sign * step
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient[place]), rel=3e-2)


def test_steps_that_make_it_worse_are_taken_back(monkeypatch):
    model, fit, held_out = fitted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("spts_compress.fit.distill.RATE", 100.0)
    brought = distill(model, fit, held_out, SECTION)
    assert brought["after"] == brought["before"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_that_is_not_finite_is_left_out(monkeypatch):
    model, fit, held_out = fitted()
    steps = []

    def once_infinite(*args, loss=loss):
        found = loss(*args)
        steps.append(found.requires_grad)
        return found * float("inf") if sum(steps) == 2 and steps[-1] else found

    monkeypatch.setattr("spts_compress.fit.distill.loss", once_infinite)
    brought = distill(model, fit, held_out, SECTION)
    assert sum(steps) == SECTION.steps and brought["after"] < brought["before"]
    monkeypatch.setattr("spts_compress.fit.distill.loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"wider model\.dtype"):
        distill(model, fit, held_out, SECTION)


def test_layers_that_skip_nothing_of_these_prompts_are_left(monkeypatch):
    stages = [{"end": 2, "budget": 100}, {"end": 4, "budget": {"fraction": 0.3}}]
    model, fit, held_out = fitted(schedule={**SCHEDULE, "stages": stages})
    before = model.model.layers[1].ffn_update.bias.clone()
    assert distill(model, fit, held_out, SECTION)["after"] > 0
    assert torch.equal(model.model.layers[1].ffn_update.bias, before)


def test_a_recipe_distils_says_what_it_brought_and_keeps_it(corpus, tmp_path):
    recipe = recipe_for(tiny_base(tmp_path / "base"), corpus, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    data["schedule"] = {**SCHEDULE, "start": 2, "stages": [{"end": 4, "budget": {"fraction": 0.4}}]}
    data["distill"] = {"steps": 4, "length": 64, "following": 16}
    recipe.write_text(yaml.safe_dump(data))
    run("recipe", recipe)
    report = json.loads((tmp_path / "out/spts_report.json").read_text())
    assert report["distilled"]["after"] <= report["distilled"]["before"]
    section = load(recipe).calibration
    text = blocks(section, documents(section), AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert text.checked and {*report["fitted_on"]} == text.fitted | text.checked  # which decides what is kept
    [brought] = [part for part in run("inspect", tmp_path / "out").split("\n\n") if part.startswith("Gradient steps")]
    assert f"(KL {report['distilled']['before']:.3f} -> " in brought or "brought the updates nothing" in brought
    assert brought in (tmp_path / "out/README.md").read_text()
    [unit] = (tmp_path / "out.work").glob("distilled-*")
    made = unit.stat().st_mtime_ns
    run("recipe", recipe, "--force")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("distilled-*")] == [made]
    half = "{fraction: 0.5}"
    pruning = f"{{end: 3, budget: {{fraction: 1.0}}, prune_to: {half}}}, {{end: 4, budget: {half}}}"
    for edits, line in (
        (["schedule.update=null", "schedule.kv=null"], "has distill.steps, but no updates"),
        (["distill.length=100000"], "distill.length and distill.following: 100016 is more than the model's context"),
        (["distill.length=300"], "raise calibration.tokens"),
        (["schedule.stages=[{end: 4, budget: 100}]"], "distill.length: no update is used in 64 tokens; raise it"),
        ([f"schedule.stages=[{pruning}]"], "distill.length: no update is used in 64 tokens; raise it"),
    ):
        output = run("recipe", recipe, *[word for edit in edits for word in ("--set", edit)], "--force", code=2)
        [error] = [text for text in output.splitlines() if text.startswith("error: ")]
        assert line in error
