"""Corrections of the probing queries, fitted to what the answer attends to."""

import json
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from helpers import recipe_for, run
from safetensors import safe_open
from scipy.special import rel_entr
from tiny import BARE, TEXT, stock_twin, tiny_base, tiny_model, tiny_tokenizer

from spts_compress.fit import queries
from spts_compress.fit.descent import Progress
from spts_compress.fit.queries import answered, fit_queries, loss, scoring, texts_of
from spts_compress.fit.updates import blank
from spts_compress.recipe import QueriesSection
from spts_compress.tasks.agreement import QUESTIONS
from spts_compress.utils.errors import UserError

PROBE = {"window_size": 4, "kernel_size": 5, "rank": 3}
SCHEDULE = {**BARE, "probe": PROBE, "sink_tokens": 2, "recent_tokens": 6}
SECTION = QueriesSection(steps=24, length=512, following=8)


def uncorrected(family="llama", context=256, vocabulary=97, **probe):
    """A tiny model whose corrections add nothing yet."""
    sizes = {"max_position_embeddings": context, "vocab_size": vocabulary}
    model = tiny_model(family, {**SCHEDULE, "probe": {**PROBE, **probe}}, **sizes)
    none = blank(model.config.schedule(), model.config, torch.float32, queries=True)
    model.load_state_dict({**model.state_dict(), **none})
    return model


def random_texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(row.tolist(), 8) for row in torch.randint(3, 97, (count, 64), generator=generator)]


def shares(scores):
    """What candidates that have to be chosen get, each with its neighbours."""
    smooth = np.convolve(scores, np.ones(5) / 5, mode="same")[2:-6]
    return smooth / smooth.sum()


@pytest.mark.parametrize("heads", ["mean", {"1": [0, 3], "3": [2]}])
def test_the_loss_is_the_divergence_from_what_later_tokens_attend_to(heads):
    model = uncorrected(heads=heads)
    stock = stock_twin(model)
    stock.set_attn_implementation("eager")
    [text] = random_texts(1, 5)
    with torch.no_grad():
        attentions = stock(torch.tensor([text[0]]), output_attentions=True).attentions
        early = stock(torch.tensor([text[0][:56]]), output_attentions=True).attentions
    layers = [1, 2, 3, 4] if heads == "mean" else [1, 3]
    assert scoring(model.config.schedule(), model.config, 64) == layers
    expected = []
    for layer in layers:
        wanted = attentions[layer][0, :, 56:, :56].mean((0, 1))
        own = slice(None) if heads == "mean" else heads[str(layer)]
        found = early[layer][0, own, 52:].mean((0, 1))
        expected.append(rel_entr(*(shares(s.double().numpy()) for s in (wanted, found))).sum())
    assert float(loss(model, layers, text).detach()) == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "phi3", "qwen3"])
def test_steps_bring_scores_nearer_and_change_corrections_alone(family):
    model = uncorrected(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in model.parameters()]
    texts, checked = random_texts(4, 1) * 6, random_texts(3, 1)
    brought = fit_queries(model, texts, checked, SECTION)
    assert brought["after"] < brought["before"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = scoring(model.config.schedule(), model.config, SECTION.tokens)
    assert {int(name.split(".")[2]) for name in changed} == set(layers)
    assert all(".probe_update." in name for name in changed)
    assert layers == ([1, 4] if family == "gemma3_text" else [1, 2, 3, 4])  # others have windows
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    with torch.no_grad():
        kept = np.mean([float(loss(model, layers, text)) for text in checked])
    assert kept == pytest.approx(brought["after"], rel=1e-4)


def test_the_gradient_is_that_of_finite_differences():
    model = tiny_model("llama", SCHEDULE).double()
    [text] = random_texts(1, 7)
    parameter = model.model.layers[2].probe_update.down
    loss(model, [1, 2], text).backward()
    place, step, ends = int(parameter.grad.abs().argmax()), 1e-3, []  # scores are in float32
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * step
            ends.append(float(loss(model, [1, 2], text)))
            parameter.view(-1)[place] -= sign * step
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(parameter.grad.flatten()[place]), rel=2e-2)


def test_texts_are_stretches_and_needles_with_their_answers():
    tokenizer = tiny_tokenizer()
    stream = torch.tensor(tokenizer(TEXT * 60)["input_ids"])
    section = QueriesSection(length=2048, following=200, seed=3)
    made = texts_of([stream[:900], stream[900:]], tokenizer, section, 18, 0)
    assert made == texts_of([stream], tokenizer, section, 18, 0)
    answers = []
    for (stretch, following), (needle, answer) in zip(made[::2], made[1::2], strict=True):
        assert len(stretch) == 2248 and following == 200 and len(needle) <= 2248
        assert str(stretch)[1:-1] in str(stream.tolist())
        prompt, said = tokenizer.decode(needle[:-answer]), tokenizer.decode(needle[-answer:])
        answers += said.strip().split(", ")
        assert all(part in prompt for part in said.strip().split(", "))
    assert all(first[0] != second[0] for first, second in pairwise(made[::2]))
    others = [tokenizer.decode(text) for text, _ in texts_of([stream], tokenizer, section, 18, 1)[1::2]]
    assert not any(answer in other for other in others for answer in answers if answer.isdigit())
    short = QueriesSection(length=2048, following=4)
    assert all(len(text) <= 2052 for text, _ in texts_of([stream], tokenizer, short, 18, 0))


