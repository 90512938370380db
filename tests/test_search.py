"""The search: shared dense work gives the same figures as whole runs, and the search finds what is there."""

import random
import re
from typing import get_args

import pytest
import torch
from tiny import TEXT, stock_twin, tiny_model, tiny_tokenizer

from spts_compress.cost import predicted
from spts_compress.modeling.configuration_spts import Amount, Probe, Proxy, Schedule, Stage, Update
from spts_compress.recipe import ChoicesSection, Kind, ScheduleParams, SearchSection
from spts_compress.search import dense_reference, evaluator, halving, prompts, run, space, tables, winner
from spts_compress.search.dense_reference import DenseReference
from spts_compress.search.halving import Candidate
from spts_compress.search.prompts import PromptSet
from spts_compress.search.retrieval_heads import FINDING, reliability, retrieval_heads
from spts_compress.search.space import Costs
from spts_compress.tasks import agreement
from spts_compress.tasks.example import Example
from spts_compress.tasks.runner import Answers, encode, ways_of
from spts_compress.timing.latency_table import grid
from spts_compress.utils.distributed import SINGLE_PROCESS
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store, fingerprint

TOKENIZER = tiny_tokenizer()
KINDS = ("retrieval", "multi-hop", "free")


def schedule(start, **changes):
    block = {
        "start": start,
        "stages": [
            {"end": 3, "budget": {"fraction": 0.5}, "prune_to": {"fraction": 0.7}},
            {"end": 4, "budget": {"fraction": 0.4}},
        ],
        "proxy": {"channels": 12, "rank": 4},
        "probe": {"window_size": 4, "heads": "max", "score_carry": 1.0, "kernel_size": 3},
    }
    return Schedule.from_dict({**block, **changes}, 5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v2"])
@pytest.mark.parametrize(("start", "kept", "heads"), [(1, 0, "max"), (3, 2, "max"), (3, 1, {"3": [1, 2]})])
def test_a_tail_on_kept_states_equals_the_whole_model(family, start, kept, heads, tmp_path):
    searched = schedule(start, probe={"window_size": 4, "heads": heads, "score_carry": 1.0, "kernel_size": 3})
    whole = tiny_model(family, schedule(1).to_dict(), vocab_size=300)
    item = Example("free_answer", 0, TEXT * 2, [], 0, 0, 6)
    store = Store(tmp_path)
    dense = dense_reference.answer(stock_twin(whole), TOKENIZER, item, [kept], store, "key")
    assert dense.states_before(start)[0] == kept
    found = evaluator.compare(whole, searched, dense)

    whole.config.spts = searched.to_dict()
    ids = encode(TOKENIZER, [item.text], whole.device)["input_ids"]
    own = stock_twin(whole).generate(ids, do_sample=False, max_new_tokens=6)
    count = own.shape[1] - ids.shape[1]
    logs = [agreement.log_probabilities(way, own[:, :-1], count) for way in ways_of(whole).values()]
    expected = agreement.agreement(*logs)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4) and expected["kl"] > 0
    assert found["top1"] == pytest.approx(expected["top1"]) and found["same"] == (expected["top1"] == 1)

    again = dense_reference.answer(None, TOKENIZER, item, [kept], store, "key")  # kept, so no model is needed
    assert torch.equal(again.final, dense.final) and torch.equal(again.answer, own[0, ids.shape[1] :].cpu())


def test_a_shape_at_a_cost_costs_that_and_no_more():
    config = tiny_model(vocab_size=300).config
    costs = Costs(config, 1000, {layer: Proxy(12, 4) for layer in range(1, 5)})
    rng, choices = random.Random(3), ChoicesSection(heads=["mean", "max"]).from_starts([1, 2, 3])
    reached = 0
    for _ in range(40):
        params = space.vary(rng, space.draw(rng, choices), choices, space.draw(rng, choices))
        scaled = costs.scale_to_cost(params, ("speedup", 1.3))
        if scaled is not None:
            reached += 1
            assert [*scaled.faults(5)] == []
            assert 1.3 <= predicted(config, scaled, 1000)["speedup"] < 1.4
            own = (params.start, params.kernel_size, params.ffn_selection)
            assert (scaled.start, scaled.probe.kernel_size, scaled.ffn_selection) == own
    assert reached > 20
    assert costs.scale_to_cost(ScheduleParams(4), ("speedup", 3.0)) is None
    assert 0.7 < predicted(config, costs.scale_to_cost(ScheduleParams(1), ("kv_share", 0.8)), 1000)["kv_share"] <= 0.8


