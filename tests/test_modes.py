"""Ways of generating that run more than one prompt or less than all layers, and caches that were taken apart."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from tiny import SCHEDULE, UPDATING, stock_twin, tiny_model, tiny_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spts_compress.modeling import decoding
from spts_compress.modeling.layer_plan import Count, LayerPlan
from spts_compress.modeling.stock_layer import layer_windows

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
SCHEDULES = {"llama": SCHEDULE, "gemma3_text": UPDATING}  # the last one has windows


def prompt(length=40, rows=1, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SCHEDULES)
def model(request):
    return tiny_model(request.param, SCHEDULES[request.param])


def new_tokens(model, tokens, count=6, **options):
    return model.generate(tokens, max_new_tokens=count, **{**GREEDY, **options})[:, tokens.shape[1] :]


def guided(model, tokens, negative, scale, spts, count=6):
    """Guidance written out, with the two prompts on caches of their own."""
    made = []
    with torch.no_grad():
        sides = [model(side, logits_to_keep=1, use_cache=True, spts=spts) for side in (tokens, negative)]
        for _ in range(count):
            wanted, unwanted = (side.logits[0, -1].log_softmax(-1) for side in sides)
            made.append(int((scale * (wanted - unwanted) + unwanted).argmax()))
            step = torch.tensor([made[-1:]])
            sides = [model(step, past_key_values=side.past_key_values) for side in sides]
    return made


def test_guidance_runs_both_prompts_dense_or_skips_in_both(model):
    tokens, negative, stock = prompt(), prompt(30, seed=5), stock_twin(model)
    options = dict(guidance_scale=3.0, negative_prompt_ids=negative)
    dense = guided(model, tokens, negative, 3.0, spts=False)
    assert new_tokens(stock, tokens, **options)[0].tolist() == dense
    assert new_tokens(model, tokens, **options)[0].tolist() == dense
    for spts in (True, {"stages": [{"end": 4, "budget": 10}]}):
        skipped = guided(model, tokens, negative, 3.0, spts=spts)
        assert skipped != dense
        assert new_tokens(model, tokens, spts=spts, **options)[0].tolist() == skipped
        own = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, unconditional_ids=negative)
        assert new_tokens(model, tokens, spts=spts, logits_processor=LogitsProcessorList([own]))[0].tolist() == skipped
    own = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, unconditional_ids=negative)
    assert new_tokens(model, tokens, logits_processor=LogitsProcessorList([own]))[0].tolist() == dense
    assert not torch.equal(new_tokens(model, tokens), new_tokens(model, tokens, spts=False))  # as before, without it


def passes(model):
    """Notes of every prefill from now on whether it skipped."""
    seen = []
    for skips, name in ((True, "_prompt"), (False, "forward")):
        function = getattr(model.model, name)

        def noted(*args, function=function, skips=skips, **kwargs):
            cache = kwargs.get("past_key_values")
            if skips:
                seen[-1] = True
            elif cache is None or cache.get_seq_length() == 0:
                seen.append(False)
            return function(*args, **kwargs)

        setattr(model.model, name, noted)
    return seen


@pytest.mark.parametrize(("options", "skips"), [({}, True), ({"spts": False}, False), ({"guidance_scale": 2}, False)])
def test_token_healing_runs_its_prompts_like_the_call(options, skips):
    model, tokenizer = tiny_model(vocab_size=300), tiny_tokenizer()
    tokens = tokenizer("The quick brown fox jumps over the lazy dog near the river " * 3 + "th", return_tensors="pt")
    seen = passes(model)
    model.generate(tokens["input_ids"], token_healing=True, tokenizer=tokenizer, max_new_tokens=2, **GREEDY, **options)
    seen = seen[:2]  # guidance runs its own negative prompt of one token, which has nothing to skip
    assert seen == [skips, skips]


def test_a_generation_config_may_say_that_nothing_is_skipped(model):
    tokens = prompt()
    dense, skipped = new_tokens(model, tokens, spts=False), new_tokens(model, tokens)
    assert not torch.equal(dense, skipped)
    config = GenerationConfig(spts=False, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(tokens, generation_config=config)[:, 40:], dense)
    assert torch.equal(model.generate(tokens, generation_config=config, spts=True)[:, 40:], skipped)
    model.generation_config.spts = False
    assert torch.equal(new_tokens(model, tokens), dense) and torch.equal(new_tokens(model, tokens, spts=None), dense)


def test_an_early_exit_runs_dense_and_an_error_in_it_leaves_the_model_whole(model):
    tokens, stock = prompt(), stock_twin(model)
    skipped, dense = new_tokens(model, tokens), new_tokens(stock, tokens)
    assert torch.equal(new_tokens(model, tokens, assistant_early_exit=2), dense)
    assert torch.equal(new_tokens(model, tokens, assistant_early_exit=2, spts=True), skipped)

    def fail(module, args, kwargs):
        if model.config.num_hidden_layers == 2:
            raise RuntimeError("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        new_tokens(model, tokens, assistant_early_exit=2)
    handle.remove()
    assert model.config.num_hidden_layers == 5
    assert torch.equal(new_tokens(model, tokens), skipped)

    cache = model(tokens, logits_to_keep=1, use_cache=True).past_key_values
    model.config.num_hidden_layers = 2
    assert torch.isfinite(model(tokens, logits_to_keep=1).logits).all()
    for call in (dict(spts=True), dict(past_key_values=cache)):
        with pytest.raises(ValueError, match="spts=False"):
            model(tokens, **call)


def test_an_assistant_goes_by_its_own_schedule(model):
    tokens = torch.cat([prompt(20), prompt(20)], dim=1)
    for draft in (stock_twin(tiny_model(seed=5)), tiny_model("qwen2", seed=5)):
        for spts in (None, True, False, {"stages": [{"end": 4, "budget": 10}]}):
            expected = new_tokens(model, tokens, spts=spts)
            assert torch.equal(new_tokens(model, tokens, spts=spts, assistant_model=draft), expected)


@pytest.mark.parametrize("options", [{}, {"spts": False}], ids=["spts", "dense"])
def test_assisted_decoding_on_a_cache_takes_the_new_tokens_alone(model, options):
    drafts = stock_twin(model), tiny_model(seed=5)
    assistants = {"prompt_lookup_num_tokens": 3}, *({"assistant_model": draft} for draft in drafts)
    out = model.generate(prompt(40), max_new_tokens=4, return_dict_in_generate=True, **GREEDY, **options)
    text = torch.cat([out.sequences, prompt(20, seed=4), prompt(20, seed=4)], dim=1)  # repeats itself
    given = dict(attention_mask=torch.ones_like(text), **options)
    expected = new_tokens(model, text, 10, past_key_values=copy.deepcopy(out.past_key_values), **given)
    new = text[:, out.past_key_values.get_seq_length() :]
    embeds = model.get_input_embeddings()(text)
    for assistant in assistants:
        given["past_key_values"] = copy.deepcopy(out.past_key_values)
        with pytest.raises(ValueError, match="give the ones after these alone"):
            new_tokens(model, text, 10, **assistant, **given)
        with pytest.raises(ValueError, match="give the ones after these alone"):
            model.generate(inputs_embeds=embeds, max_new_tokens=10, **GREEDY, **assistant, **given)
        assert torch.equal(new_tokens(model, new, 10, **assistant, **given), expected)


REBUILT = {
    "pairs": lambda cache, config: DynamicCache(ddp_cache_data=[(held.keys, held.values) for held in cache.layers]),
    "triples": lambda cache, config: DynamicCache(ddp_cache_data=list(cache)),
    "with the config": lambda cache, config: DynamicCache(
        ddp_cache_data=[(held.keys, held.values) for held in cache.layers], config=config
    ),
}


@pytest.mark.parametrize("how", REBUILT)
@pytest.mark.parametrize("count", [1, 5])
def test_a_cache_made_of_keys_and_values_gets_a_clear_error(model, how, count):
    tokens = prompt(rows=2)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            cache = model(tokens, logits_to_keep=1, use_cache=True, **options).past_key_values
            again = REBUILT[how](cache, model.config)
            with pytest.raises(ValueError, match="the cache does not fit the others"):
                model(tokens[:, :count], past_key_values=again)


def test_a_dense_cache_may_be_rebuilt():
    model, tokens = tiny_model(), prompt()
    with torch.no_grad():
        cache = model(tokens, use_cache=True, spts=False).past_key_values
        again = REBUILT["pairs"](cache, model.config)
        expected = stock_twin(model)(torch.cat([tokens, tokens[:, :5]], 1)).logits[:, -5:]
        torch.testing.assert_close(model(tokens[:, :5], past_key_values=again).logits, expected, atol=1e-4, rtol=0)


def test_copied_and_pickled_caches_answer_alike(model):
    tokens = prompt(rows=2)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, logits_to_keep=1, use_cache=True).past_key_values
        others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        step, longer = prompt(5, rows=2, seed=3), torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        expected = model(step, attention_mask=longer, past_key_values=cache).logits
        for other in others:
            assert torch.equal(model(step, attention_mask=longer, past_key_values=other).logits, expected)


def test_layers_of_different_prompts_are_not_one_cache(model):
    with torch.no_grad():
        cache, other = (
            model(prompt(length), logits_to_keep=1, use_cache=True, spts=spts).past_key_values
            for length, spts in ((40, None), (44, None))
        )
        dense = model(prompt(44), logits_to_keep=1, use_cache=True, spts=False).past_key_values
        for foreign in (other, dense):
            mixed = copy.deepcopy(cache)
            mixed.layers[3] = foreign.layers[3]
            with pytest.raises(ValueError, match="layer 3 of the cache does not fit the others"):
                model(prompt(5), past_key_values=mixed)


def test_layers_skipped_by_different_schedules_are_masked_each_by_its_own_length():
    model, tokens = tiny_model(), prompt()
    with torch.no_grad():
        caches = [
            model(tokens, logits_to_keep=1, use_cache=True, spts=spts).past_key_values
            for spts in (None, {"stages": [{"end": 2, "budget": 14, "prune_to": 18}, {"end": 4, "budget": 9}]})
        ]
        for cache, other in (caches, caches[::-1]):
            mixed = copy.deepcopy(cache)
            mixed.layers[2] = copy.deepcopy(other.layers[2])
            together = model(prompt(3), past_key_values=copy.deepcopy(mixed)).logits
            for index in range(3):
                alone = model(prompt(3)[:, index : index + 1], past_key_values=mixed).logits
                torch.testing.assert_close(together[:, index : index + 1], alone, atol=1e-4, rtol=0)


def test_hooks_on_attention_are_refused_where_they_would_not_run():
    """Those on its parts run; transformers' own, which record what a dense call asks for, do not count."""
    model, ids, seen = tiny_model("llama", SCHEDULE), torch.arange(3, 63)[None], []
    with torch.no_grad():
        plain = model(ids, logits_to_keep=1).logits
        model(ids, output_attentions=True, spts=False)
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, plain)
        attention = model.model.layers[3].self_attn
        handle = attention.register_forward_hook(lambda *_: seen.append(1))
        with pytest.raises(ValueError, match="change its parts, or pass spts=False"):
            model(ids, logits_to_keep=1)
        model(ids, logits_to_keep=1, spts=False)
        handle.remove()
        stock, own = type(attention), attention.forward
        attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
        with pytest.raises(ValueError, match="another forward of it"):
            model(ids, logits_to_keep=1)
        del attention.forward
        attention.__class__ = type("Mine", (stock,), {"forward": lambda self, *args, **kwargs: own(*args, **kwargs)})
        with pytest.raises(ValueError, match="another forward of it"):
            model(ids, logits_to_keep=1)
        attention.__class__ = stock
        attention.o_proj.register_forward_hook(lambda *_: seen.append(2))
        model(ids, logits_to_keep=1)
        handle = attention.register_full_backward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hooks on self_attn"):
            model(ids, logits_to_keep=1)
        handle.remove()
    assert seen == [1, 2]


