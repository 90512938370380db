"""Speed without a clock: operations as counted, a bounded number of calls, and no copies beyond the tokens at work."""

import weakref
from collections import Counter
from contextlib import nullcontext
from functools import partial, partialmethod

import pytest
import torch
from tiny import FAMILIES, SIZES, stock_twin, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spts_compress.cost import LayerShape, has_experts, layer_costs, predicted
from spts_compress.modeling import decoding, stock_layer
from spts_compress.plan import parameters

LENGTH = 192
SCHEDULE = dict(
    start=1,
    stages=[
        {"end": 2, "budget": {"fraction": 0.5}, "prune_to": {"fraction": 0.4}},
        {"end": 4, "budget": {"fraction": 0.25}, "ffn_budget": {"fraction": 0.125}},
    ],
    proxy={"channels": 12, "rank": 4},
    probe={"window_size": 8, "kernel_size": 3},
    recent_tokens=8,
)
FREE = (
    "view", "_unsafe_view", "transpose", "unsqueeze", "squeeze", "slice", "select", "expand", "t", "detach", "permute",
    "split", "split_with_sizes", "unbind",
)  # fmt: skip
COPIES = ("index", "gather", "index_select", "take_along_dim", "cat", "clone", "scatter", "index_put_", "copy_")


class Calls(TorchDispatchMode):
    """Counts ATen calls that work on data, and the elements that copying calls give."""

    def __init__(self):
        super().__init__()
        self.calls, self.copied = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name not in FREE and not name.startswith("profiler::"):
            self.calls[name] += 1
        if name in COPIES or name.startswith("scatter"):
            self.copied += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def prefill(model, length, **options):
    with torch.no_grad():
        ids = torch.arange(length, device=model.device)[None] % 90 + 3
        model(ids, use_cache=True, logits_to_keep=1, **options)


def counted(model, length, **options):
    with Calls() as calls:
        prefill(model, length, **options)
    return calls


HEADS = {**SCHEDULE["probe"], "heads": {"1": [0], "3": [1, 2]}}
SCHEDULES = {
    "proxy": SCHEDULE,
    "attention": {**SCHEDULE, "ffn_selection": "attention"},
    "heads": {**SCHEDULE, "probe": HEADS},  # layers 2 and 4 do not probe
    "update": {**SCHEDULE, "update": {"attention_rank": 4, "ffn_rank": 8}, "kv": 0.45},
    "attention and update": {
        **SCHEDULE,
        "stages": [{"end": 2, "budget": {"fraction": 0.5}}, {"end": 4, "budget": {"fraction": 0.25}}],
        "probe": {"window_size": 8, "kernel_size": 3, "score_carry": 0.5},
        "ffn_selection": "attention",
        "update": {"attention_rank": 0, "ffn_rank": 8},
        "kv": 0.45,
    },
}
CALLS = {
    "proxy": 39,
    "attention": 16,
    "heads": 32,
    "update": 41,
    "attention and update": 22,
}  # more than dense, a layer, on a GPU


