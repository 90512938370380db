"""The benchmark: what it times is what it says, and its own arithmetic holds. No test depends on how fast it is."""

import json
import time

import pytest
import torch
from click.testing import CliRunner
from tiny import SCHEDULE, stock_twin, tiny_model

from spts_compress.cli import main
from spts_compress.evaluate import benchmark, columns
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.timing import breakdown, latency_table, pairs
from spts_compress.timing.break_even import shortest_paying_length


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_twin_is_the_stock_model_on_the_same_tensors(family):
    model = tiny_model(family)
    twin, ids = pairs.stock_twin(model), torch.arange(3, 60)[None]
    assert type(twin).__module__.startswith("transformers.models.")
    assert twin.model.layers[2].mlp.up_proj.weight is not None
    there = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in twin.state_dict().values()} <= there
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, stock_twin(model)(ids).logits)


def test_rounds_alternate():
    calls = []

    def run(name):
        return lambda: calls.append(name) or {1: float(len(calls)), 8: 3.0 * len(calls)}

    times = pairs.in_turn({"dense": run("dense"), "spts": run("spts")}, 2, lambda: None)
    assert calls == ["dense", "spts", "dense", "spts"]
    assert times == {"dense": {1: [1.0, 3.0], 8: [3.0, 9.0]}, "spts": {1: [2.0, 4.0], 8: [6.0, 12.0]}}
    assert pairs.ratio(times, "spts", 1) == {"median": (1 / 2 + 3 / 4) / 2, "range": [1 / 2, 3 / 4]}
    assert pairs.ratio(times, "spts", 8, since=1)["range"] == [2 / 4, 6 / 8]


def test_one_generation_tells_the_time_of_each_number_of_tokens():
    model, ids, passes = tiny_model(), torch.arange(3, 63)[None], []
    model.generation_config.eos_token_id = list(range(1, model.config.vocab_size))  # which must not end it early
    handle = model.register_forward_hook(lambda *_: passes.append(time.perf_counter()))
    try:
        begin = time.perf_counter()
        found = pairs.seconds(model, ids, (1, 5))
    finally:
        handle.remove()
    assert len(passes) == 5
    assert found[1] <= passes[1] - begin and passes[3] - begin <= found[5]


@pytest.mark.parametrize(
    ("overhead", "context", "expected"), [(0.0, 2048, 64), (300.0, 2048, 1024), (300.0, 512, None)]
)
def test_the_break_even_is_the_first_length_that_pays(monkeypatch, overhead, context, expected):
    long = {**SCHEDULE, "min_length": 10_000}  # the recipe's own, which must not keep SPTS from being timed
    model, skipped = tiny_model(schedule=long, max_position_embeddings=context), []

    def seconds(model, ids, new_tokens, spts=None):
        assert new_tokens == (1,)
        skipped.append(spts)
        return {1: overhead + 0.5 * ids.shape[1] if spts else ids.shape[1]}

    monkeypatch.setattr("spts_compress.timing.pairs.seconds", seconds)
    assert shortest_paying_length(pairs.stock_twin(model), model, pairs=3) == expected
    assert {"min_length": 0} in skipped and skipped[0] is None


def test_a_length_that_pays_by_noise_alone_is_no_break_even(monkeypatch):
    model = tiny_model(schedule=SCHEDULE, max_position_embeddings=2048)

    def seconds(model, ids, new_tokens, spts=None):
        return {1: 1.0 if spts is None or ids.shape[1] in (128, 512, 1024) else 2.0} if spts else {1: 1.5}

    monkeypatch.setattr("spts_compress.timing.pairs.seconds", seconds)
    assert shortest_paying_length(pairs.stock_twin(model), model, pairs=3) == 512
    once = iter([1.0])  # at the longest one, and not when it is asked again

    def seconds(model, ids, new_tokens, spts=None):
        return {1: 1.5 if not spts else next(once, 2.0) if ids.shape[1] == 1024 else 2.0}

    monkeypatch.setattr("spts_compress.timing.pairs.seconds", seconds)
    assert shortest_paying_length(pairs.stock_twin(model), model, pairs=1) is None