def test_of_forwards_from_accelerate_its_own_alone_are_taken():
    hooks = pytest.importorskip("accelerate.hooks")
    own = type("Own", (hooks.ModelHook,), {})
    for hook, change, fine in (
        (hooks.AlignDevicesHook(), False, True),
        (hooks.SequentialHook(hooks.AlignDevicesHook()), False, True),
        (hooks.AlignDevicesHook(), True, False),
        (own(), False, False),
        (hooks.SequentialHook(hooks.AlignDevicesHook(), own()), False, False),
    ):
        model, ids = tiny_model("llama", SCHEDULE), torch.arange(3, 63)[None]
        attention = model.model.layers[3].self_attn
        hooks.add_hook_to_module(attention, hook)
        if change:
            attention.forward = lambda *args, own=attention.forward, **kwargs: own(*args, **kwargs)
        with torch.no_grad(), nullcontext() if fine else pytest.raises(ValueError, match="another forward of it"):
            model(ids, logits_to_keep=1)


def test_weights_that_come_with_a_call_of_attention_alone_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model("llama", SCHEDULE), torch.arange(3, 63)[None]
    with torch.no_grad():
        dense = model(ids, logits_to_keep=1, spts=False).logits
        kinds = [type(model.model.layers[0].self_attn).__name__]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=kinds)
        with pytest.raises(ValueError, match="another forward of it"):
            model(ids, logits_to_keep=1)
        assert torch.equal(model(ids, logits_to_keep=1, spts=False).logits, dense)


