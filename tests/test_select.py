"""Selections against a plain sort, ties and padding included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spts_compress.modeling.selection import pool_scores, probe_scores, ranked, reduce_heads, select
from spts_compress.modeling.windows import WINDOW_PIECE, windowed

levels = st.sampled_from([0.0, 1e-30, 0.25, 0.5, 0.5000001, 1.0, float("inf")])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_select_is_a_stable_sort_by_score_then_tie_then_later_place(data):
    width = data.draw(st.integers(1, 12))
    rows, counts, pads = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        rows.append(data.draw(st.lists(st.tuples(levels, levels), min_size=width, max_size=width)))
        pads.append(data.draw(st.integers(0, width - 1)))
        counts.append(data.draw(st.integers(1, width - pads[-1])))
    scores = torch.tensor(rows)
    uniform = len(set(counts)) == 1
    valid = None if not any(pads) else torch.arange(width) >= torch.tensor(pads)[:, None]
    order = ranked(scores[..., 0], scores[..., 1], valid=valid)
    chosen = select(order, max(counts), None if uniform else torch.tensor(counts)[:, None])
    for row, count, pad, got in zip(rows, counts, pads, chosen.tolist(), strict=True):
        order = sorted(range(pad, width), key=lambda i: (*row[i], i), reverse=True)
        assert got == [0] * (max(counts) - count) + sorted(order[:count])


def test_probe_scores_of_one_query_are_the_mean_of_the_heads_attention():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 1, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    raw = reduce_heads(probe_scores(query, key, 0.3), "mean")
    expected = torch.stack([torch.softmax(0.3 * key[0, h // 2] @ query[0, h, 0], 0) for h in range(4)]).mean(0)
    torch.testing.assert_close(raw[0], expected)
    assert pool_scores(raw, 1) is raw


@pytest.mark.parametrize("window", [3, WINDOW_PIECE + 50, 3 * WINDOW_PIECE])
def test_attention_in_pieces_is_that_of_all_pairs_inside_the_window(window):
    generator, count = torch.Generator().manual_seed(1), 2 * WINDOW_PIECE + 37
    query, key, value = torch.randn(3, 2, 4, count, 8, dtype=torch.float64, generator=generator)
    places = torch.rand(2, 4 * count, generator=generator).argsort(1)[:, :count].sort(1).values
    places[1, :20] = places[1, 20]  # as padding has it
    valid = torch.ones(2, count, dtype=torch.bool)
    valid[1, :20] = False
    calls = []

    def attend(query, key, value, mask):
        calls.append(key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2), None

    made = windowed(attend, query, key, value, places, window, valid)
    distance = places[:, :, None] - places[:, None]
    logits = query @ key.transpose(2, 3) / 8**0.5
    hidden = (distance < 0) | (distance >= window) | ~valid[:, None]
    expected = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ value
    real = valid[:, :, None, None].expand_as(made)
    torch.testing.assert_close(made[real], expected.transpose(1, 2)[real])
    assert max(calls) <= window + max(WINDOW_PIECE, window // 2)