# some of whose layers may have no experts
MIXED = {
    "qwen3_moe": {},
    "qwen3_moe,named": {"mlp_only_layers": [0, 3]},
    "qwen3_moe,every other": {"decoder_sparse_step": 2},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("options", [{"spts": False}, {}], ids=["dense", "spts"])
@pytest.mark.parametrize("family", ["llama", *MIXED, "deepseek_v2", "deepseek_v3"])
def test_the_cost_model_counts_what_torch_counts(family, schedule, options):
    layers = MIXED.get(family, {})
    model = tiny_model(family.split(",")[0], schedule, attn_implementation="eager", **layers)
    with FlopCounterMode(display=False) as counter:
        prefill(model, LENGTH, **options)
    config, plan = model.config, model.config.schedule()
    expected = 2.0 * config.hidden_size * config.vocab_size  # the head, at the last position
    for layer, cost in enumerate(layer_costs(config, plan, LENGTH)):
        shape, routed = LayerShape.of(config, layer), LENGTH if options else cost.ffn_tokens
        if has_experts(config, layer):  # by a router, which is not counted
            expected += 2.0 * routed * model.model.layers[layer].mlp.gate.weight.numel()
        # eager attention computes the half that causality hides, and torch counts products only
        if options:
            expected += shape.dense(LENGTH) + shape.attention(LENGTH)
            continue
        expected += cost.total + shape.attention(cost.active)
        if cost.ffn_tokens < cost.candidates_in and plan.ffn_selection == "proxy":
            expected -= 3 * config.hidden_size * cost.candidates_in  # norm and squares, no products
        if (
            plan.probe.heads_of(layer) and cost.probing
        ):  # the window's queries are projected for the probe, and again among the active
            expected += 2.0 * plan.probe.window_size * shape.query
            if family.startswith("deepseek"):  # and by the matrix that makes keys of latents
                heads, size = config.num_attention_heads, config.qk_nope_head_dim
                expected += 2.0 * plan.probe.window_size * heads * size * config.kv_lora_rank
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)
    assert predicted(config, plan, LENGTH)["speedup"] > 1.2  # so that the two cases differ


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_parameters_that_the_model_has(family):
    model = stock_twin(tiny_model(family))
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}  # no norms and biases
    counted = sum(weight.numel() for name, weight in weights.items() if "mlp.gate." not in name)  # no routers
    assert parameters(model.config) == counted


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """PyTorch's meta device calls what a GPU does, but for this norm, which is one kernel there, and autocast."""
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda states, *_, **__: torch.empty_like(states))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("name", "most"), CALLS.items())
def test_a_skipping_layer_makes_few_calls_at_any_length(name, most):
    model = tiny_model(schedule=SCHEDULES[name]).to("meta", torch.bfloat16)
    short, long = counted(model, LENGTH // 2), counted(model, LENGTH)
    assert short.calls == long.calls
    more = long.calls.total() - counted(model, LENGTH, spts=False).calls.total()
    assert more / (SIZES["num_hidden_layers"] - SCHEDULE["start"]) <= most


def test_where_the_feed_forward_network_alone_skips_tokens_are_ranked_once():
    stage = {"end": 4, "budget": {"fraction": 1}, "ffn_budget": {"fraction": 0.25}}
    calls = counted(tiny_model(schedule={**SCHEDULE, "stages": [stage]}), LENGTH).calls
    assert calls["sort"] == 2 * 4  # by their worth, and the chosen ones by their places


def test_copies_grow_with_the_tokens_at_work():
    model = tiny_model(schedule=SCHEDULE)
    one, two = counted(model, LENGTH // 2), counted(model, LENGTH)
    assert two.copied < 2.1 * one.copied  # nothing quadratic
    dense = counted(model, LENGTH, spts=False).copied
    hidden = sum(
        cost.candidates_in + cost.active + cost.ffn_tokens + cost.candidates_out
        for cost in layer_costs(model.config, model.config.schedule(), LENGTH)[SCHEDULE["start"] :]
    )
    assert two.copied < dense + 6 * hidden * SIZES["hidden_size"]


def test_what_attention_read_is_gone_when_the_feed_forward_network_runs(monkeypatch):
    """Where a prefill's memory is highest; in the layer before the first that skips, too, which runs in steps here."""
    monkeypatch.setattr(decoding, "STOCK_ON", ())
    model, read, left = tiny_model(schedule=SCHEDULES["update"]), {}, []
    for number, layer in enumerate(model.model.layers):
        note = partial(lambda number, _, args: read.update({number: weakref.ref(args[0])}), number)
        layer.self_attn.k_proj.register_forward_pre_hook(note)
        layer.mlp.register_forward_pre_hook(partial(lambda number, *_: left.append(read[number]()), number))
    prefill(model, LENGTH)
    assert left == [None] * len(read)


def test_a_decoded_token_makes_no_more_calls_than_dense():
    model = tiny_model(schedule=SCHEDULE)
    ids = torch.arange(LENGTH)[None] % 90 + 3
    steps = {}
    for name, options in (("dense", {"spts": False}), ("spts", {})):
        with torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1, **options).past_key_values
            with Calls() as calls:
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        steps[name] = calls
    assert steps["spts"].calls.total() <= steps["dense"].calls.total()
    assert steps["spts"].copied < steps["dense"].copied


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "mixtral", "deepseek_v3"])
def test_a_feed_forward_network_in_pieces_is_the_whole_one(family, monkeypatch):
    model, ids, calls = tiny_model(family, SCHEDULE), torch.arange(LENGTH)[None] % 90 + 3, Counter()
    own = {id(layer.mlp) for layer in model.model.layers}

    def counted_run(mlp, states, stock):
        calls[states.shape[1]] += id(mlp) in own
        return stock(mlp, states)

    for kind in {type(layer.mlp) for layer in model.model.layers}:
        monkeypatch.setattr(kind, "forward", partialmethod(counted_run, stock=kind.forward))
    with torch.no_grad():
        whole = model(ids, logits_to_keep=1).logits
        once = calls.total()
        monkeypatch.setattr(stock_layer, "FFN_PIECE", 7 * model.config.intermediate_size)
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole)
        pieces = calls.total() - once
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: None)  # which wants all tokens at once
        model(ids, logits_to_keep=1)
    assert calls.total() - once - pieces == once == len(own)
    assert (pieces > once) == any(hasattr(layer.mlp, "down_proj") for layer in model.model.layers[SCHEDULE["start"] :])


def test_a_hook_on_a_part_of_a_skipping_layer_sees_all_its_tokens(monkeypatch):
    monkeypatch.setattr(stock_layer, "NORM_PIECE", 7)
    model, ids = tiny_model("llama", SCHEDULE), torch.arange(LENGTH)[None] % 90 + 3
    monkeypatch.setattr(stock_layer, "FFN_PIECE", 7 * model.config.intermediate_size)
    layer, seen = model.model.layers[SCHEDULE["start"]], []
    for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.act_fn):
        part.register_forward_hook(lambda module, args, output: seen.append((module, output.shape[1])))
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    assert len({module for module, _ in seen}) == len(seen) == 3


def test_values_of_experts_that_a_family_does_not_know_change_no_count():
    plain, stray = (
        tiny_config("mistral", **values) for values in ({}, {"num_experts_per_tok": 2, "num_local_experts": 8})
    )
    assert not has_experts(stray) and has_experts(tiny_config("mixtral"))
    assert parameters(stray) == parameters(plain)
