"""Skipping equals the independent reference; skipping off, or with nothing to skip, equals the stock model."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference
from strategies import schedules
from tiny import FAMILIES, SCHEDULE, stock_twin, tiny_model

from spts_compress.modeling import decoding


def assert_cache_equals(cache, reference, spare):
    """A layer with a window holds what the next token sees there, and at most `spare` tokens more."""
    for layer, (held, expected) in enumerate(zip(cache.layers, reference.cache, strict=True)):
        needed = sum(reference.sees(layer, reference.count, position) for position in expected["pos"])
        count = held.keys.shape[-2]
        assert count == len(expected["pos"]) or needed <= count < reference.c.sliding_window + spare
        for ours, name in ((held.keys, "k"), (held.values, "v")):
            torch.testing.assert_close(ours[0].transpose(0, 1), torch.stack(expected[name][-count:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=schedules(), length=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
def test_skipping_equals_the_reference(family, schedule, length, seed, data):
    changes = dict(tie_word_embeddings=data.draw(st.booleans()))
    if not family.startswith("deepseek"):  # whose heads all have their own
        changes["num_key_value_heads"] = data.draw(st.sampled_from([1, 2, 4]))
    if family in ("llama", "qwen3", "deepseek_v2", "deepseek_v3"):
        changes["attention_bias"] = data.draw(st.booleans())
    if family in ("mistral", "mixtral", "phi3", "qwen2"):
        changes["sliding_window"] = data.draw(st.sampled_from([None, 4, 15]))
    if changes.get("sliding_window") and family == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 2}
    if family == "deepseek_v3":
        changes["rope_interleave"] = data.draw(st.booleans())
    model = tiny_model(family, schedule, seed, **changes).double()
    tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))
    reference = Reference(model.state_dict(), model.config, schedule)
    expected = reference.prefill(tokens[0].tolist())
    if reference.margin < 1e-6:  # the model scores in float32: nearer scores may go either way
        return
    with torch.no_grad():
        out = model(tokens, logits_to_keep=1)
        torch.testing.assert_close(out.logits[0, -1], expected, rtol=0, atol=1e-4)
        spare = max(schedule["recent_tokens"], schedule["probe"]["window_size"])
        assert_cache_equals(out.past_key_values, reference, spare)
        every = model.model(tokens, spts=True)
        torch.testing.assert_close(every.last_hidden_state[0], torch.stack(reference.states), rtol=0, atol=1e-4)
        for token in (5, 50):
            step = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
            torch.testing.assert_close(step.logits[0, -1], reference.step(token), rtol=0, atol=1e-4)
        assert_cache_equals(out.past_key_values, reference, spare + 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_skipping_off_is_the_stock_model_bit_for_bit(family, attention):
    model = tiny_model(family)
    stock = stock_twin(model)
    model.set_attn_implementation(attention)
    stock.set_attn_implementation(attention)
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad():
        for extra in ({}, {"attention_mask": mask}):
            expected = stock(tokens, **extra)
            assert torch.equal(model(tokens, **extra).logits, expected.logits)  # every position: dense by rule
            off = model(tokens, logits_to_keep=1, spts=False, **extra)
            assert torch.equal(off.logits, stock(tokens, logits_to_keep=1, **extra).logits)
            assert torch.equal(model.model(tokens, **extra).last_hidden_state, stock.model(tokens, **extra)[0])
            model.config.spts = {**SCHEDULE, "enabled": False}
            assert torch.equal(model(tokens, logits_to_keep=1, **extra).logits, off.logits)
            model.config.spts = SCHEDULE
        short = tokens[:, :8]  # no longer than the smallest budget
        assert torch.equal(model(short, logits_to_keep=1).logits, stock(short, logits_to_keep=1).logits)
        assert not torch.equal(model(tokens, logits_to_keep=1).logits, off.logits)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_before_the_first_that_skips_are_stock_in_steps_too(family, hooked, monkeypatch):
    """Bit for bit on a CPU, where a prompt runs in one piece; hooks on their attention run."""
    monkeypatch.setattr(decoding, "STOCK_ON", ())
    model = tiny_model(family, {**SCHEDULE, "start": 2})
    tokens, given, seen = torch.arange(3, 83).view(2, 40), [], []
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    model.model.layers[2].register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    if hooked:
        model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        spts, dense = (model(tokens, attention_mask=mask, logits_to_keep=1, spts=spts) for spts in (True, False))
    assert len(seen) == 2 * hooked
    pairs = [given]
    for ours, stock in zip(spts.past_key_values.layers[:2], dense.past_key_values.layers[:2], strict=True):
        assert type(ours) is type(stock)
        pairs += (ours.keys, stock.keys), (ours.values, stock.values)
    rounding = 1e-5 if family == "deepseek_v2" else 0  # whose complex product depends on where numbers lie in memory
    for ours, stock in pairs:
        torch.testing.assert_close(ours, stock, rtol=0, atol=rounding)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window_size", [1, 4])
def test_left_padded_rows_equal_their_own_runs(attention, window_size):
    schedule = {**SCHEDULE, "probe": {"window_size": window_size, "heads": "max", "kernel_size": 3}, "sink_tokens": 2}
    model = tiny_model("llama", schedule)
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 97, (n,), generator=generator) for n in (40, 23, 9, 3)]
    width = 43  # even the longest row is padded
    tokens = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.arange(width) >= width - len(r) for r in rows]).long()
    settings_ = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    together = model.generate(tokens, attention_mask=mask, **settings_)[:, width:]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=position_ids, logits_to_keep=1).logits
    for row, ours, ours_logits in zip(rows, together, logits, strict=True):
        alone = model.generate(row[None], **settings_)[0, len(row) :]
        assert torch.equal(alone, ours)
        torch.testing.assert_close(model(row[None], logits_to_keep=1).logits[0], ours_logits, rtol=0, atol=1e-4)