def test_questions_get_the_dense_models_own_answers():
    tokenizer, rng, words = tiny_tokenizer(), random.Random(1), TEXT.replace(".", "").split()
    stream = torch.tensor(tokenizer(" ".join(" ".join(rng.sample(words, 8)) + "." for _ in range(200)))["input_ids"])
    made = texts_of([stream], tokenizer, QueriesSection(kinds=["questions", "text"], length=600, following=6), 22, 0)
    questions = [ids for ids, following in made if not following]
    prompts = [tokenizer.decode(ids) for ids in questions]
    assert len({*prompts}) == 11 and all(following == 6 for _, following in made[1::2])
    for prompt, asked in zip(prompts, QUESTIONS * 3, strict=False):
        assert all(part in prompt for part in re.split(r"\{\w+\}", asked))
    stock = stock_twin(uncorrected(context=1024, vocabulary=len(tokenizer)))
    alone = [stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0].tolist() for ids in questions]
    wanted = [(ids, len(ids) - len(question)) for ids, question in zip(alone, questions, strict=True)]
    found = answered(stock, made, 6)
    assert found[::2] == wanted and found[1::2] == made[1::2]
    first = alone[0][len(questions[0]) :]
    stock.generation_config.eos_token_id = first[2]  # an answer ends there, whatever its batch goes on with
    ids, following = answered(stock, made, 6)[0]
    assert ids[-following:] == first[: first.index(first[2]) + 1]


@pytest.mark.parametrize("killed", [10, 20])
def test_steps_go_on_where_a_run_was_killed(killed):
    texts, checked = random_texts(4, 1) * 6, random_texts(3, 1)
    alone, kept = uncorrected(), {}

    def write(state):
        kept.update({name: value.clone() for name, value in state.items()})
        if state["done"] == killed:
            raise KeyboardInterrupt

    brought = fit_queries(alone, texts, checked, SECTION)
    with pytest.raises(KeyboardInterrupt):
        fit_queries(uncorrected(), texts, checked, SECTION, Progress(lambda: None, write))
    model, left = uncorrected(), [*texts[:killed], *texts[killed:]]
    left[:killed] = [None] * killed  # which are not read again
    assert fit_queries(model, left, checked, SECTION, Progress(lambda: kept)) == brought
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())


class Killed(BaseException):
    """What nobody catches."""


def test_a_killed_recipe_fits_the_rest(tmp_path, monkeypatch):
    recipe = corrected_recipe(tmp_path, kinds=["questions"], steps=12, length=1024, following=4)
    settings = json.loads((tmp_path / "base/generation_config.json").read_text())
    (tmp_path / "base/generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    monkeypatch.setattr(queries, "TOGETHER", 8 * 1030)
    counts = {"_answers": 0, "layer_loss": 0}

    def count(name, stop=None):
        function = getattr(queries, name)

        def counted(*args):
            assert name == "layer_loss" or args[0].generation_config.repetition_penalty == 1.3
            counts[name] += 1
            if counts[name] == stop:
                raise Killed
            return function(*args)

        monkeypatch.setattr(queries, name, counted)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(queries, "_answers", queries._answers)
        count("_answers", stop=2)
        run("recipe", recipe)
    layers, checked = 3, queries.CHECKED
    count("_answers")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(queries, "layer_loss", queries.layer_loss)
        count("layer_loss", stop=layers * (checked + 4 + checked + 4 + checked + 3))
        run("recipe", recipe)
    assert counts["_answers"] == 2 + 3  # of 12 questions and 9, of which the first 8 were kept
    counts["layer_loss"] = 0
    count("layer_loss")
    run("recipe", recipe)
    assert counts == {"_answers": 5, "layer_loss": layers * (checked + 2 + checked)}
    assert not [*tmp_path.glob("out.work/queries-begun*")]


def test_attention_that_is_not_finite_is_said():
    model = uncorrected()
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"wider model\.dtype"):
        fit_queries(model, random_texts(4, 1), random_texts(2, 2), SECTION)