@pytest.mark.parametrize(("family", "part"), [("llama", "q_proj"), ("deepseek_v2", "up_proj")])
def test_activated_lora_is_refused(family, part):
    peft = pytest.importorskip("peft")
    config = dict(task_type="CAUSAL_LM", r=2, target_modules=[part], init_lora_weights=False)
    config = peft.LoraConfig(**config, alora_invocation_tokens=[5, 6])
    ids = torch.arange(3, 63)[None]
    model = peft.get_peft_model(tiny_model(family, SCHEDULE), config).eval()
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
    with pytest.raises(ValueError, match="activated LoRA counts tokens"):
        model.generate(**given)
    model.generate(**given, spts=False)


class Catcher(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(
        self, hidden_states, attention_mask, position_embeddings, position_ids, past_key_values, use_cache=None
    ):
        self.calls += 1
        given = dict(attention_mask=attention_mask, position_embeddings=position_embeddings, position_ids=position_ids)
        return self.layer(hidden_states, past_key_values=past_key_values, **given)


def test_layers_before_the_first_that_skips_may_be_wrapped(monkeypatch):
    monkeypatch.setattr(decoding, "STOCK_ON", ())
    model, ids = tiny_model("llama", {**SCHEDULE, "start": 2}), torch.arange(3, 63)[None]
    with torch.no_grad():
        plain = model(ids, logits_to_keep=1, spts=True).logits
        caught = model.model.layers[0] = Catcher(model.model.layers[0])
        layer = model.model.layers[1]
        own = Catcher(layer.forward)
        layer.forward = lambda hidden_states, **given: own(hidden_states, **given)
        torch.testing.assert_close(model(ids, logits_to_keep=1, spts=True).logits, plain)
    assert caught.calls == own.calls == 1


def test_a_callers_tensors_for_attention_go_where_a_layer_is():
    options = {"bias": torch.ones(2), "name": "x"}
    plan = LayerPlan(*[Count(4)] * 5, schedule=None, heads=torch.arange(2), window=None, options=options).to("meta")
    assert plan.heads.is_meta and plan.options["bias"].is_meta and plan.options["name"] == "x"


@pytest.mark.parametrize("family", ["llama", "ministral", "deepseek_v3"])
def test_what_a_callers_own_attention_is_given_reaches_it_in_all_layers(family, monkeypatch):
    model, seen = tiny_model(family, {**SCHEDULE, "start": 2}), []
    monkeypatch.setattr(decoding, "STOCK_ON", ())

    def own(module, *args, temperature=1.0, **kwargs):
        seen.append((module.layer_idx, temperature))
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)
    with torch.no_grad():
        model(torch.arange(3, 63)[None], logits_to_keep=1, temperature=2.0)
    assert {layer for layer, _ in seen} == {0, 1, 2, 3, 4} and {given for _, given in seen} == {2.0}


