"""Every way transformers is used: each row of the README's matrix, against plain references."""

import copy
import threading

import pytest
import torch
from tiny import BARE, SCHEDULE, TEXT, UPDATING, shallow_model, stock_twin, tiny_model, tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache, pipeline
from transformers.cache_utils import DynamicLayer
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from spts_compress.modeling.stock_layer import layer_kinds, layer_windows

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
SCHEDULES = {"llama": SCHEDULE, "qwen2": BARE, "gemma3_text": UPDATING}  # the last one has windows


def prompt(length=40, rows=1, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached(model, later=0):
    """Tokens in the layers' caches after a prompt of 40 tokens, and `later` ones."""
    share = model.config.spts.get("kv") or 0
    counts = [max(n, min(m, round(share * 40))) for n, m in zip([40, 12, 12, 8, 8], [40, 40, 40, 16, 16], strict=True)]
    windows = [model.config.sliding_window if "sliding" in kind else None for kind in layer_kinds(model.config)]
    return [
        n + later if w is None else min(n + later, w - (i == 0))
        for i, (n, w) in enumerate(zip(counts, windows, strict=True))
    ]


def next_logits(model, tokens, continuation):
    """Logits after `continuation`, one token at a time on a fresh skipped prefill of one prompt (n,)."""
    with torch.no_grad():
        out = model(tokens[None], logits_to_keep=1)
        for token in continuation:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
    return out.logits[0, -1]


def greedy(model, tokens, count, forbid=()):
    made = []
    for _ in range(count):
        logits = next_logits(model, tokens, made)
        logits[list(forbid)] = -torch.inf
        made.append(int(logits.argmax()))
    return made


@pytest.fixture(params=SCHEDULES)
def model(request):
    return tiny_model(request.param, SCHEDULES[request.param])


def new_tokens(model, tokens, count=6, **options):
    return model.generate(tokens, max_new_tokens=count, **{**GREEDY, **options})[:, tokens.shape[1] :]


def test_greedy_and_a_custom_logits_processor(model):
    tokens = prompt()
    expected = greedy(model, tokens[0], 6)
    assert new_tokens(model, tokens)[0].tolist() == expected

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, expected[0]] = -torch.inf
            return scores

    got = new_tokens(model, tokens, logits_processor=LogitsProcessorList([Forbid()]))[0].tolist()
    assert got == greedy(model, tokens[0], 6, forbid=[expected[0]])


def test_sampling_several_sequences(model):
    tokens = prompt()
    torch.manual_seed(7)
    made = new_tokens(model, tokens, do_sample=True, num_return_sequences=3, top_k=0)
    torch.manual_seed(7)
    rows = [[], [], []]
    for _ in range(6):
        logits = torch.stack([next_logits(model, tokens[0], row) for row in rows])
        for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist(), strict=True):
            row.append(token)
    assert made.tolist() == rows


def test_beam_search(model):
    tokens = prompt()
    beams = [(0.0, [])]
    for _ in range(5):
        grown = []
        for total, row in beams:
            logs = next_logits(model, tokens[0], row).log_softmax(-1)
            grown += [(total + float(logs[t]), [*row, t]) for t in logs.topk(6).indices.tolist()]
        beams = sorted(grown, reverse=True)[:3]
    made = new_tokens(model, tokens, 5, num_beams=3, num_return_sequences=3)
    assert made.tolist() == [row for _, row in beams]


