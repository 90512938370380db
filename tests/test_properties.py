"""Random batches, paddings, schedules and cache operations: every row equals its own run."""

import copy
from functools import partial

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import schedules
from tiny import FAMILIES, tiny_model
from transformers import DynamicCache

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def padded(rows, width):
    """Left-padded tokens, mask and positions."""
    tokens = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.arange(width) >= width - len(r) for r in rows]).long()
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


@QUICK
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    schedule=schedules(),
    min_length=st.sampled_from([0, 0, 20]),
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=4),
    margin=st.integers(0, 4),
    seed=st.integers(0, 100),
    order=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    data=st.data(),
)
def test_rows_of_a_batch_equal_their_own_runs(family, schedule, min_length, lengths, margin, seed, order, data):
    model = tiny_model(family, {**schedule, "min_length": min_length}, seed).double()
    # DeepSeek V2 rotates in float32 whatever the model's type, and routers score in it.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-4 if family.startswith("deepseek") else 1e-6)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (n,), generator=generator) for n in lengths]
    tokens, mask, positions = padded(rows, max(lengths) + margin)
    chunk = torch.randint(3, 97, (len(rows), data.draw(st.integers(1, 3))), generator=generator)
    order = torch.tensor([i % len(rows) for i in order])
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # or transformers' layers with windows can't be cropped
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1, past_key_values=cache)
        every = model(tokens, attention_mask=mask, position_ids=positions, spts=True).logits
        getattr(cache, data.draw(st.sampled_from(["reorder_cache", "batch_select_indices"])))(order)
        mask, chunk, positions = mask[order], chunk[order], positions[order]
        later = positions[:, -1:] + 1 + torch.arange(chunk.shape[1])
        whole = torch.cat([mask, torch.ones_like(chunk)], 1)
        again = copy.deepcopy(cache)
        steps = model(chunk, attention_mask=whole, position_ids=later, past_key_values=cache).logits
        cache.crop(-chunk.shape[1])
        repeated = model(chunk, attention_mask=whole, position_ids=later, past_key_values=cache).logits
        again.batch_repeat_interleave(2)
        twice = [t.repeat_interleave(2, 0) for t in (chunk, whole, later)]
        doubled = model(twice[0], attention_mask=twice[1], position_ids=twice[2], past_key_values=again).logits
    close(repeated, steps)
    close(doubled[::2], steps)
    close(doubled[1::2], steps)
    with torch.no_grad():
        for number, row in enumerate(rows):
            alone = model(row[None], logits_to_keep=1, use_cache=True)
            close(out.logits[number], alone.logits[0])
            close(every[number, -1:], alone.logits[0])
        for place, number in enumerate(order.tolist()):
            alone = model(rows[number][None], logits_to_keep=1, use_cache=True).past_key_values
            expected = model(chunk[place : place + 1], past_key_values=alone).logits
            close(steps[place], expected[0])