def test_a_backward_hook_on_a_norm_sees_the_whole_prompt(monkeypatch):
    monkeypatch.setattr(decoding, "STOCK_ON", ())
    stages = [{"end": 4, "budget": 540}]
    model = tiny_model("llama", {**SCHEDULE, "start": 3, "stages": stages}, max_position_embeddings=1024)
    ids, shapes = torch.randint(3, 97, (1, 600), generator=torch.Generator().manual_seed(0)), []
    model.model.layers[1].input_layernorm.register_full_backward_hook(lambda _, __, out: shapes.append(out[0].shape[1]))
    model(ids, logits_to_keep=1).logits.logsumexp(-1).sum().backward()
    assert shapes == [600]


@pytest.mark.parametrize("static", [False, True])
def test_a_prefill_that_was_interrupted_leaves_no_cache_to_go_on_with(model, static):
    tokens, layer = prompt(40), model.model.layers[2]
    cache = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache(config=model.config)

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    handle = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        new_tokens(model, tokens, past_key_values=cache, disable_compile=True)
    handle.remove()
    for more in (tokens, torch.cat([tokens, tokens[:, :1]], dim=1)):
        with pytest.raises(ValueError, match="does not fit the others"):
            new_tokens(model, more, past_key_values=copy.deepcopy(cache), disable_compile=True)