def test_beam_sampling_of_padded_rows_runs_on_each_rows_own_cache(model):
    rows = [prompt(40)[0], prompt(25, seed=3)[0]]
    tokens = torch.stack([rows[0], torch.cat([torch.zeros(15, dtype=torch.long), rows[1]])])
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    made = model.generate(tokens, attention_mask=mask, num_beams=3, max_new_tokens=5, **GREEDY)[:, 40:]
    for row, ours in zip(rows, made, strict=True):
        assert torch.equal(new_tokens(model, row[None], 5, num_beams=3)[0], ours)
    torch.manual_seed(0)
    options = dict(num_beams=2, num_return_sequences=2, max_new_tokens=5, return_dict_in_generate=True)
    sampling = {**GREEDY, "do_sample": True, "top_k": 0}
    drawn = model.generate(tokens, attention_mask=mask, output_scores=True, **options, **sampling)
    for number, (row, score) in enumerate(zip(drawn.sequences[:, 40:].tolist(), drawn.sequences_scores, strict=True)):
        logs = [next_logits(model, rows[number // 2], row[:n]).log_softmax(-1)[row[n]] for n in range(5)]
        torch.testing.assert_close(score, torch.stack(logs).mean(), atol=1e-4, rtol=0)


def test_prompt_lookup_and_assisted_decoding_as_target_and_as_draft(model):
    tokens = torch.cat([prompt(20), prompt(20)], dim=1)  # repeats itself, so that candidates are found
    expected = new_tokens(model, tokens, 10)
    assert torch.equal(new_tokens(model, tokens, 10, prompt_lookup_num_tokens=3), expected)
    draft = tiny_model(seed=5)
    assert torch.equal(new_tokens(model, tokens, 10, assistant_model=draft), expected)
    assert torch.equal(new_tokens(model, tokens, 10, assistant_model=copy.deepcopy(model)), expected)
    stock = stock_twin(draft)
    assert torch.equal(new_tokens(stock, tokens, 10, assistant_model=model), new_tokens(stock, tokens, 10))


def test_losses_and_log_likelihoods_are_dense(model):
    tokens, stock = prompt(rows=2), stock_twin(model)
    with torch.no_grad():
        ours, dense = model(tokens, labels=tokens), stock(tokens, labels=tokens)
        assert torch.equal(ours.loss, dense.loss)
        assert torch.equal(ours.logits, dense.logits)
        kept = model(tokens, labels=tokens, logits_to_keep=0, spts=True)
        assert kept.logits.shape == dense.logits.shape
        assert not torch.equal(kept.logits, dense.logits)
        assert torch.allclose(kept.logits[:, -1], model(tokens, logits_to_keep=1).logits[:, -1], atol=1e-5)


def test_training_is_dense(model):
    tokens, stock = prompt(rows=2), stock_twin(model).train()
    model.train()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    stock(tokens, labels=tokens).loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad)
    assert torch.equal(model(tokens, logits_to_keep=1).logits, stock(tokens, logits_to_keep=1).logits)
    with pytest.raises(ValueError, match="inference only"):
        model(tokens, spts=True)


def test_gradients_flow_through_a_skipped_prefill(model):
    tokens = prompt()
    model(tokens, logits_to_keep=1).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, expected)


def test_hidden_states_and_attentions_are_the_stock_ones(model):
    tokens, stock = prompt(rows=2), stock_twin(model)
    for m in (model, stock):
        m.set_attn_implementation("eager")
    options = dict(output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    with torch.no_grad():
        ours, dense = model(tokens, **options), stock(tokens, **options)
        for a, b in zip(ours.hidden_states + ours.attentions, dense.hidden_states + dense.attentions, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="spts=False"):
            model(tokens, spts=True, **options)
        after = model(tokens, logits_to_keep=1).past_key_values
        step = model(tokens[:, :1], past_key_values=after, output_hidden_states=True, output_attentions=True)
        assert len(step.hidden_states) == 6
        assert [a.shape[-1] - 1 for a in step.attentions] == cached(model)
        assert isinstance(model(tokens, logits_to_keep=1, return_dict=False), tuple)
        assert isinstance(model.model(tokens, spts=True, return_dict=False), tuple)


def test_several_turns_see_the_kept_tokens(model):
    tokens, more = prompt(), prompt(7, seed=4)
    first = model.generate(tokens, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([first.sequences, more], dim=1)
    second = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY)
    made = first.sequences[0, 40:].tolist()
    expected = []
    for _ in range(5):
        logits = next_logits(model, tokens[0], [*made, *more[0].tolist(), *expected])
        expected.append(int(logits.argmax()))
    assert second[0, turn.shape[1] :].tolist() == expected
    again = new_tokens(model, turn, 5)  # without the cache the whole conversation is prefilled anew
    assert again[0].tolist() == greedy(model, turn[0], 5)


def test_one_prompt_several_questions(model):
    tokens = prompt()
    with torch.no_grad():
        cache = model(tokens, logits_to_keep=1).past_key_values
        questions = prompt(5, rows=3, seed=9)
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(3)
        together = model(questions, past_key_values=wide).logits[:, -1]
        for question, logits in zip(questions, together, strict=True):
            alone = model(question[None], past_key_values=copy.deepcopy(cache)).logits[0, -1]
            torch.testing.assert_close(alone, logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(next_logits(model, tokens[0], question.tolist()), logits, rtol=0, atol=1e-4)


def test_a_later_chunk_equals_its_tokens_one_by_one_in_a_padded_batch(model):
    rows = [prompt(40)[0], prompt(25, seed=3)[0]]
    tokens = torch.stack([rows[0], torch.cat([torch.zeros(15, dtype=torch.long), rows[1]])])
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    later, later_mask = prompt(6, rows=2, seed=8), torch.ones(2, 6, dtype=torch.long)
    gap = 0 if set(layer_kinds(model.config)) != {"full_attention"} else 2  # as stock, a window counts padding inside
    later_mask[0, :gap] = 0  # the later chunk is padded too
    positions = (torch.cat([mask, later_mask], 1).cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, position_ids=positions[:, :40], logits_to_keep=1)
        whole = torch.cat([mask, later_mask], 1)
        out = model(later, attention_mask=whole, position_ids=positions[:, 40:], past_key_values=out.past_key_values)
    for row, chunk, skip, logits in zip(rows, later, (gap, 0), out.logits, strict=True):
        torch.testing.assert_close(next_logits(model, row, chunk[skip:].tolist()), logits[-1], atol=1e-4, rtol=0)


def test_the_last_logits_split_the_prompt_from_a_later_chunk(model):
    tokens, behind = prompt(), prompt(4, seed=2)
    with torch.no_grad():
        out = model(torch.cat([tokens, behind], 1), logits_to_keep=5, use_cache=True)
    for count in range(5):
        expected = next_logits(model, tokens[0], behind[0, :count].tolist())
        torch.testing.assert_close(out.logits[0, count], expected, atol=1e-4, rtol=1e-4)
    assert out.past_key_values.get_seq_length() == 44
    assert model(tokens[:, :3], logits_to_keep=9).logits.shape[1] == 3  # as stock: no more than there are


def test_chunked_prefill_is_dense(model):
    tokens = prompt()
    dense = new_tokens(model, tokens, spts=False)
    assert torch.equal(new_tokens(model, tokens, prefill_chunk_size=16), dense)
    assert torch.equal(dense, new_tokens(stock_twin(model), tokens))
    for spts in (True, {"sink_tokens": 2}):
        with pytest.raises(ValueError, match="leave prefill_chunk_size unset"):
            new_tokens(model, tokens, prefill_chunk_size=16, spts=spts)


def test_continuous_batching_is_dense(model):
    prompts = [prompt(length, seed=length)[0].tolist() for length in (20, 40, 60)]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0, use_cuda_graph=False)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)  # or it fills the machine's memory
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=room, warmup=False)
    for (_, request), tokens in zip(sorted(found.items()), prompts, strict=True):
        dense = model.generate(torch.tensor([tokens]), generation_config=config, spts=False)
        assert request.generated_tokens == dense[0, len(tokens) :].tolist()