def test_a_candidate_that_breaks_the_model_loses():
    schedules = [Schedule(1, (Stage(4, Amount(share)),), ffn_selection="attention") for share in (0.2, 0.3, 0.4)]
    kl = dict(zip(schedules, (float("nan"), 0.2, 0.1), strict=True))

    def evaluate(some, count):
        return [[{"kind": "free", "kl": kl[each], "top1": 0.5, "same": False}] * count for each in some]

    tried = halving.halve([Candidate(ScheduleParams(1), each, {}, []) for each in schedules], 2, 1, evaluate)
    assert [each.schedule for each in tried] == schedules[::-1]


def test_kv_is_drawn_where_there_are_updates():
    ranks = {"attention_rank": 0, "ffn_rank": 4}
    with_updates, without = SearchSection(update=ranks), SearchSection()
    assert with_updates.drawn_from(24)["kv"] == (None, 0.5, 0.75, 1.0) and without.drawn_from(24)["kv"] == (None,)
    assert (with_updates.start_layers(24)[0], without.start_layers(24)[0]) == (4, 8)
    update = (Update(**ranks),)
    costs = Costs(
        tiny_model(vocab_size=300).config, 1000, {layer: Proxy(12, 4) for layer in range(1, 5)}, update=update
    )
    found = costs.scale_to_cost(ScheduleParams(1, kv=1.0, margin=0.0), ("speedup", 1.2))
    assert found.update == update and found.kv == 1.0 and [*found.faults(5)] == []
    assert 1.2 <= predicted(costs.config, found, 1000)["speedup"] < 1.25
    assert predicted(costs.config, found, 1000)["kv_share"] == 1.0


def test_halving_finds_the_best_shape_and_repeats_itself():
    """A made-up loss with one best start and pool."""
    costs = Costs(tiny_model(vocab_size=300).config, 1000, {layer: Proxy(12, 4) for layer in range(1, 5)})
    options = {"starts": [1, 2, 3, 4], "choices": {"heads": ["mean", "max"]}, "kinds": ["free"], "lengths": [512, 600]}
    section, calls = SearchSection(**options, prompts=4, candidates=24, rounds=3, seed=5), []

    def loss(schedule):
        return abs(schedule.start - 3) + abs(schedule.probe.kernel_size - 15) / 15 + (schedule.probe.heads == "mean")

    def evaluate(some, count):
        calls.extend([count] * len(some))
        return [[{"kind": "free", "kl": loss(each), "top1": 0.5, "same": False}] * count for each in some]

    runs = [halving.search(costs, ("speedup", 1.2), evaluate, section, []) for _ in range(2)]
    assert [c.schedule for c in runs[0]] == [c.schedule for c in runs[1]]
    best = runs[0][0]
    assert (best.params.start, best.params.heads, best.params.kernel_size) == (3, "max", 15) and len(best.rows) == 8
    assert calls.count(2) > 2 * calls.count(8)  # long evaluations are for good candidates
    assert len({c.schedule for c in runs[0]}) == len(runs[0])


def test_no_schedule_that_was_tried_on_all_prompts_is_better_than_the_winner():
    """Losses that differ much from prompt to prompt, so that the first few often mislead."""
    costs = Costs(tiny_model(vocab_size=300).config, 1000, {layer: Proxy(12, 4) for layer in range(1, 5)})
    options = {"starts": [1, 2, 3, 4], "choices": {"heads": ["mean", "max"]}, "kinds": ["free"], "lengths": [512]}
    for seed in range(8):
        section, whole = SearchSection(**options, prompts=24, candidates=32, rounds=2, seed=seed), []

        def evaluate(some, count, seed=seed, whole=whole):
            draws = [random.Random(f"{seed} {each}") for each in some]
            found = [[{"kind": "free", "kl": d.lognormvariate(0, 1.2), "top1": 0.5} for _ in range(24)] for d in draws]
            found = [[{**row, "same": False} for row in rows[:count]] for rows in found]
            whole.extend(evaluator.loss(rows) for rows in found if count == 24)
            return found

        pool = halving.search(costs, ("speedup", 1.2), evaluate, section, [])
        assert pool[0].loss == min(whole) and len(pool[0].rows) == 24