@torch.no_grad()
def test_a_later_mask_has_the_prompt_as_the_prefill_had_it(model):
    tokens, padded = prompt(40, rows=2), (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    for first in (None, padded):
        cache = model(tokens, attention_mask=first, logits_to_keep=1, use_cache=True).past_key_values
        given = torch.cat([torch.ones(2, 40).long() if first is None else first, torch.ones(2, 1).long()], dim=1)
        other = given.clone()
        other[:, 20:30] = 0
        for wrong in (other, *((torch.ones_like(given), None) if first is padded else (other.bool(),))):
            with pytest.raises(ValueError, match="another one for the prompt than the prefill had"):
                model(tokens[:, :1], attention_mask=wrong, past_key_values=copy.deepcopy(cache))
        plain = model(tokens[:, :1], attention_mask=given, past_key_values=copy.deepcopy(cache)).logits
        cache.reorder_cache(torch.tensor([1, 0]))
        turned = model(tokens[:, :1].flip(0), attention_mask=given.flip(0), past_key_values=cache).logits
        torch.testing.assert_close(turned, plain.flip(0))
        if first is padded:  # the row without padding needs no mask
            cache.batch_select_indices(torch.tensor([1]))
            assert torch.isfinite(model(tokens[:1, :1], past_key_values=cache).logits).all()


@pytest.mark.parametrize("static", [False, True])
def test_a_later_turn_of_padded_rows_needs_their_mask(model, static):
    tokens, padded = prompt(40, rows=2), (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    kind = {"cache_implementation": "static"} if static else {}
    options = dict(GREEDY, max_new_tokens=4, return_dict_in_generate=True)
    out = model.generate(tokens, attention_mask=padded, **options, **kind)
    text = torch.cat([out.sequences, prompt(5, rows=2, seed=4)], dim=1)
    mask = torch.cat([padded, torch.ones(2, 9).long()], dim=1)
    with pytest.raises(ValueError, match="another one for the prompt than the prefill had"):  # ones are left out
        new_tokens(model, text, attention_mask=mask | 1, past_key_values=copy.deepcopy(out.past_key_values))
    new_tokens(model, text, attention_mask=mask, past_key_values=out.past_key_values)


def test_a_cache_that_was_reset_tells_of_the_dense_prompt_after(model):
    cache = model(prompt(40), logits_to_keep=1, use_cache=True).past_key_values
    cache.reset()
    model(prompt(30), past_key_values=cache, spts=False)
    assert [layer["candidates"] for layer in model.skipped(cache)] == [30] * 5


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe"])
def test_kinds_of_layers_that_a_family_does_not_know_are_ignored(family):
    """As its stock model does, which has the window in every layer."""
    given = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
    plain, typed = (tiny_model(family, SCHEDULE, **given) for _ in range(2))
    typed.config.layer_types = ["full_attention"] * typed.config.num_hidden_layers
    assert layer_windows(typed.config) == layer_windows(plain.config) != [None] * 5
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        torch.testing.assert_close(typed(ids, logits_to_keep=1).logits, plain(ids, logits_to_keep=1).logits)


@pytest.mark.parametrize(("family", "name"), [("phi3", "qkv_proj"), ("deepseek_v2", "kv_b_proj"), ("llama", "k_proj")])
def test_another_forward_of_a_projection_runs(family, name):
    """A patch by hand, beside the same change of its weights."""
    patched, merged = (tiny_model(family, SCHEDULE) for _ in range(2))
    for layer, other in zip(patched.model.layers, merged.model.layers, strict=True):
        module, weight = getattr(layer.self_attn, name), getattr(other.self_attn, name).weight
        more = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.3
        weight.data += more
        module.forward = lambda x, own=module.forward, more=more: own(x) + x @ more.T
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        found, expected = (model(ids, logits_to_keep=1).logits for model in (patched, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
