"""Random inputs that several test files draw."""

import itertools

from hypothesis import strategies as st


def scoring_heads(start, layers=5, heads=4):
    """Which heads score, some in the first skipping layer and any in later ones."""
    own = st.lists(st.integers(0, heads - 1), min_size=1, unique=True)
    rest = {str(layer): own for layer in range(start + 1, layers)}
    return st.fixed_dictionaries({str(start): own}, optional=rest)


@st.composite
def schedules(draw, layers: int = 5):
    start = draw(st.integers(1, layers - 1))
    ends = sorted(draw(st.sets(st.integers(start, layers - 1), min_size=1, max_size=3)))
    budgets = sorted((draw(st.integers(1, 30)) for _ in ends), reverse=True)
    stages = [{"end": e, "budget": b} for e, b in zip(ends, budgets, strict=True)]
    for stage, following in itertools.pairwise(stages):
        if draw(st.booleans()):
            stage["prune_to"] = following["budget"] + draw(st.integers(0, 10))
    if draw(st.booleans()):
        fraction = draw(st.sampled_from([0.5, 0.25]))
        stages[-1]["budget"] = {"fraction": fraction, "floor": 3, "cap": 20}
        for stage, following in itertools.pairwise(stages):
            if "prune_to" in stage:
                least = 22 if following is stages[-1] else following["budget"]
                stage["prune_to"] = {"fraction": fraction, "floor": least}
    if draw(st.booleans()):  # of the feed-forward network alone; at most what pruning leaves
        stages[-1]["ffn_budget"] = {"fraction": 0.2, "floor": 2, "cap": 8}
        if len(stages) > 1 and "prune_to" in stages[-2]:
            stages[-1]["ffn_budget"] = stages[-1]["budget"]
        stages[0]["ffn_budget"] = draw(st.integers(1, 40))
    sizes = [{"channels": 12, "rank": 4}, {"channels": 1, "rank": 0}]
    ranks = [{"attention_rank": 4, "ffn_rank": 0}, {"attention_rank": 0, "ffn_rank": 3}]
    ffn_selection = draw(st.sampled_from(["proxy", "proxy", "relative", "relative", "attention", "all"]))
    proxy = st.sampled_from([sizes[0], [sizes[i % 2] for i in range(5 - start)]])
    update = st.sampled_from([ranks[0], [ranks[i % 2] for i in range(5 - start)]])
    return dict(
        start=start,
        stages=stages,
        proxy=draw(proxy if ffn_selection in ("proxy", "relative") else st.none() | proxy),
        probe={
            "window_size": draw(st.sampled_from([1, 1, 2, 5])),
            "heads": draw(st.sampled_from(["mean", "max"]) | scoring_heads(start)),
            "score_carry": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
            "kernel_size": draw(st.sampled_from([1, 1, 3, 7])),
            "rank": draw(st.sampled_from([0, 0, 3])),
        },
        sink_tokens=draw(st.integers(0, 3)),
        recent_tokens=draw(st.integers(1, 4)),
        ffn_selection=ffn_selection,
        update=draw(st.none() | update),
        kv=draw(st.sampled_from([None, 0.2, 0.6, 1.0])),
    )