def test_candidates_that_do_the_same_count_once():
    """Twenty candidates alike and better than four others: one of them goes on, and others beside it."""

    def candidate(number, kl):
        return Candidate(ScheduleParams(1, floor=number), schedule(1, recent_tokens=number + 1), {"kl": kl}, [])

    alike = [candidate(number, 1.0) for number in range(20)]
    others = [candidate(20 + number, 2.0 + number) for number in range(4)]
    losses = {c.schedule: c.cost["kl"] for c in alike + others}

    def evaluate(some, count):
        return [[{"kind": "free", "kl": losses[each], "top1": 0.5, "same": False}] * count for each in some]

    tried = halving.halve(alike + others, 8, 2, evaluate)
    assert [c.loss for c in tried if len(c.rows) == 8] == [1.0, 2.0, 3.0, 4.0]
    assert len(tried) == 24 and [c.params.floor for c in tried if c.loss == 1.0] == list(range(20))


def test_prompts_that_dense_answers_wrongly_are_replaced(tmp_path, monkeypatch):
    """With a made-up judgement; the order of kinds and lengths stays, and what is never right is kept and named."""
    prose = " ".join(f"{TEXT} That was on day {number} of the long journey." for number in range(60))
    section = SearchSection(
        lengths=[5000, 6000], kinds=["retrieval", "multi-hop"], prompts=2, answer_tokens=8, require_dense_correct=True
    )
    prompt_set = PromptSet(section, TOKENIZER, prose).filled(SINGLE_PROCESS)
    assert len(prompt_set.items) == 16 and len({item.text for item in prompt_set.items}) == 16
    assert [item.limit for item in prompt_set.items] == [5000, 6000] * 8
    never, second = prompt_set.items[3], prompt_set.make(5, 1)
    wrong = {
        prompt_set.items[5].text,
        never.text,
        *(prompt_set.make(3, attempt).text for attempt in range(dense_reference.ATTEMPTS)),
    }

    def answer(model, tokenizer, item, layers, store, key):
        reference = DenseReference(item, None, None, store, fingerprint(item.text), layers)
        store.put_tensors("dense-layer-0", reference.key, {"states": torch.zeros(1)})
        return reference

    monkeypatch.setattr(dense_reference, "answer", answer)
    monkeypatch.setattr(dense_reference.DenseReference, "right", lambda self, tokenizer: self.item.text not in wrong)
    said = []
    done = dense_reference.answer_all(None, prompt_set, [0], Store(tmp_path), "key", said.append, SINGLE_PROCESS)
    expected = [*prompt_set.items]
    expected[5], expected[3] = second, prompt_set.make(3, dense_reference.ATTEMPTS - 1)
    assert [d.item for d in done] == expected and second.text != prompt_set.items[5].text
    assert (second.limit, second.task) == (prompt_set.items[5].limit, prompt_set.items[5].task)
    assert len(list(tmp_path.glob("dense-layer-0-*"))) == 16  # the states of those replaced are gone
    assert said == [f"1 of 16 prompts ({never.task}) were never answered rightly; they count too"]


@pytest.mark.parametrize(
    ("said", "outputs", "right"), [("the 12 and 7", ["12", "7"], True), ("12", ["12", "7"], False), ("so", [], True)]
)
def test_an_answer_is_right_if_all_of_what_is_known_is_in_it(said, outputs, right):
    item = Example("niah_multivalue", 0, TEXT, outputs, 0, 0, 6)
    answer = torch.tensor(TOKENIZER(said, add_special_tokens=False)["input_ids"])
    assert DenseReference(item, answer, None, None, "key", []).right(TOKENIZER) == right


def test_every_kind_of_prompt_counts_from_the_first_round_on():
    assert halving.rungs(40, 10) == [10, 20, 40] and halving.rungs(32, 16) == [16, 32] and halving.rungs(3, 3) == [3]


def test_the_loss_counts_the_worst_kind():
    rows = [{"kind": k, "kl": kl, "top1": 1.0, "same": True} for k, kl in (("a", 1.0), ("a", 3.0), ("b", 0.0))]
    assert evaluator.loss(rows) == pytest.approx((1.0 + 2.0) / 2)


