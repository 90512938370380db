"""Prefills that are one CUDA graph: on a CPU, where what would be replayed is run again into the same tensors."""

import copy
import pickle

import pytest
import torch
from test_static import GREEDY, PADDED, STATIC, Compiled, prompt
from tiny import BARE, SCHEDULE, UPDATING, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from spts_compress.modeling import graphs
from spts_compress.modeling.calls import SkipRequest
from spts_compress.modeling.decoding import Pass

HEADS = {
    **SCHEDULE,
    "probe": {"window_size": 8, "kernel_size": 3, "score_carry": 0.5, "heads": {"1": [0], "3": [1, 2]}},
}
SHARES = {
    **SCHEDULE,
    "stages": [
        {
            "end": 2,
            "budget": {"fraction": 0.45},
            "ffn_budget": {"fraction": 0.5},
            "prune_to": {"fraction": 0.6, "floor": 9},
        },
        {"end": 4, "budget": {"fraction": 0.3, "floor": 9}},
    ],
    "probe": {"window_size": 4, "kernel_size": 5, "score_carry": 1.0},
    "sink_tokens": 2,
}
SCHEDULES = {
    "llama,shares": SHARES,
    "qwen2,shares": {**SHARES, "kv": 0.55, "update": UPDATING["update"]},
    "llama": SCHEDULE,
    "qwen2": BARE,
    "llama,updates": UPDATING,
    "llama,heads": HEADS,
    "deepseek_v3": UPDATING,
}


@pytest.fixture
def made(monkeypatch):
    """The functions that became graphs."""
    functions = []

    def captured(function, pool):
        functions.append(function)
        last, tensors = function()

        def replay():
            again, others = function()
            last.copy_(again)
            for layer, parts in tensors.items():
                for part, other in zip(parts, others[layer], strict=True):
                    part.copy_(other)

        return replay, (last, tensors)

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "STEP", 16)
    return functions


def model_of(name):
    experts = {"experts_implementation": "batched_mm"} if name.startswith("deepseek") else {}
    return tiny_model(name.split(",")[0], SCHEDULES[name], **experts).double()


def prefilled(decoder, tokens, seed=0, **asked):
    """State after a prompt's last token, and its cache."""
    states = torch.randn(1, tokens, decoder.config.hidden_size, generator=torch.Generator().manual_seed(seed)).double()
    cache = DynamicCache(config=decoder.config)
    run = Pass(states, None, torch.arange(tokens)[None], cache, 0, {"use_cache": True})
    request = SkipRequest(decoder.config.schedule(), last=1, **asked)
    with torch.no_grad():
        return decoder._prompt(run, request, [tokens]), cache


@pytest.mark.parametrize("name", SCHEDULES)
def test_prompts_of_all_lengths_run_in_a_graph_as_without(made, name, monkeypatch):
    decoder, runs = model_of(name).model, []
    monkeypatch.setattr(
        graphs.PrefillGraph, "run", lambda *args, run=graphs.PrefillGraph.run: runs.append(0) or run(*args)
    )
    lengths = [*range(24, 90), *range(80, 30, -7)]  # shorter ones find what longer ones left
    for tokens in lengths:
        last, cache = prefilled(decoder, tokens, tokens, graphs=True)
        expected, plain = prefilled(decoder, tokens, tokens)
        torch.testing.assert_close(last, expected)
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys)
            torch.testing.assert_close(layer.values, other.values)
            assert layer.get_seq_length() == other.get_seq_length()
    assert len(runs) > 0.8 * len(lengths) and len(made) == len({graphs.slots_for(tokens) for tokens in range(24, 90)})


def test_a_prompt_that_overflows_leaves_the_next_one_alone(made):
    decoder = model_of("llama").model
    expected = prefilled(decoder, 36)[0]
    for values in (1.0, float("nan")):
        states = torch.full((1, 46, decoder.config.hidden_size), values).double()
        run = Pass(states, None, torch.arange(46)[None], DynamicCache(config=decoder.config), 0, {"use_cache": True})
        with torch.no_grad():
            decoder._prompt(run, SkipRequest(decoder.config.schedule(), last=1, graphs=True), [46])
        torch.testing.assert_close(prefilled(decoder, 36, graphs=True)[0], expected)
    assert len(made) == 1


def test_slots_are_at_most_an_eighth_more_than_tokens():
    slots = [graphs.slots_for(tokens) for tokens in range(2048, 70000)]
    assert all(tokens <= count <= 1.125 * tokens + 1 for tokens, count in enumerate(slots, 2048))
    assert len(set(slots)) < 50 and slots[0] == 2048


def test_compiled_decoding_prefills_by_a_graph_for_prompts_of_about_one_length(made):
    model, compiled = tiny_model("llama", SCHEDULE), Compiled()
    model.generation_config.compile_config = compiled.config
    for length in (36, 40, 47):
        tokens = prompt(length)
        expected = model.generate(tokens, max_new_tokens=6, **GREEDY)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, **GREEDY, **STATIC), expected)
    assert len(made) == 1
    model.generate(tokens, max_new_tokens=6, **GREEDY, **STATIC, spts={"sink_tokens": 3})
    assert len(made) == 2
    for other in (
        {"spts": {"positions": True}},
        {"disable_compile": True},
        {"num_return_sequences": 2, "num_beams": 2},
    ):
        model.generate(tokens, max_new_tokens=2, **GREEDY, **STATIC, **other)
    model.generate(prompt(40, rows=2), max_new_tokens=2, **GREEDY, **STATIC, **PADDED)
    padded, mask = torch.cat([tokens[:, :9] * 0, tokens], dim=1), (torch.arange(56) >= 9).long()[None]
    expected = model.generate(tokens, max_new_tokens=6, **GREEDY)[:, 47:]
    got = model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY, **STATIC)
    assert torch.equal(got[:, 56:], expected)
    assert len(made) == 2


