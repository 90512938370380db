"""Static caches after a skipped prefill: the tokens of the dynamic ones, decoded by compiled steps."""

import copy

import pytest
import torch
from tiny import BARE, SCHEDULE, TEXT, UPDATING, shallow_model, stock_twin, tiny_model, tiny_tokenizer
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from spts_compress.modeling.static import StaticKeptLayer

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
STATIC = dict(cache_implementation="static")
# Gemma 3's first layer has a window, Ministral's has not.
SCHEDULES = {"llama": SCHEDULE, "qwen2": BARE, "gemma3_text": UPDATING, "ministral": SCHEDULE, "deepseek_v3": UPDATING}
PADDED = dict(attention_mask=(torch.arange(40) >= torch.tensor([[0], [15]])).long())


def prompt(length=40, rows=1, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def made(family, model=tiny_model):
    experts = {"experts_implementation": "batched_mm"} if family.startswith("deepseek") else {}  # the eager ones wait
    return model(family, SCHEDULES[family], **experts)


@pytest.fixture(params=SCHEDULES)
def model(request):
    return made(request.param)


def answers(model, tokens, count=12, **options):
    torch.manual_seed(7)
    return model.generate(tokens, max_new_tokens=count, **{**GREEDY, **options})


class Compiled:
    """How `generate` is told to compile on a CPU too, without a break in the graph: counts the graphs that were made,
    and the steps that ran on them."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = self.steps = 0

        def backend(module, inputs, **_):
            self.graphs += 1

            def run(*args):
                self.steps += 1
                return module(*args)

            return run

        self.backend = backend
        self.config = CompileConfig(backend=backend, fullgraph=True)
        self.config._compile_all_devices = True


@pytest.mark.parametrize("family", SCHEDULES)
def test_steps_are_compiled_once_for_prompts_of_several_lengths_and_give_the_same_tokens(family):
    model, compiled = made(family, shallow_model), Compiled()
    for length in (40, 47, 33):
        expected = answers(model, prompt(length))
        assert torch.equal(answers(model, prompt(length), **STATIC, compile_config=compiled.config), expected)
        assert not torch.equal(answers(model, prompt(length), spts=False), expected)
    assert (compiled.graphs, compiled.steps) == (1, 3 * 11)
    tokens = prompt(rows=2)
    expected = answers(model, tokens, **PADDED)
    assert torch.equal(answers(model, tokens, **PADDED, **STATIC, compile_config=compiled.config), expected)
    assert (compiled.graphs, compiled.steps) == (2, 4 * 11)  # for two rows


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, top_k=0, num_return_sequences=3),
        dict(num_beams=3, num_return_sequences=3),
        dict(do_sample=True, num_beams=2),
        dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(count=300),  # several steps of slots
        dict(count=None, max_length=50),
        dict(spts={"kv": 1.0, "stages": [{"end": 4, "budget": 20}]}),
        dict(guidance_scale=2.0),
        dict(guidance_scale=2.0, spts=True),
        dict(prefill_chunk_size=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_way_of_generating_gives_the_tokens_of_a_dynamic_cache(family, options):
    model, tokens = made(family), prompt(rows=2)
    options = {**PADDED, **options}
    assert torch.equal(answers(model, tokens, **options, **STATIC), answers(model, tokens, **options))


def test_eager_attention_and_states_in_place_of_tokens(model):
    model.set_attn_implementation("eager")
    tokens = prompt(rows=2)
    embeds = model.get_input_embeddings()(tokens)
    expected = answers(model, tokens, **PADDED)
    assert torch.equal(answers(model, tokens, **PADDED, **STATIC), expected)
    assert torch.equal(answers(model, None, inputs_embeds=embeds, **PADDED, **STATIC), expected[:, 40:])


def test_an_answer_ends_where_it_should():
    model, tokenizer = tiny_model(vocab_size=300), tiny_tokenizer()
    tokens = tokenizer(TEXT * 2, return_tensors="pt")["input_ids"]
    free = answers(model, tokens)[0, tokens.shape[1] :].tolist()
    ends = {"eos_token_id": free[3]}, {"stop_strings": tokenizer.decode(free[4]), "tokenizer": tokenizer}
    for end in ends:
        expected = answers(model, tokens, **end)
        assert expected.shape[1] < tokens.shape[1] + 12
        assert torch.equal(answers(model, tokens, **end, **STATIC), expected)


@pytest.mark.parametrize("options", [{}, PADDED], ids=["", "padded"])
def test_later_turns_go_on_from_the_cache_with_room_for_what_they_add(model, options):
    found, mask = [], options.get("attention_mask")
    for static in ({}, STATIC):
        text, seen, cache = prompt(rows=2), mask, {}
        for count, new, seed in ((4, 7, 4), (270, 1, 5), (3, 0, 0)):
            given = {} if seen is None else {"attention_mask": seen}
            first = {} if cache else static
            out = answers(model, text, count, return_dict_in_generate=True, **cache, **given, **first)
            text = torch.cat([out.sequences, prompt(new, rows=2, seed=seed)], 1)
            seen = None if seen is None else torch.cat([seen, torch.ones(2, count + new, dtype=torch.long)], 1)
            cache = {"past_key_values": out.past_key_values}
        found.append(out.sequences)
        kinds = {type(held) is StaticKeptLayer for held in out.past_key_values.layers}
        assert kinds == {bool(static)}
    assert torch.equal(*found)


def test_a_cache_of_the_callers_own_in_generate_and_in_a_loop(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(answers(model, prompt(), past_key_values=cache), answers(model, prompt()))
    static, dynamic = StaticCache(config=model.config, max_cache_len=64), DynamicCache(config=model.config)
    mask = PADDED["attention_mask"]
    with torch.no_grad():
        for new, gap in ((40, 0), (1, 0), (1, 1), (1, 0), (5, 2), (1, 0)):  # steps and a later chunk, some padded
            if new < 40:
                mask = torch.cat([mask, torch.ones(2, new, dtype=torch.long)], 1)
            windows = model.config.model_type != "spts_llama"  # which count padding inside, as stock
            mask[0, mask.shape[1] - new : mask.shape[1] - new + (0 if windows else gap)] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
            given = dict(attention_mask=mask, position_ids=positions, logits_to_keep=1)
            tokens = prompt(new, rows=2, seed=new)
            expected = model(tokens, past_key_values=dynamic, **given).logits
            torch.testing.assert_close(
                model(tokens, past_key_values=static, **given).logits, expected, atol=1e-4, rtol=0
            )
        with pytest.raises(ValueError, match="must have the shape"):
            model(tokens, attention_mask=torch.ones(2, 1, 1, 50), past_key_values=static)
        with pytest.raises(ValueError, match="made for 64 tokens and 69 have come"):
            model(prompt(20, rows=2), past_key_values=static)


def test_a_loop_that_compiles_forward_makes_one_graph():
    model, compiled = tiny_model(), Compiled()
    step = torch.compile(model.forward, backend=compiled.backend, fullgraph=True)
    with torch.no_grad():
        out = model(prompt(), past_key_values=StaticCache(config=model.config, max_cache_len=64), logits_to_keep=1)
        text = [int(out.logits[0, -1].argmax())]
        for _ in range(7):
            out = step(torch.tensor([text[-1:]]), past_key_values=out.past_key_values)
            text.append(int(out.logits[0, -1].argmax()))
    assert text == answers(model, prompt(), 8)[0, 40:].tolist()
    assert (compiled.graphs, compiled.steps) == (1, 7)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_that_is_compiled_whole_answers_alike(family):
    model = made(family, shallow_model)
    torch._dynamo.reset()
    compiled, logits = torch.compile(model, backend="eager"), []
    with torch.no_grad():
        for run in (compiled, model):
            cache = StaticCache(config=model.config, max_cache_len=64)
            logits.append([run(prompt(n), past_key_values=cache, logits_to_keep=1).logits for n in (40, 1, 1, 3, 1)])
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("length", "options"), [(40, {"spts": False}), (6, {})], ids=["dense", "short"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_where_nothing_is_skipped_the_cache_is_the_stock_one_and_steps_are_compiled(family, length, options):
    model, compiled, tokens = made(family, shallow_model), Compiled(), prompt(length, rows=2)
    stock = stock_twin(model)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    out = answers(
        model, tokens, 3, attention_mask=mask, return_dict_in_generate=True, compile_config=compiled.config, **STATIC,
        **options,
    )  # fmt: skip
    assert torch.equal(out.sequences, answers(stock, tokens, 3, attention_mask=mask, **STATIC))
    assert compiled.steps == 2
    for held in out.past_key_values.layers:
        assert isinstance(held, StaticLayer) and not isinstance(held, StaticKeptLayer)


def test_a_static_cache_says_what_was_skipped(model):
    options = dict(return_dict_in_generate=True, spts={"positions": True}, **PADDED)
    dynamic, static = (
        model.skipped(answers(model, prompt(rows=2), 1, **options, **kind).past_key_values) for kind in ({}, STATIC)
    )
    later = answers(model, prompt(rows=2), 5, return_dict_in_generate=True, **PADDED, **STATIC).past_key_values
    assert [row["active"] for row in model.skipped(later)] == [row["active"] for row in dynamic]
    for ours, theirs in zip(static, dynamic, strict=True):
        for name in ("candidates", "active", "cached"):
            assert ours[name] == theirs[name]
        assert theirs["positions"] is None or torch.equal(ours["positions"], theirs["positions"])
        assert ours["bytes"] == theirs["bytes"] / theirs["cached"] * 256


def test_copied_and_reordered_caches_answer_alike(model):
    tokens, order = prompt(rows=2), torch.tensor([1, 0])
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens, past_key_values=cache, logits_to_keep=1, **PADDED)
        other = copy.deepcopy(cache)
        other.reorder_cache(order)
        expected = model(tokens[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(model(tokens[order][:, :1], past_key_values=other).logits, expected[order])
        chunk = torch.cat([PADDED["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        ours, theirs = (
            model(part, attention_mask=seen, past_key_values=held).logits
            for part, seen, held in ((tokens[:, :3], chunk, cache), (tokens[order][:, :3], chunk[order], other))
        )
        torch.testing.assert_close(theirs, ours[order])


def test_what_a_static_cache_can_not_do_gets_a_clear_error():
    model, tokens = tiny_model(), prompt()
    with pytest.raises(ValueError, match="offloaded static cache can't hold what skipping leaves"):
        answers(model, tokens, cache_implementation="offloaded_static")
    with pytest.raises(ValueError, match="not supported with Static cache"):  # transformers' own
        answers(model, tokens, prompt_lookup_num_tokens=3, **STATIC)
    out = answers(model, tokens, return_dict_in_generate=True, **STATIC)
    with pytest.raises(ValueError, match="make a new one"):
        out.past_key_values.reset()
    small, ran = StaticCache(config=model.config, max_cache_len=30), []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="made for 30 tokens and 40 have come"):
        model(tokens, past_key_values=small, logits_to_keep=1)
    assert not ran and type(small.layers[0]) is StaticLayer  # told before the work, and the cache is as it was


@pytest.mark.parametrize("window", [None, 128, 10])
def test_a_later_turn_without_room_in_a_stock_static_cache_gets_a_clear_error(window):
    model, short = tiny_model("mistral", {**SCHEDULE, "min_length": 30}, sliding_window=window), prompt(20)
    out = answers(model, short, 4, return_dict_in_generate=True, **STATIC)
    text = torch.cat([out.sequences, prompt(8, seed=4)], 1)
    cache, ends = out.past_key_values, answers(model, text, 4, spts=False)
    if window == 10:  # whose layers hold no more in any case
        assert torch.equal(answers(model, text, 4, past_key_values=cache), ends)
        return
    for new in (text, text[:, :24]):  # the last one is a single token
        with pytest.raises(ValueError, match="made for 23 tokens, and this turn may need"):
            answers(model, new, 4, past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="made for 23 tokens, and this turn may need 28"):
        model(text[:, 23:28], past_key_values=cache)
    for room in (34, 35):
        own = StaticCache(config=model.config, max_cache_len=room)
        answers(model, short, 4, past_key_values=own)
        if room == 35:
            assert torch.equal(answers(model, text, 4, past_key_values=own), ends)
            continue
        with pytest.raises(ValueError, match="made for 34 tokens, and this turn may need 35"):
            answers(model, text, 4, past_key_values=own)


def test_where_all_layers_have_windows_a_static_cache_does_not_tell_its_length():
    model, tokens = tiny_model("mistral", sliding_window=10), prompt()
    expected = answers(model, tokens)
    for length, error in ((64, "does not tell how many tokens"), (8, "made for 8 tokens and 40 have come")):
        with pytest.raises(ValueError, match=error):
            model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=length), logits_to_keep=1)
    own = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(answers(model, tokens, past_key_values=own), expected)
    assert torch.equal(answers(model, tokens, **STATIC), expected)


def test_a_dense_answer_leaves_no_say_in_the_room_of_a_later_prompt():
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=400)
    answers(model, prompt(6), 2, past_key_values=cache, spts=False)
    cache.reset()
    with torch.no_grad():
        model(prompt(), past_key_values=cache, logits_to_keep=1)
    assert cache.layers[0].max_cache_len == 512  # in steps of 256, for 400 tokens