def made_prompts(kinds, prose, **options):
    """The prompts of at most 6000 tokens that are searched on."""
    section = SearchSection(kinds=list(kinds), lengths=[6000], **options)
    return [PromptSet(section, TOKENIZER, prose).make(number) for number in range(section.num_prompts)]


def test_prompts_take_turns_and_other_seeds_give_other_texts():
    prose = " ".join(f"{TEXT} That was on day {number} of the long journey." for number in range(60))
    one, two = (made_prompts(KINDS, prose, prompts=3, seed=seed) for seed in (1, 2))
    assert [prompts.kind_of(item, KINDS) for item in one] == ["retrieval", "multi-hop", "free"] * 3
    assert not {item.text for item in one} & {item.text for item in two}
    assert all(item.tokens + item.answer_tokens <= 6000 for item in one)


def test_single_tasks_are_kinds_of_their_own():
    known = {"free", *prompts.GROUPS, *prompts.RETRIEVAL, *prompts.MULTI_HOP, "niah_single_1"}
    assert set(get_args(Kind)) == known
    prose = " ".join(f"{TEXT} That was on day {number} of the long journey." for number in range(60))
    kinds = ["niah_multiquery", "retrieval", "vt", "multi-hop"]
    made = made_prompts(kinds, prose, prompts=7, seed=3)
    assert [item.task for item in made][::4] == ["niah_multiquery"] * 7
    assert [prompts.kind_of(item, kinds) for item in made] == kinds * 7  # no task is of two kinds
    with pytest.raises(UserError, match="multi-hop is nothing but tasks that are kinds of their own; leave it out"):
        made_prompts([*prompts.MULTI_HOP, "multi-hop"], prose, prompts=1)


def test_what_confirms_a_search_was_not_searched_on():
    """Though each prompt is about a stretch from a random place, of few sentences."""
    section = SearchSection(kinds=["free"], lengths=[512], prompts=16)
    prose = " ".join(f"The {n} owls of wood number {n} sleep in a warm and quiet old tree." for n in range(32))
    items = PromptSet(section, TOKENIZER, prose).filled(SINGLE_PROCESS).items
    assert len({item.text for item in items}) == len(items) == 32
    numbers = [
        {int(number) for item in half for number in re.findall(r"\d+", item.text)} for half in (items[:16], items[16:])
    ]
    assert numbers == [{*range(16)}, {*range(16, 32)}]  # and no sentence is in prompts of both halves
    with pytest.raises(UserError, match=r"search\.text: the text is too short, .* for 32 different prompts"):
        PromptSet(section, TOKENIZER, TEXT * 9).filled(SINGLE_PROCESS)


def test_free_answers_are_about_stretches_of_their_own_where_there_is_text_enough():
    section = SearchSection(kinds=["free"], lengths=[512], prompts=6)
    prose = " ".join(f"Owl {n} sleeps in a warm and quiet old tree{' of the wood' * (n % 7)}." for n in range(600))
    made = PromptSet(section, TOKENIZER, prose)
    assert not made.notes
    numbers = [set(re.findall(r"Owl (\d+) sleeps", item.text)) for item in made.filled(SINGLE_PROCESS).items]
    assert sum(map(len, numbers)) == len(set().union(*numbers))