def test_the_break_even_is_never_a_length_at_which_nothing_is_skipped(monkeypatch):
    model = tiny_model(schedule={**SCHEDULE, "stages": [{"end": 4, "budget": 200}]}, max_position_embeddings=2048)
    monkeypatch.setattr("spts_compress.timing.pairs.seconds", lambda *_, spts=None: {1: 1.0 if spts else 2.0})
    assert shortest_paying_length(pairs.stock_twin(model), model, pairs=1) == 256


def test_peak_memory_sees_what_was_freed_again():
    with pairs.peak_memory(torch.device("cpu")) as peak:
        torch.ones(60_000_000).sum()  # 240 MB
    assert 200e6 < peak() < 400e6


def test_no_way_is_charged_for_reading_weights_that_are_mapped_from_a_file(tmp_path):
    model = tiny_model(vocab_size=400_000)
    weight = model.lm_head.weight.data  # 51 MB
    weight.numpy().tofile(tmp_path / "weight")
    mapped = torch.from_file(str(tmp_path / "weight"), shared=True, size=weight.numel())
    model.lm_head.weight.data = mapped.view_as(weight)
    ways = {"dense": (model, {"spts": False}), "spts": (model, {})}
    row = pairs.compare(ways, torch.arange(3, 63)[None], 1)
    assert max(row[name]["peak_bytes"] for name in ways) < 25e6


