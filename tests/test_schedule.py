"""Schedules count what the paper counts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spts_compress.cost import predicted
from spts_compress.modeling.configuration_spts import Amount, Proxy, Schedule
from spts_compress.modeling.spts_block import covers
from spts_compress.recipe import find, load

LLAMA_8B = SimpleNamespace(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def test_the_papers_llama_recipe_gives_the_papers_figures():
    schedule = replace(load(find("llama-paper.yaml")).read_schedule(32), proxy=(Proxy(512, 192),))
    figures = predicted(LLAMA_8B, schedule, 32768)
    assert figures["kv_share"] == pytest.approx(0.4145, abs=5e-5)  # the paper: KV memory -58.6%, 16 GB -> 6.63 GB
    assert figures["speedup"] == pytest.approx(2.59, abs=0.005)
    assert figures["probing_share"] < 0.04


def test_counts_follow_stages_and_pruning():
    schedule = load(find("llama-paper.yaml")).read_schedule(32)
    n = 32768
    assert schedule.counts(9, n) == (n, n, n, n, n)
    assert schedule.counts(10, n) == (n, 9000, 9000, n, 9000)
    assert schedule.counts(13, n) == (n, 9000, 9000, 8000, 9000)
    assert schedule.counts(14, n) == (8000, 7000, 7000, 8000, 7000)
    assert schedule.counts(28, n) == (3000, 2000, 2000, 3000, 2000)
    assert schedule.counts(31, n) == (3000, 2000, 2000, 3000, 2000)  # after the last end: its budget, no pruning
    assert schedule.counts(31, 2000) == (2000,) * 5
    assert not schedule.skips(2000)
    assert schedule.skips(2001)


@pytest.mark.parametrize(
    ("stages", "selection", "skips"),
    [
        ([{"end": 2, "budget": 40, "prune_to": 30}, {"end": 4, "budget": 30}], "attention", True),
        ([{"end": 2, "budget": 40, "prune_to": 40}, {"end": 4, "budget": 40}], "attention", False),
        ([{"end": 4, "budget": 40, "ffn_budget": 10}], "attention", True),
        ([{"end": 4, "budget": 40, "ffn_budget": 10}], "all", False),
        ([{"end": 4, "budget": 39, "ffn_budget": 40}], "all", True),
    ],
)
def test_a_prompt_is_skipped_in_where_some_layer_has_less_to_do(stages, selection, skips):
    schedule = Schedule.from_dict({"start": 1, "stages": stages, "ffn_selection": selection}, 5)
    assert schedule.skips(40) == skips == any(min(schedule.counts(layer, 40)) < 40 for layer in range(5))
    assert (
        predicted(SimpleNamespace(**{**vars(LLAMA_8B), "num_hidden_layers": 5}), schedule, 40)["speedup"] > 1
    ) == skips


amounts = st.builds(
    lambda fraction, floor, room: Amount(fraction, floor, None if room is None else max(1, floor + room)),
    st.floats(0, 1),
    st.integers(0, 50),
    st.none() | st.integers(0, 100),
)


@given(amounts, amounts, st.integers(1, 500))
def test_covering_amounts_are_never_smaller(a, b, length):
    if covers(a, b):
        assert a.at(length) >= b.at(length)


def test_blocks_survive_a_round_trip_and_faults_are_all_named():
    block = {"start": 2, "stages": [{"end": 3, "budget": 5}], "proxy": {"channels": 4, "rank": 2}}
    schedule = Schedule.from_dict(block, 6)
    assert Schedule.from_dict(schedule.to_dict(), 6) == schedule
    assert schedule.to_dict()["stages"] == block["stages"]
    heads = Schedule.from_dict({**block, "probe": {"heads": {2: [1], 4: [0, 3]}}}, 6)
    assert Schedule.from_dict(json.loads(json.dumps(heads.to_dict())), 6) == heads and hash(heads)
    with pytest.raises(ValueError) as caught:
        Schedule.from_dict({"start": True, "stages": [{"ned": 1}], "probe": {"heads": 3}, "proxy": 5}, 6)
    for fault in ("spts.start is True", "stages.0.ned is unknown", "stages.0.end is missing", "probe.heads is 3"):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "fault"),
    [
        ({3: [1]}, "none in layer 2"),
        ({"2": [1, 1]}, "twice"),
        ({2: [1, 4]}, "head 4 of layer 2"),
        ({1: [0], 2: [0]}, "head 0 of layer 1"),
        ({2: [0], 6: [0]}, "head 0 of layer 6"),
        ({2: [True]}, "lists of heads by layer"),
        ({2: 1}, "lists of heads by layer"),
        ({"two": [1]}, "lists of heads by layer"),
        ([[2, 1]], "lists of heads by layer"),
        ({}, "none in layer 2"),
        ("median", "must be mean, max, or"),
    ],
)
def test_heads_that_can_not_score_are_named(heads, fault):
    block = {"start": 2, "stages": [{"end": 3, "budget": 5}], "proxy": {"channels": 4, "rank": 2}}
    with pytest.raises(ValueError, match=fault):
        Schedule.from_dict({**block, "probe": {"heads": heads}}, 6, 4)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"enabled": "false"}, "enabled is 'false'"),
        ({"min_length": "1000"}, "min_length is '1000'"),
        ({"probe": {"heads": {"2": [1, 1]}}}, "probe.heads"),
        ({"stages": [{"end": 3, "budget": 24, "prune_to": 10}, {"end": 5, "budget": 20}]}, "prune_to is less than"),
    ],
)
def test_an_edited_block_that_says_something_else_than_it_seems_is_refused(change, fault):
    block = {"start": 2, "stages": [{"end": 3, "budget": 5}], "ffn_selection": "attention", **change}
    with pytest.raises(ValueError, match=fault):
        Schedule.from_dict(block, 6)
