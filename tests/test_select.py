"""Selections against a plain sort, ties and padding included."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spts_compress.modeling.spts import pool_scores, probe_scores, select

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
    chosen = select(
        scores[..., 0],
        scores[..., 1],
        max(counts),
        None if uniform else torch.tensor(counts)[:, None],
        valid,
    )
    for row, count, pad, got in zip(rows, counts, pads, chosen.tolist(), strict=True):
        order = sorted(range(pad, width), key=lambda i: (*row[i], i), reverse=True)
        assert got == [0] * (max(counts) - count) + sorted(order[:count])


def test_probe_scores_of_one_query_are_the_mean_of_the_heads_attention():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 1, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    raw = probe_scores(query, key, 0.3)
    expected = torch.stack([torch.softmax(0.3 * key[0, h // 2] @ query[0, h, 0], 0) for h in range(4)]).mean(0)
    torch.testing.assert_close(raw[0], expected)
    assert pool_scores(raw, 1) is raw