def test_the_parts_make_up_the_prefill_and_everything_is_put_back():
    model = tiny_model()
    ids = torch.arange(3, 63)[None]
    found = breakdown.parts(model, ids)
    assert {"dense layers", "selecting", "attention", "feed-forward", "probing", "gathers"} <= set(found)
    assert all(value >= 0 for value in found.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_break_even_lies_between_the_lengths_that_lose_and_win():
    def crossing(*ratios, skips=True):
        rows = [
            {"batch": 1, "tokens": n, "spts": {"speedup": [{"median": r}]}, "skips": skips or n > 1000}
            for n, r in ratios
        ]
        return benchmark.crossing(rows)

    assert crossing((4000, 1.5), (1000, 0.8), (2000, 1.2)) == 1500
    assert crossing((4000, 1.5)) is None
    assert crossing((1000, 0.8), (2000, 1.2), (4000, 0.9)) is None  # it pays no more
    assert crossing((1000, 0.8), (2000, 1.2), (4000, 0.8), (8000, 1.2)) == 6000
    assert crossing((1000, 0.8), (2000, 1.2), (4000, 1.5), skips=False) is None  # noise where nothing is skipped


def test_growth_finds_the_linear_and_the_quadratic_term():
    rows = [
        {"dense": {"seconds": [n / 1e3 + 3 * (n / 1e3) ** 2]}, "spts": {"seconds": [n / 2e3]}, "tokens": n}
        for n in (1000, 2000, 4000)
    ]
    rows = [{**row, "batch": 1, "skips": True} for row in rows]
    others = [{**rows[0], **change, "spts": {"seconds": [1e-3]}} for change in ({"batch": 4}, {"skips": False})]
    found = benchmark.growth([*rows, *others])
    assert found["dense"] == pytest.approx([1, 3]) and found["spts"] == pytest.approx([0.5, 0], abs=1e-9)
    assert benchmark.growth(rows[:2]) is None


def test_a_benchmark_of_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    options = ["--lengths", "150,400", "--batch", "1,2", "--new-tokens", "3", "--pairs", "2", "--dtype", "float32"]
    shown = CliRunner().invoke(main, ["bench", str(checkpoint), *options, "--output", str(tmp_path)])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["batch"], row["tokens"]) for row in result["rows"]] == [(1, 150), (1, 400), (2, 150), (2, 400)]
    row = result["rows"][1]
    assert row["spts"]["kv_bytes"] / row["dense"]["kv_bytes"] == pytest.approx(row["flops"]["kv_share"])
    speedup = row["spts"]["speedup"][0]
    assert row["calibrated"] > 0 and speedup["range"][0] <= speedup["median"] <= speedup["range"][1]
    assert (tmp_path / "bench.md").read_text().startswith("`spts-compress bench out") and (
        tmp_path / "bench.png"
    ).exists()

    two = result["rows"][3]
    assert f"| {2 / two['dense']['decode']['seconds']:.1f} / " in columns.bench_tables({**result, "rows": [two]})
    shown = columns.bench_tables({**result, "rows": [{**row, "skips": False}]})
    assert "| 400 (not skipped) |" in shown and "say nothing of skipping" in shown

    whole, compare = [(tmp_path / name).read_bytes() for name in benchmark.FILES], benchmark.compare

    def stopped_after(rows):
        calls = []

        def measured(*arguments):
            if len(calls) == rows:
                raise KeyboardInterrupt
            calls.append(arguments)
            return compare(*arguments)

        monkeypatch.setattr(benchmark, "compare", measured)
        few = ["--lengths", "150,160", "--new-tokens", "2", "--pairs", "1", "--output", str(tmp_path)]
        stop = CliRunner().invoke(main, ["bench", str(checkpoint), *few])
        assert stop.exit_code == 130 and "starts anew" in stop.output and "goes on" not in stop.output

    stopped_after(0)
    assert [(tmp_path / name).read_bytes() for name in benchmark.FILES] == whole
    stopped_after(1)
    assert [(tmp_path / name).exists() for name in benchmark.FILES] == [True, False, False]  # one run's alone
    assert [(tmp_path / name.replace("bench", "bench-1")).read_bytes() for name in benchmark.FILES] == whole
    stopped_after(1)
    assert (tmp_path / "bench-2.json").exists() and (tmp_path / "bench-1.json").read_bytes() == whole[0]
    monkeypatch.setattr(benchmark.data, "python_docs", lambda: ["a short text "])
    monkeypatch.setattr(benchmark, "compare", compare)
    short = benchmark.run(checkpoint, [150], [2], 2, 1, "cpu", "float32", tmp_path, "")["rows"]
    assert [(row["batch"], row["tokens"]) for row in short] == [(2, 150)]
    long = CliRunner().invoke(main, ["bench", str(checkpoint), "--lengths", "99999", "--output", str(tmp_path)])
    assert long.exit_code == 2 and "more than the context of 2048" in long.output


def test_prices_are_read_between_the_measured_numbers_and_make_a_ratio():
    config = tiny_model().config
    linear = [float(n) for n in (10, 100, 1000)]
    made = latency_table.LatencyTable(
        [10, 100, 1000], {"full_attention": [n * n for n in linear], "feed_forward": linear, "keys": linear}
    )
    assert made.of("full_attention", 50) == pytest.approx(2500) and made.of("keys", 5) == 5 and made.of("keys", 0) == 0
    block = {"start": 4, "stages": [{"end": 4, "budget": 100}], "proxy": {"channels": 1, "rank": 0}}
    schedule = Schedule.from_dict({**block, "ffn_selection": "all"}, 5)
    probing = 2.0 * 1000 * 4 * 8 / (6 * 1000 * 32 * 48) * 1000  # one query, 4 heads of 8, at the pace of the network
    last = 100**2 + 900 + 1000 + probing
    assert made.speedup(config, schedule, 1000) == pytest.approx(5 * (1e6 + 1e3) / (4 * (1e6 + 1e3) + last))
    assert latency_table.grid(1000)[0] == 64 and latency_table.grid(1000)[-1] == 1000 and latency_table.grid(40) == [40]