def test_without_a_cache_every_pass_is_dense(model):
    tokens = prompt()
    assert torch.equal(new_tokens(model, tokens, use_cache=False), new_tokens(stock_twin(model), tokens))


def test_pipeline_and_streamer():
    model, tokenizer = tiny_model(vocab_size=300), tiny_tokenizer()
    text = TEXT * 2
    inputs = tokenizer(text, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [made] = run(text, max_new_tokens=5, return_full_text=False, do_sample=False, eos_token_id=None)
    assert made["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)

    class Collect(BaseStreamer):
        seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Collect()
    model.generate(**inputs, max_new_tokens=5, streamer=streamer, **GREEDY)
    assert streamer.seen[-6:] == [*expected[0].tolist(), "end"]


def test_inputs_embeds_and_positions_of_the_caller(model):
    tokens = prompt()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(tokens)
        before = embeds.clone()
        expected = model(tokens, logits_to_keep=1).logits
        assert torch.equal(model(inputs_embeds=embeds, logits_to_keep=1).logits, expected)
        assert torch.equal(embeds, before)
        shifted = model.double()(tokens, position_ids=torch.arange(100, 140)[None], logits_to_keep=1).logits
        torch.testing.assert_close(shifted.float(), expected, atol=1e-4, rtol=0)  # rotary positions are relative
        model.float()
    made = model.generate(inputs_embeds=embeds, max_new_tokens=6, **GREEDY)
    assert torch.equal(made, new_tokens(model, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_like_single_precision_scores(model, dtype):
    tokens = prompt()
    with torch.no_grad():
        half = model.to(dtype)(tokens, logits_to_keep=1)
        assert half.logits.dtype == dtype
        assert torch.isfinite(half.logits).all()
        assert [layer.keys.shape[2] for layer in half.past_key_values.layers] == cached(model)
    assert new_tokens(model, tokens)[0].tolist() == greedy(model, tokens[0], 6)


def test_flex_attention_equals_sdpa():
    model = tiny_model(hidden_size=64, num_attention_heads=4)  # flex needs a head size of 16 or more
    tokens = prompt()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # not compiled: that takes a minute
        expected = model(tokens, logits_to_keep=1)
        model.set_attn_implementation("flex_attention")
        got = model(tokens, logits_to_keep=1)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
        step = model(tokens[:, :1], past_key_values=got.past_key_values).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(
            step, model(tokens[:, :1], past_key_values=expected.past_key_values).logits, atol=1e-4, rtol=1e-4
        )


def test_masks_that_are_not_left_padding_get_a_clear_error(model):
    tokens = prompt(rows=2)
    right = torch.ones_like(tokens)
    right[1, -5:] = 0
    hole = torch.ones_like(tokens)
    hole[0, 3] = 0
    hole[0, 0] = 1
    four = torch.zeros(2, 1, 40, 40)
    for mask in (right, hole, four):
        with pytest.raises(ValueError, match="pass spts=False"):
            model(tokens, attention_mask=mask, logits_to_keep=1)
        dense = model(tokens, attention_mask=mask, logits_to_keep=1, spts=False).logits
        assert torch.equal(dense, stock_twin(model)(tokens, attention_mask=mask, logits_to_keep=1).logits)
    out = model(tokens, logits_to_keep=1)
    with pytest.raises(ValueError, match="must have the shape"):
        model(tokens[:, :1], attention_mask=torch.ones(2, 1), past_key_values=out.past_key_values)


def test_caches_that_cannot_hold_unequal_layers_get_a_clear_error(model):
    class Quantised(DynamicLayer):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers[2] = Quantised()
    with pytest.raises(ValueError, match="this one has Quantised; leave cache_implementation unset"):
        model(prompt(), past_key_values=cache, logits_to_keep=1)
    short = model(prompt(6), past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(short.logits, model(prompt(6), logits_to_keep=1).logits, atol=1e-4, rtol=0)


def test_cache_operations(model):
    tokens, cache = prompt(rows=3), DynamicCache(config=model.config)
    cache.activate_past_recording()  # or transformers' layers with windows can't be cropped
    with torch.no_grad():
        out = model(tokens, past_key_values=cache, logits_to_keep=1)

        def next_pass():  # as `generate` does between passes, which transformers 5.17 asks for where there are windows
            made = copy.deepcopy(cache)
            made.crop(0)
            return made

        grown = model(prompt(4, rows=3, seed=6), past_key_values=next_pass()).past_key_values
        grown.crop(-4)
        for a, b in zip(grown.layers, cache.layers, strict=True):
            count = a.keys.shape[2]  # a stock layer with a window only holds its last tokens again
            assert torch.equal(a.keys, b.keys[:, :, -count:]) and count >= min(9, b.keys.shape[2])
        step = model(tokens[:, :1], past_key_values=next_pass()).logits
        cropped = DynamicCache(config=model.config)
        cropped.activate_past_recording()
        model(tokens, past_key_values=cropped, logits_to_keep=1, spts={"kv": None})  # what attention ran on, no more
        cropped.crop(-1)  # every layer holds the prompt's last token
        for layer, seen in zip(cropped.layers[1:], [40, 40, 16, 16], strict=True):
            assert (layer.prompt_length, layer.candidates, layer.active) == (
                39,
                seen - 1,
                (12 if seen == 40 else 8) - 1,
            )
            if layer.ends is not None:
                assert layer.ends.tolist() == [[39]] * 3 and layer.positions.shape == (3, layer.cached)
        again = model(tokens[:, -1:], past_key_values=cropped).logits
        torch.testing.assert_close(again, out.logits, rtol=1e-5, atol=1e-4)
        order = torch.tensor([2, 0, 0])
        for move in ("reorder_cache", "batch_select_indices"):
            moved = next_pass()
            getattr(moved, move)(order)
            torch.testing.assert_close(model(tokens[order][:, :1], past_key_values=moved).logits, step[order])
        with pytest.raises(ValueError, match="negative"):
            copy.deepcopy(cache).layers[1].crop(3)
        with pytest.raises(ValueError, match="Run the prompt again"):
            cache.crop(-2)
        with pytest.raises(ValueError, match="run the prompt again"):  # it was cropped in part before the error
            model(tokens[:, :1], past_key_values=cache)
        cache.reset()
        if cache.layers[1].get_seq_length() > 0:
            return  # transformers 5.17 keeps the length of a cache that was reset, so it can't be used again
        torch.testing.assert_close(model(tokens, past_key_values=cache, logits_to_keep=1).logits, out.logits)
        cache.reset()
        torch.testing.assert_close(
            model(tokens, past_key_values=cache, logits_to_keep=1, spts=False).logits,
            model(tokens, logits_to_keep=1, spts=False).logits,
        )


def test_an_empty_cache_without_layers_works(model):
    tokens = prompt()
    with torch.no_grad():
        bare = model(tokens, past_key_values=DynamicCache(), logits_to_keep=1).logits
        assert torch.equal(bare, model(tokens, logits_to_keep=1).logits)


def test_the_upper_layers_alone_run_dense_on_a_cache_of_the_callers(model):
    tokens, lower = prompt(), []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda _, args, kwargs: lower.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=1, spts=False).logits
        handle.remove()
        given = dict(inputs_embeds=lower[0], first_layer=3, logits_to_keep=1)
        bare = DynamicCache()
        for cache in (bare, DynamicCache(config=model.config)):
            found = model(**given, past_key_values=cache, spts=False).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert [held.get_seq_length() for held in bare.layers] == [0, 0, 0, 40, 40]
        with pytest.raises(ValueError, match="first_layer needs a dynamic cache"):
            model(**given, past_key_values=StaticCache(config=model.config, max_cache_len=64), spts=False)


def test_short_empty_and_overlong_prompts_are_as_stock(model):
    stock = stock_twin(model)
    with torch.no_grad():
        for length in (1, 2, 8):
            assert torch.equal(
                model(prompt(length), logits_to_keep=1).logits, stock(prompt(length), logits_to_keep=1).logits
            )
        for empty in (model, stock):  # the stock model has no empty batches either
            with pytest.raises(RuntimeError, match="0 elements"):
                empty(torch.zeros(0, 40, dtype=torch.long), logits_to_keep=1)
        for length in (256, 300):  # the maximum context, and beyond it
            assert torch.isfinite(model(prompt(length), logits_to_keep=1).logits).all()
    one = torch.tensor([[5]])
    assert torch.equal(new_tokens(model, one), new_tokens(stock, one))


def test_copies_and_casts_answer_alike(model):
    tokens = prompt()
    expected = new_tokens(model, tokens)
    assert torch.equal(new_tokens(copy.deepcopy(model), tokens), expected)
    model.double().float()
    assert torch.equal(new_tokens(model, tokens), expected)


def test_lora_adapters_work_and_come_off():
    peft = pytest.importorskip("peft")
    model, tokens = tiny_model("llama", UPDATING), prompt()
    expected = new_tokens(model, tokens)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.eval()
    changed = new_tokens(adapted, tokens)
    assert not torch.equal(changed, expected)
    with adapted.disable_adapter():
        assert torch.equal(new_tokens(adapted, tokens), expected)
    merged = adapted.merge_and_unload()
    assert torch.equal(new_tokens(merged, tokens), changed)
    loss = adapted(tokens, labels=tokens).loss
    assert torch.isfinite(loss)


def test_offloaded_layers_answer_alike(tmp_path, model):
    pytest.importorskip("accelerate")
    tokens, mask = prompt(rows=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=4, **GREEDY)
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(5)}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(loaded.generate(tokens, attention_mask=mask, max_new_tokens=4, **GREEDY), expected)
    automatic = type(model).from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(automatic.generate(tokens, attention_mask=mask, max_new_tokens=4, **GREEDY), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_compiled_model_answers_alike(family):
    model, tokens = shallow_model(family), prompt()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=1)
        compiled = torch.compile(model, backend="eager")
        got = compiled(tokens, logits_to_keep=1)
        torch.testing.assert_close(got.logits, expected.logits)
        step = compiled(tokens[:, :1], past_key_values=got.past_key_values)
        torch.testing.assert_close(step.logits, model(tokens[:, :1], past_key_values=expected.past_key_values).logits)


def test_a_call_can_change_the_schedule(model):
    tokens = prompt()
    before = model.config.spts
    changed = {**before, "stages": [{"end": 4, "budget": 20}], "sink_tokens": 3}
    other = tiny_model(model.config.model_type.removeprefix("spts_"), changed)
    expected = new_tokens(other, tokens)
    assert torch.equal(new_tokens(model, tokens, spts={"stages": changed["stages"], "sink_tokens": 3}), expected)
    assert model.config.spts is before
    for bad, error in (
        ({"start": 2}, "can't be changed"),
        ({"update": {"attention_rank": 1, "ffn_rank": 1}}, "can't be changed"),
        ({"stagse": []}, "stagse"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [{"end": 3, "budget": 20, "prune_to": 15}]}, "nothing is pruned after the last stage"),
        ({"stages": [{"end": 4, "budget": 20, "prune_to": 30}]}, "nothing is pruned after the last stage"),
        ({"probe": {"heads": {"1": [99]}}}, "has head 99 of layer 1"),
        ({"probe": {"heads": {"1": [-1]}}}, "probe.heads"),
        ({"probe": {"heads": {"1": [True]}}}, "probe.heads"),
        ({"probe": {"heads": {"1": [0], "5": [0]}}}, "probe.heads"),
    ):
        with pytest.raises(ValueError, match=error):
            new_tokens(model, tokens, spts=bad)
    with pytest.raises(TypeError, match="spts must be"):
        model(tokens, spts="off")


def test_the_cache_says_what_was_skipped(model):
    rows = [prompt(40)[0], prompt(25, seed=3)[0]]
    tokens = torch.stack([rows[0], torch.cat([torch.zeros(15, dtype=torch.long), rows[1]])])
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, spts={"positions": True}, **GREEDY
    )
    seen = model.skipped(out.past_key_values)
    assert [layer["candidates"] for layer in seen] == [40, 40, 40, 16, 16]
    assert [layer["active"] for layer in seen] == [40, 12, 12, 8, 8]
    assert [layer["cached"] for layer in seen] == cached(model, later=2)
    for number, row in enumerate(rows):
        alone = model(row[None], logits_to_keep=1, spts={"positions": True})
        for ours, single in zip(seen[1:], model.skipped(alone.past_key_values)[1:], strict=True):
            kept = ours["positions"][number]
            assert kept[kept >= 0].tolist() == single["positions"][0].tolist()
            assert kept[-1] == len(row) - 1
    plain = model.skipped(model(tokens[:1], logits_to_keep=1).past_key_values)
    assert all(layer["positions"] is None for layer, w in zip(plain, layer_windows(model.config), strict=True) if not w)


def test_threads_with_different_settings_get_their_own_answers(model):
    tokens = prompt()
    settings = [None, False, {"stages": [{"end": 4, "budget": 20}]}, {"sink_tokens": 5}]
    expected = [new_tokens(model, tokens, spts=s).tolist() for s in settings]
    found: dict[int, list] = {}

    def work(number):
        found[number] = [new_tokens(model, tokens, spts=settings[number]).tolist() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers == [expected[number]] * 5 for number, answers in found.items())


def test_an_untested_transformers_is_refused(monkeypatch):
    import importlib

    import transformers

    from spts_compress.modeling import family_classes

    for version in ("5.16.4", "5.24.0", "4.57.1"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(ImportError, match="tested with transformers"):
            importlib.reload(family_classes)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_length": 30},
        {"stages": [{"end": 2, "budget": {"fraction": 0.3, "floor": 1}}, {"end": 4, "budget": 12}]},
        {
            "stages": [
                {"end": 2, "budget": {"fraction": 0.5, "floor": 1, "cap": 12}},
                {"end": 4, "budget": {"fraction": 0.3, "floor": 1}},
            ]
        },
        {
            "stages": [
                {"end": 2, "budget": {"fraction": 0.5, "floor": 4}, "prune_to": {"fraction": 0.5, "floor": 20}},
                {"end": 4, "budget": 20},
            ]
        },
    ],
)
def test_stages_of_equal_width_may_fill_their_rows_differently(changes):
    model = tiny_model("llama", {**SCHEDULE, **changes}).double()
    rows = [prompt(40)[0], prompt(30, seed=3)[0], prompt(20, seed=4)[0]]
    tokens = torch.stack([torch.cat([torch.zeros(40 - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.arange(40) >= 40 - len(r) for r in rows]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
        every = model(tokens, attention_mask=mask, position_ids=positions, spts=True).logits
        for number, row in enumerate(rows):
            alone = model(row[None], logits_to_keep=1).logits[0]
            torch.testing.assert_close(logits[number], alone, atol=1e-6, rtol=0)
            torch.testing.assert_close(every[number, -1:], alone, atol=1e-6, rtol=0)


def test_packed_sequences_get_a_clear_error():
    packed = torch.arange(20).repeat(2)[None]
    with pytest.raises(ValueError, match="packed"):
        tiny_model()(prompt(), position_ids=packed, use_cache=False, spts=True, logits_to_keep=1)


def test_autocast_keeps_the_scores_in_single_precision(model):
    tokens = prompt()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, logits_to_keep=1)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == cached(model)


def test_a_proxy_out_of_float16_range_does_not_spoil_the_selection():
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.proxy.down.mul_(300)
            layer.proxy.gate.mul_(300)
    model.half()
    states = torch.randn(1, 40, 32).half() * 2000
    predicted = model.model.layers[1].proxy(states)
    assert torch.isfinite(predicted).all()
    assert torch.isfinite(model(prompt(), logits_to_keep=1).logits).all()


def test_asking_for_skipping_without_a_cache_keeps_none(model):
    tokens = prompt()
    out = model(tokens, spts=True, logits_to_keep=3, use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, model(tokens, logits_to_keep=3).logits)


def test_inputs_that_make_no_sense_are_named(model):
    tokens = prompt(rows=2)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens), logits_to_keep=1)
    mask = torch.ones_like(tokens)
    mask[1, :38] = 0
    with pytest.raises(ValueError, match="no more than logits_to_keep"):
        model(tokens, attention_mask=mask, logits_to_keep=3)
    bare = tiny_model(
        model.config.model_type.removeprefix("spts_"), {**SCHEDULE, "start": 3, "stages": SCHEDULE["stages"][1:]}
    )
    bare.config.spts = SCHEDULE
    with pytest.raises(ValueError, match="load it again"):
        bare(tokens, logits_to_keep=1)


def test_a_hooks_copy_of_a_layers_output_is_left_alone(model):
    held = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: held.append((output, output.clone())))
    with torch.no_grad():
        model(prompt(), logits_to_keep=1)
    handle.remove()
    assert torch.equal(*held[0])


def test_quantised_loading_leaves_the_proxies_alone(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model, tokens = tiny_model("llama", UPDATING, hidden_size=64), prompt()
    options = dict(quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.bfloat16)
    stock_twin(model).save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "spts")
    stock = type(model).__bases__[1].from_pretrained(tmp_path / "stock", **options)
    ours = type(model).from_pretrained(tmp_path / "spts", **options)
    layer = ours.model.layers[2]
    assert type(layer.self_attn.k_proj.weight) is not torch.nn.Parameter
    assert type(layer.proxy.down) is torch.nn.Parameter
    assert layer.proxy.down.dtype == layer.attention_update.up.dtype == torch.bfloat16
    assert type(layer.attention_update.up) is torch.nn.Parameter
    with torch.no_grad():
        assert torch.equal(ours(tokens, logits_to_keep=1, spts=False).logits, stock(tokens, logits_to_keep=1).logits)
        out = ours(tokens, logits_to_keep=1)
    assert [held.keys.shape[2] for held in out.past_key_values.layers] == cached(model)
    assert new_tokens(ours, tokens)[0].tolist() == greedy(ours, tokens[0], 6)