def test_one_call_can_do_without_corrections_but_not_with_others():
    model, ids = tiny_model("llama", SCHEDULE), torch.arange(3, 63)[None]
    with torch.no_grad():
        own, without = (model(ids, logits_to_keep=1, spts={"probe": {**PROBE, "rank": r}}).logits for r in (3, 0))
        assert not torch.equal(own, without)
        assert torch.equal(own, model(ids, logits_to_keep=1).logits)
    with pytest.raises(ValueError, match=r"probe\.rank can't be changed"):
        model(ids, logits_to_keep=1, spts={"probe": {"rank": 2}})


def corrected_recipe(tmp_path, **section):
    """A recipe of a tiny model with corrections, whose `queries` are these."""
    (texts := tmp_path / "texts").mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(" ".join(f"{n} {TEXT}" for n in range(number * 99, number * 99 + 40)))
    recipe = recipe_for(tiny_base(tmp_path / "base"), texts, tmp_path)
    data = yaml.safe_load(recipe.read_text())
    schedule = {**SCHEDULE, "start": 2, "stages": [{"end": 4, "budget": {"fraction": 0.4}}]}
    data["schedule"] = {name: value for name, value in schedule.items() if name != "proxy"}
    data["calibration"] |= {"tokens": 8192, "held_out": 0.25}
    data["queries"] = section
    recipe.write_text(yaml.safe_dump(data))
    return recipe


def test_a_recipe_fits_them_says_what_they_bring_and_keeps_them(tmp_path):
    recipe = corrected_recipe(tmp_path, steps=4, length=1024, following=16)
    data = yaml.safe_load(recipe.read_text())
    run("recipe", recipe)
    report = json.loads((tmp_path / "out/spts_report.json").read_text())
    assert report["queries"]["after"] <= report["queries"]["before"]
    [brought] = [part for part in run("inspect", tmp_path / "out").split("\n\n") if part.startswith("Corrections")]
    assert (
        f"KL {report['queries']['before']:.3f} -> " in brought and brought in (tmp_path / "out/README.md").read_text()
    )
    assert "corrected at rank 3" in run("recipe", recipe, "--dry-run")
    made = [unit.stat().st_mtime_ns for unit in (tmp_path / "out.work").glob("queries-*")]
    assert len(made) == 1
    (again := tmp_path / "again.yaml").write_text((tmp_path / "out/recipe.resolved.yaml").read_text())
    run("recipe", again, "--force", "--set", "report.seed=5")
    assert [unit.stat().st_mtime_ns for unit in (tmp_path / "out.work").glob("queries-*")] == made
    for edit, line in (
        ("calibration.tokens=3000", "queries: a prompt and what follows it are 1040 tokens"),
        ("schedule.recent_tokens=600", "queries.length: 602 of 1024 tokens are always active; raise it"),
        ("schedule.probe.rank=0", "has queries, but no corrections"),
        ("queries.length=2040", "queries.length and queries.following: 2056 is more than the model's context of 2048"),
    ):
        assert line in run("recipe", recipe, "--force", "--set", edit, code=2)
    run("recipe", recipe, "--force", "--set", "schedule.kv=0.5")  # asks alike
    assert [unit.stat().st_mtime_ns for unit in (tmp_path / "out.work").glob("queries-*")] == made
    search = {
        "speedup": 1.15, "lengths": [600], "kinds": ["free"], "prompts": 1, "answer_tokens": 8, "candidates": 4,
        "rounds": 1, "starts": [2, 3], "choices": {"ffn_selection": ["relative"]}, "probe_rank": 2,
        "update": {"attention_rank": 0, "ffn_rank": 4},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump({**{k: v for k, v in data.items() if k != "schedule"}, "search": search}))
    run("recipe", recipe, "--force")
    assert json.loads((tmp_path / "out/config.json").read_text())["spts"]["probe"]["rank"] == 2
    assert "searched is without the corrections" in (tmp_path / "out/README.md").read_text()
    with safe_open(tmp_path / "out/spts-proxies.safetensors", "pt") as tensors:
        named = {name.split(".")[3] for name in tensors.keys()}  # noqa: SIM118
    assert named == {"probe_update", "attention_update", "ffn_update", "proxy"}


def test_windows_shorter_than_the_texts_are_told_before_the_run(tmp_path):
    base = tiny_base(tmp_path / "base", "mistral", sliding_window=1000, max_position_embeddings=2048)
    data = {
        "model": {"path": str(base)},
        "schedule": {"start": 2, "stages": [{"end": 4, "budget": 40}], "probe": PROBE, "ffn_selection": "attention"},
        "export": {"path": str(tmp_path / "out")},
    }
    (recipe := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert "corrected at rank 3" in run("recipe", recipe, "--dry-run")  # its length is cut to the windows
    output = run("recipe", recipe, "--dry-run", "--set", "queries.length=1000", code=2)
    assert "all heads that score have windows of less than 1048 tokens; lower it" in output