@pytest.mark.parametrize(("count", "repeats", "shares"), [(8, True, True), (100, False, True), (4000, False, False)])
def test_text_shorter_than_the_prompts_of_a_search_is_told(count, repeats, shares):
    section = SearchSection(kinds=["free"], lengths=[512], prompts=16)
    prose = " ".join(f"The owls of wood number {n % 100} sleep in a warm and quiet old tree." for n in range(count))
    notes = " ".join(PromptSet(section, TOKENIZER, prose).notes)
    assert ("shorter than a prompt of 512 tokens" in notes, "share parts of it" in notes) == (repeats, shares)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_a_layer_is_reliable_if_its_top_tokens_are_what_the_answer_attends_to(family, tmp_path):
    """Against stock eager attention: the answer's attention to each layer's top quarter by the prompt's last query."""
    whole = tiny_model(family, schedule(1).to_dict(), vocab_size=300)
    item = Example("free_answer", 0, TEXT * 2, [], 0, 0, 6)
    stock = stock_twin(whole)
    dense = dense_reference.answer(stock, TOKENIZER, item, [0], Store(tmp_path), "key")
    found = reliability(whole, TOKENIZER, Probe(), dense)
    ids = encode(TOKENIZER, [item.text], whole.device)["input_ids"]
    length = ids.shape[1]
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = stock(torch.cat([ids, dense.answer[None]], dim=1), output_attentions=True).attentions
    for share, weights in zip(found, attentions, strict=True):
        mean = weights[0].mean(0)
        ranking = mean[length - 1, 4 : length - 1]
        answer = mean[length:, 4 : length - 1].mean(0)
        top = ranking.argsort(descending=True)[: round(len(ranking) / 4)]
        assert share == pytest.approx(float(answer[top].sum() / answer.sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_a_head_is_worth_what_it_finds_of_the_copied_tokens(family, tmp_path):
    """Against stock eager attention, head by head and token by token."""
    whole = tiny_model(family, schedule(1).to_dict(), vocab_size=300)
    stock = stock_twin(whole)
    dense = dense_reference.answer(
        stock, TOKENIZER, Example("free_answer", 0, TEXT * 4, [], 0, 0, 6), [0], Store(tmp_path), "key"
    )
    ids = encode(TOKENIZER, [dense.item.text], whole.device)["input_ids"]
    length = ids.shape[1]
    dense.answer[:] = ids[0, 200:206]  # random weights copy nothing by themselves
    found = retrieval_heads(whole, TOKENIZER, dense)
    whole_ids = torch.cat([ids, dense.answer[None]], dim=1)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = torch.cat(stock(whole_ids, output_attentions=True).attentions)  # layers, heads, T, T
    copied = torch.zeros(length)
    for place in range(length):
        for end in range(length, whole_ids.shape[1]):
            if whole_ids[0, place] == whole_ids[0, end]:
                copied[place] += attentions[:, :, end - 1, place].mean()
    middle, reach = slice(4, length - FINDING.window_size), FINDING.kernel_size // 2
    for layer, row in enumerate(found):
        for head, worth in enumerate(row):
            raw = attentions[layer, head, length - FINDING.window_size : length].mean(0)
            score = [float(raw[max(0, i - reach) : i + reach + 1].max()) for i in range(length)]
            order = sorted(range(*middle.indices(length)), key=lambda i: (score[i], float(raw[i]), i), reverse=True)
            top = order[: round(len(order) / 10)]
            assert worth == pytest.approx(float(copied[top].sum() / copied[middle].sum()), abs=1e-4)


@pytest.mark.parametrize(("start", "margin", "stages"), [(1, 0.0, 1), (2, 1.0, 1), (3, 1.3, 2), (2, 1.0, 3)])
def test_a_filter_drops_tokens_for_good_in_its_first_layer_alone(start, margin, stages):
    costs = Costs(tiny_model(vocab_size=300).config, 1000, {layer: Proxy(12, 4) for layer in range(1, 5)})
    params = ScheduleParams(start, filters=True, stages=stages, decay=1.0, margin=margin)
    found = costs.scale_to_cost(params, ("speedup", 1.1))
    assert [*found.faults(5, 4)] == [] and found.start == start
    first, *others = (found.counts(layer, 1000) for layer in range(start, 5))
    assert first.active == first.ffn_tokens == 1000 > first.candidates_out
    assert {count.candidates_in for count in others[:1]} == {first.candidates_out}
    budgets = {count.active for count in others}
    assert len(budgets) == 1 and (budgets == {first.candidates_out}) == (margin <= 1.0)


def test_shapes_choose_heads_by_what_they_find():
    config = tiny_model(vocab_size=300).config
    proxies = {layer: Proxy(12, 4) for layer in range(1, 5)}
    heads = {(1, 0): 0.5, (1, 3): 0.3, (2, 1): 0.2, (3, 2): 1.0, (4, 0): 0.8, (4, 1): 0.1}

    def at(**values):
        params = ScheduleParams(**{"score_carry": 1.0, "stages": 1, **values})
        return Costs(config, 1000, proxies, heads).scale_to_cost(params, ("speedup", 1.1))

    early = at(start=3, heads=0.5)  # a stage in front that keeps all, in which the first head scores
    assert [*early.faults(5, 4)] == [] and early.probe.heads == ((1, 0), (3, 2), (4, 0)) and early.start == 1
    assert [early.counts(layer, 1000).active for layer in (1, 2)] == [1000, 1000]
    assert early.counts(3, 1000).active < 1000 and len(early.proxy) == 4
    own = at(start=3, heads=1.0)
    assert own.probe.heads == ((3, 2),) and own.start == 3
    lacking = at(start=2, heads=0.8)  # none so good up to the start: the best of those that are there
    assert lacking.probe.heads == ((1, 0), (3, 2), (4, 0)) and lacking.start == 1
    alone = at(start=3, heads=0.5, score_carry=0.0)  # nothing is carried, so that layer 1 would score in vain
    assert alone.probe.heads == ((3, 2), (4, 0)) and alone.start == 3


def test_what_is_tried_in_any_case_keeps_to_the_choices_of_the_recipe(monkeypatch):
    given = {"ffn_selection": ["attention"], "window_size": [8], "score_carry": [0.5, 0.25], "heads": ["max", 0.8]}
    section, tried = SearchSection(speedup=1.2, choices=given), []
    monkeypatch.setattr(run.halving, "search", lambda *values: tried.extend(values[-1]))
    costs = Costs(tiny_model(vocab_size=300).config, 1000, {}, {(1, 0): 1.0})
    run._front(section, costs, None, [], [], lambda _: None)
    assert len(tried) > 4 and all(getattr(seed, name) in values for seed in tried for name, values in given.items())
    assert {seed.kernel_size for seed in tried} == {1, 7, 31, 63, 95}  # what is not given stays


def test_a_measured_cost_takes_the_place_of_the_counted_one():
    model = tiny_model(vocab_size=300)
    latencies = run.latencies_of(stock_twin(model), 1000)
    assert latencies.tokens == grid(1000) and all(s > 0 for part in latencies.seconds.values() for s in part)
    measured, counted = (Costs(model.config, 1000, {}, None, table).of(schedule(1)) for table in (latencies, None))
    assert counted == predicted(model.config, schedule(1), 1000)
    assert measured == {
        **counted,
        "speedup": latencies.speedup(model.config, schedule(1), 1000),
        "flop_speedup": counted["speedup"],
    }


def test_one_stage_at_a_time_gets_fewer_and_more_tokens():
    found = list(winner.with_other_budgets(schedule(1)))
    assert [(stage, factor) for stage, factor, _ in found] == [(0, 0.7), (0, 1.4), (1, 0.7), (1, 1.4)]
    for stage, factor, changed in found:
        tokens = [changed.counts(layer, 1000).active for layer in range(1, 5)]
        plain = [schedule(1).counts(layer, 1000).active for layer in range(1, 5)]
        own = [a for a, layer in zip(tokens, range(1, 5), strict=True) if changed.stage_of(layer) == stage]
        before = [a for a, layer in zip(plain, range(1, 5), strict=True) if changed.stage_of(layer) == stage]
        assert all(a == pytest.approx(factor * b, abs=1) for a, b in zip(own, before, strict=True))
        assert sum(a != b for a, b in zip(tokens, plain, strict=True)) == len(own)  # and no other stage


def point(speedup, quality):
    """One point of a front, as `run` gives it."""
    chosen = schedule(2, proxy={"channels": 12, "rank": 4}).to_dict()
    best = {"params": {"start": 2}, "schedule": chosen, "loss": 0.2}
    return {
        "cost": {"speedup": speedup, "kv_share": 0.5}, "quality": quality, "interval": [quality - 0.1, quality + 0.05],
        "held_out": {"loss": 0.3, "kinds": {"free": {"same": 0.5}}}, "winner": best, "tried": [best, best],
        "budgets": [{"stage": 0, "factor": 0.7, "loss": 0.4}], "without": {"start": 0.5}, "diagnosis": ["a sign"],
    }  # fmt: skip


def drawn(search):
    tables.draw(search, 5, figure := pytest.importorskip("matplotlib.figure").Figure())
    return figure.axes


def test_a_front_is_drawn_if_it_has_more_than_one_point():
    both = [point(1.2, 0.9), point(1.5, 0.8)]
    rest = {"reliability": [0.5] * 5, "candidates": 2, "evaluations": 3, "seconds": {"all": 60, "dense": 6}}
    for points, chosen in ((both, 1), (both, None), (both[1:], 0)):
        search = {"points": points, "chosen": chosen, **rest}
        text, titles = tables.as_text(search), [panel.get_title() for panel in drawn(search)]
        assert len(titles) == 3 + len(points) and ("Front, on held-out prompts" in titles) == (len(points) == 2)
        assert "One stage's budget, 1.50x" in titles and "At 1.50x:" in text and text.endswith("a sign")
        assert "speed-up, FLOPs" in text and "Target missed" not in text
        assert "speed-up, by measured times" in tables.as_text({**search, "latencies": {}})
        assert ("1.50x *" in text) == (chosen is not None) and "0.800 (0.700-0.850)" in text
        assert "| start | 2      | 0.500" in text and "+0.300" in text


def test_tables_that_someone_wrote_in_are_kept(tmp_path):
    search = {"points": [point(1.5, 0.8)], "chosen": 0, "reliability": [0.5] * 5, "candidates": 2, "evaluations": 3}
    search["seconds"] = {"all": 60, "dense": 6}
    for _ in range(2):
        tables.save(search, tmp_path, 5)
    assert not (tmp_path / "search-1.md").exists()
    (tmp_path / "search.md").write_text(own := (tmp_path / "search.md").read_text() + "\nWhat I think of it.\n")
    tables.save({**search, "seconds": {"all": 600, "dense": 6}}, tmp_path, 5)
    assert (tmp_path / "search-1.md").read_text() == own and "10 minutes" in (tmp_path / "search.md").read_text()


def test_one_prompt_has_no_interval():
    pytest.importorskip("matplotlib")
    assert evaluator.quality([{"top1": 0.75}]) == (0.75, None)
    points = [{**point(1.2, 0.75), "interval": None}, point(1.5, 0.7)]
    search = {"points": points, "chosen": 0, "reliability": [0.5] * 5, "candidates": 2, "evaluations": 3}
    search["seconds"] = {"all": 60, "dense": 6}
    assert "| 0.750  " in tables.as_text(search) and len(drawn(search)) == 5


def test_kept_figures_count_and_have_the_kinds_of_this_search(tmp_path):
    kept = Answers(tmp_path / "rows.jsonl")
    reference = DenseReference(Example("vt", 0, TEXT, [], 9, 64, 4), *[None] * 5)
    key = fingerprint("key", schedule(2).to_dict(), None)
    kept.add({"key": key, "kind": "multi-hop", "task": "vt", "length": 32, "kl": 0.5, "top1": 1.0, "same": True})
    for kinds, kind in ((("vt",), "vt"), (("multi-hop",), "multi-hop")):
        used = evaluator.Evaluator(None, kept, "key", None, kinds)
        for _ in range(2):
            [[row]] = used.rows([schedule(2)], [reference])
        assert (row["kind"], row["length"], row["kl"], len(used.used)) == (kind, 64, 0.5, 1)


@pytest.mark.parametrize(("words", "tokens"), [(20, 24), (40, 6), (60, 24)])
def test_an_answer_ends_where_a_model_turns_all_positions_otherwise(words, tokens, tmp_path):
    """Phi-3's: one token more, and the whole text is read anew by other factors."""
    text = " ".join(["owl"] * words)
    prompt, switch = len(TOKENIZER(text)["input_ids"]), len(TOKENIZER(" ".join(["owl"] * 40))["input_ids"]) + 5
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch, **factors}
    block = {"start": 2, "stages": [{"end": 4, "budget": {"fraction": 0.99}}], "ffn_selection": "attention"}
    sizes = {"vocab_size": 300, "max_position_embeddings": 8 * switch, "original_max_position_embeddings": switch}
    model = tiny_model("phi3", block, rope_parameters=rope, eos_token_id=None, **sizes)
    item = Example("free_answer", 0, text, [], prompt, prompt + 24, 24)
    reference = dense_reference.answer(stock_twin(model), TOKENIZER, item, [1], Store(tmp_path), "key")
    assert len(reference.answer) == tokens
    assert reference.states_before(2)[1].shape[1] == prompt + tokens - 1
    ways = ways_of(model)
    answer = agreement.free_answer(ways["dense"], TOKENIZER, item)
    assert len(answer) == tokens and agreement.along_answer(ways, TOKENIZER, item, answer)["kl"] < 0.01