def test_changed_weights_are_seen_and_copies_have_graphs_of_their_own(made):
    decoder = tiny_model("llama", SCHEDULE).double().model
    prefilled(decoder, 40, graphs=True)
    assert not copy.deepcopy(decoder).graphs.made and not pickle.loads(pickle.dumps(decoder.graphs)).made
    with torch.no_grad():
        decoder.layers[3].mlp.up_proj.weight.mul_(2)  # in place, which a graph sees
    torch.testing.assert_close(prefilled(decoder, 40, graphs=True)[0], prefilled(decoder, 40)[0])
    assert len(made) == 1
    decoder.layers[3].mlp.up_proj.weight = torch.nn.Parameter(decoder.layers[3].mlp.up_proj.weight / 3)
    torch.testing.assert_close(prefilled(decoder, 40, graphs=True)[0], prefilled(decoder, 40)[0])
    assert len(made) == 2
    decoder.layers[3].self_attn.scaling *= 2  # which is a number in a graph
    torch.testing.assert_close(prefilled(decoder, 40, graphs=True)[0], prefilled(decoder, 40)[0])
    assert len(made) == 3
    decoder.layers[2].register_forward_hook(lambda *_: None)  # which a graph would not call
    prefilled(decoder, 40, graphs=True)
    assert len(made) == 3


class Reads(TorchDispatchMode):
    """Notes the memory that calls read and none of them made."""

    def __init__(self):
        super().__init__()
        self.made, self.read = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.read |= memory_of(args) - self.made
        self.made |= memory_of(results if isinstance(results, tuple | list) else [results])
        return results


def memory_of(parts):
    return {part.untyped_storage().data_ptr() for part in parts if isinstance(part, torch.Tensor) and part.numel()}


def test_a_graph_holds_the_tensors_that_it_reads(monkeypatch):
    functions, decoder = [], model_of("llama,heads").model  # a real graph, unlike a function, holds none
    monkeypatch.setattr(graphs, "captured", lambda function, pool: functions.append(function) or (None, function()))
    states = torch.zeros(1, 40, decoder.config.hidden_size, dtype=torch.float64)
    like = Pass(states, None, torch.arange(40)[None], None, 0, {})
    with torch.no_grad():
        graph = graphs.PrefillGraph(decoder, decoder.config.schedule(), like, 48, None)
        with Reads() as reads:
            functions[0]()
    heads = [plan.heads for plan in graph.plans]
    weights = [*decoder.parameters(), *decoder.buffers()]
    assert reads.read <= memory_of([graph.states, graph.positions, graph.numbers, *heads, *weights])
    assert memory_of(heads) <= reads.read


@pytest.mark.parametrize("change", ["adapter", "forward", "window", "eager", "flex_attention"])
def test_what_may_do_something_else_next_time_is_no_graph(made, change, monkeypatch):
    model = tiny_model("llama", SCHEDULE).double()
    if change == "adapter":
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        assert adapted.base_model.model is model
    elif change == "forward":
        model.model.layers[3].mlp.forward = model.model.layers[3].mlp.forward
    elif change == "window":
        model = tiny_model("ministral", SCHEDULE).double()
    else:
        model.set_attn_implementation(change)
        monkeypatch.setattr(type(model.model), "_stages", lambda self, run, *_, **__: run.states)
    prefilled(model.model, 40, graphs=True)
    assert not made


def test_no_more_than_so_many_graphs_are_kept_and_the_oldest_go(made, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    decoder = tiny_model("llama", SCHEDULE).double().model
    for tokens in (40, 60, 40, 90, 40):
        prefilled(decoder, tokens, graphs=True)
    assert len(made) == 3 and len(decoder.graphs.made) == 2


def test_what_can_not_be_a_graph_runs_without_one(made, monkeypatch):
    decoder, tried = tiny_model("llama", SCHEDULE).double().model, []

    def captured(function, pool):
        tried.append(function)
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graphs, "captured", captured)
    for _ in range(2):
        torch.testing.assert_close(prefilled(decoder, 40, graphs=True)[0], prefilled(decoder, 40)[0])
    assert len(tried) == 1


def test_what_waits_for_the_device_is_told_before_a_graph_is_made():
    with graphs.Unwaited():
        prefilled(tiny_model("llama", SCHEDULE).double().model, 40)
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits"), graphs.Unwaited():
        torch.ones(1).item()
    with pytest.raises(RuntimeError, match="_to_copy waits"), graphs.Unwaited():
        torch.ones(1).to("meta")
    experts = tiny_model("deepseek_v3", UPDATING, experts_implementation="eager").double().model
    with pytest.raises(RuntimeError, match="waits for the device"), graphs.Unwaited():
        prefilled(experts, 40)


def test_threads_take_turns_at_a_graph(made):
    from concurrent.futures import ThreadPoolExecutor

    decoder = tiny_model("llama", SCHEDULE).double().model
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: prefilled(decoder, 40 + seed, seed, graphs=True)[0], range(8)))
    for seed, last in enumerate(found):
        torch.testing.assert_close(last, prefilled(decoder, 40 + seed, seed)[0])
    assert len(made) == 1
