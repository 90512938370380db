"""The proxies' mathematics against naive computations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny import tiny_base, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from spts_compress.calibrate import capture
from spts_compress.fit import ltp, metrics, refine, size
from spts_compress.modeling import skipping
from spts_compress.modeling.configuration_spts import Proxy
from spts_compress.modeling.selection import FeedForwardProxy
from spts_compress.recipe import ProxySection
from spts_compress.utils.distributed import SINGLE_PROCESS
from spts_compress.utils.store import Store


def network(hidden=16, wide=40, rank=None, seed=0):
    """A random feed-forward network behind a norm with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        if rank is None:
            return torch.randn(rows, columns, generator=generator) / columns**0.5
        return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / columns

    gate, up, down = matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide)
    norm = torch.rand(hidden, generator=generator) + 0.5
    return ltp.FeedForward(gate * norm, up * norm, down, norm, 1e-6, "silu")


def states(count, seed):
    """Residual states whose size differs from token to token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, generator=generator) * (1 + 9 * torch.rand(count, 1, generator=generator))


def inside(ffn, x):
    """What the network computes in its wide layer, from the definition."""
    unit = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return torch.nn.functional.silu(unit @ ffn.gate.T) * (unit @ ffn.up.T)


def test_a_layers_network_is_read_with_its_norm():
    layer = tiny_model().model.layers[2]
    ffn = ltp.FeedForward.of(layer, tiny_config("llama"))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        expected = layer.mlp(layer.post_attention_layernorm(x))
    unit = ffn.unit(x)
    torch.testing.assert_close((torch.nn.functional.silu(unit @ ffn.gate.T) * (unit @ ffn.up.T)) @ ffn.down.T, expected)


def test_svd_error_is_the_discarded_singular_values():
    matrix = network().gate
    left, right = ltp.truncated_svd(matrix, 5)
    discarded = torch.linalg.svdvals(matrix)[5:]
    torch.testing.assert_close((matrix - left @ right).norm(), discarded.norm())


def test_channel_importance_is_the_mean_of_the_top_saliencies():
    ffn, act, unit = network(), torch.nn.SiLU(), states(30, 1)
    found = ltp.channel_importance(ffn, act, unit, 0.2)
    for channel in range(40):
        saliencies = [float(abs(act(x @ ffn.gate[channel]) * (x @ ffn.up[channel]))) for x in unit]
        expected = sum(sorted(saliencies, reverse=True)[:6]) / 6
        torch.testing.assert_close(found[channel], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_channels_are_the_most_important_ones_whatever_the_chunking(monkeypatch):
    ffn, act, unit = network(), torch.nn.SiLU(), states(50, 2)
    whole = ltp.channel_importance(ffn, act, unit, 0.2)
    monkeypatch.setattr(ltp, "CHANNELS_AT_ONCE", 7)
    torch.testing.assert_close(ltp.channel_importance(ffn, act, unit, 0.2), whole)


def tokens_of(ffn, x):
    return ltp.Tokens.of(ffn, x, (inside(ffn, x) @ ffn.down.T).norm(dim=-1))


def mean_error(made, true):
    return float((made.detach().log() - true.log()).square().mean())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6))
def test_activation_weighting_is_optimal_for_its_norm(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(9, 7, generator=generator)
    inputs = torch.randn(60, 7, generator=generator) @ torch.randn(7, 7, generator=generator)

    def error(left, right):
        return float((inputs @ (matrix - left @ right).T).square().sum())

    left, right = ltp.truncated_svd(matrix, rank, inputs)
    best = error(left, right)
    discarded = torch.linalg.svdvals(inputs @ matrix.T)[rank:]
    assert abs(best - float(discarded.square().sum())) < 1e-3 * (1 + best)
    assert best <= error(*ltp.truncated_svd(matrix, rank)) * (1 + 1e-4) + 1e-4
    for _ in range(20):
        nudge = [part + 0.1 * torch.randn(part.shape, generator=generator) for part in (left, right)]
        assert best <= error(*nudge) * (1 + 1e-4) + 1e-4


def test_a_network_of_low_rank_is_recovered():
    ffn, x = network(rank=3), states(64, 2)
    proxy = ltp.low_rank(ffn, torch.arange(40), 3)
    torch.testing.assert_close(proxy(x), inside(ffn, x).norm(dim=-1), rtol=1e-3, atol=1e-5)


def test_the_regression_is_ridge_regression():
    ffn, x = network(), states(300, 5)
    tokens = tokens_of(ffn, x)
    linear, square, constant = next(ltp.ridge(tokens.unit, tokens.log_norm, [0.01]))
    unit = (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)).double().numpy()
    features = np.concatenate([unit, unit**2], axis=1)
    centred = features - features.mean(0)
    target = (inside(ffn, x) @ ffn.down.T).norm(dim=-1).log().double().numpy()
    rows = np.diag(np.sqrt(0.01 * (centred**2).sum(0)))  # ridge as more rows of a plain least squares problem
    weights = np.linalg.lstsq(
        np.concatenate([centred, rows]), np.concatenate([target - target.mean(), np.zeros(32)]), rcond=None
    )[0]
    np.testing.assert_allclose(torch.cat([linear, square]).numpy(), weights, atol=2e-3)
    assert abs(float(constant) - (target.mean() - features.mean(0) @ weights)) < 2e-2


@pytest.mark.parametrize("count", [2, 20])
def test_the_regression_copes_with_few_tokens_and_equal_features(count):
    x = states(count, 4)
    x[:, 3], x[:, 5] = 0, x[:, 4]
    unit = network().unit(x)
    made = next(ltp.ridge(unit, torch.randn(count, generator=torch.Generator().manual_seed(1)), [1e-4]))
    assert all(torch.isfinite(part).all() for part in made)


def test_the_exported_regression_predicts_what_was_solved():
    ffn, x = network(), states(300, 5)
    tokens, check = tokens_of(ffn, x[:200]), tokens_of(ffn, x[200:])
    proxy = ltp.fit_ridge(ffn, tokens, check)
    a, b, c = proxy.down[-1], proxy.square, proxy.constants[0]
    unit = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(proxy(x).log(), unit @ a + unit.square() @ b + c, rtol=1e-3, atol=1e-4)
    rms = torch.sqrt((x * x).mean(-1) + 1e-6)
    torch.testing.assert_close(proxy(x, relative=True), proxy(x) / rms)


def test_a_blend_is_the_geometric_mean():
    ffn, x = network(), states(200, 6)
    tokens = tokens_of(ffn, x)
    low = ltp.low_rank(ffn, torch.arange(20), 5)
    ridge = ltp.fit_ridge(ffn, tokens, tokens)
    expected = (low(x) * ridge(x)).sqrt()
    ltp.geometric_mean(low, ridge)
    torch.testing.assert_close(low(x), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["log-norm", "ranking", "representation"])
def test_refinement_helps_and_is_reproducible(objective):
    ffn = network()
    tokens, check = tokens_of(ffn, states(600, 7)), tokens_of(ffn, states(200, 8))
    section = ProxySection(steps=60, objective=objective, regression=False)
    made = [size.fit(ffn, Proxy(20, 6), tokens, check, section, None, 0.25) for _ in range(2)]
    assert made[0][1]
    torch.testing.assert_close(made[0][0](check.unit), made[1][0](check.unit), rtol=0, atol=0)
    plain = section.model_copy(update={"steps": 0})
    begun, _ = size.fit(ffn, Proxy(20, 6), tokens, check, plain, None, 0.25)
    true = check.log_norm.exp()
    if objective != "representation":
        assert mean_error(made[0][0](check.unit), true) < mean_error(begun(check.unit), true)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.sampled_from([1e-3, 0.1, 30.0]))
def test_refinement_never_ends_worse_than_it_began_on_unseen_tokens(seed, rate):
    ffn = network(seed=seed)
    tokens, check = tokens_of(ffn, states(100, seed)), tokens_of(ffn, states(80, seed + 1))
    proxy = ltp.low_rank(ffn, torch.arange(15), 4)
    before = mean_error(proxy(check.unit), check.log_norm.exp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "RATE", rate)
        improved = refine.refine(proxy, refine.log_norm_loss, tokens, check, 16, seed)
    after = mean_error(proxy(check.unit), check.log_norm.exp())
    assert after < before if improved else after == before


def test_the_cheapest_proxy_that_is_good_enough_is_chosen():
    ffn = network()
    x, y = states(800, 9), states(400, 10)
    section = ProxySection(steps=40, tolerance=0.02)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 0.1

    def easy(x):  # norms that a regression predicts exactly
        return ltp.Tokens.of(ffn, x, (ffn.unit(x) @ weight).exp())

    proxy, tried = size.choose(ffn, Proxy(40, 16), easy(x), easy(y), section, 0.25, False)
    assert tried["chosen"] == 0 and proxy.rank == 0 and tried["candidates"][0]["recall"] > 0.97
    proxy, tried = size.choose(ffn, Proxy(40, 16), tokens_of(ffn, x), tokens_of(ffn, y), section, 0.25, False)
    recalls = [row["recall"] for row in tried["candidates"]]
    assert recalls[tried["chosen"]] >= max(recalls) - 0.02
    assert all(recall < max(recalls) - 0.02 for recall in recalls[: tried["chosen"]])
    assert [row["cost"] for row in tried["candidates"]] == sorted(row["cost"] for row in tried["candidates"])
    assert proxy.rank == tried["candidates"][tried["chosen"]]["rank"]


def test_fidelity_matches_plain_computations():
    ffn, x = network(), states(200, 3)
    proxy = FeedForwardProxy(16, 12, 4, "silu", 1e-6)
    for parameter in proxy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    unit = metrics.norms(proxy, ffn, tokens_of(ffn, x))
    true = (inside(ffn, x) @ ffn.down.T).norm(dim=-1)
    torch.testing.assert_close(unit["true"], true)
    rms = torch.sqrt((x * x).mean(-1))
    inputs = (x / rms[:, None] * ffn.norm).norm(dim=-1)
    for relative, scale in ((False, torch.ones_like(rms)), (True, rms)):
        found = metrics.fidelity(unit, 0.25, relative)
        expected = spearmanr((inputs / scale).numpy(), (true / scale).numpy()).statistic
        assert abs(found["input_norm"]["spearman"] - expected) < 1e-3
        top = set((true / scale).argsort(descending=True)[:50].tolist())
        hit = top & set((proxy(x).detach() / scale).argsort(descending=True)[:50].tolist())
        assert found["proxy"]["recall"] == len(hit) / 50


@pytest.mark.parametrize("piece", [512, 16])  # tokens that a proxy is called with on a CPU
def test_fidelity_on_skipped_states_matches_the_layers_own_computation(piece, monkeypatch):
    model = tiny_model(seed=3)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    layer, held = model.model.layers[1], []
    handle = layer.proxy.register_forward_hook(lambda _, args, out: held.append((args[0].clone(), out)))
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        handle.remove()
        [(x, predicted)] = held
        true = layer.mlp(layer.post_attention_layernorm(x))[0].norm(dim=-1)
    monkeypatch.setattr(skipping, "NORM_PIECE", piece)
    found = metrics.on_skipped_states(model, {"input_ids": ids}, relative=False)
    assert sorted(found) == [1, 2, 3, 4]
    expected = spearmanr(predicted[0].numpy(), true.numpy()).statistic
    assert abs(found[1]["spearman"] - expected) < 1e-6
    assert not model.model.layers[1].proxy._forward_hooks


def test_captured_norms_are_those_of_the_whole_model(tmp_path):
    base = tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    sequences = [torch.arange(3, 40), torch.arange(5, 30)]
    found = list(capture.feed_forward(model, sequences, [1, 3], Store(tmp_path / "work"), "key", SINGLE_PROCESS))
    assert [layer for layer, _, _ in found] == [1, 3]
    for number, states_, norms in found:
        outputs = []
        handle = model.model.layers[number].mlp.register_forward_hook(lambda *a, to=outputs: to.append(a[2][0]))
        with torch.no_grad():
            for sequence in sequences:
                model(sequence[None])
        handle.remove()
        torch.testing.assert_close(norms, torch.cat(outputs).norm(dim=-1), rtol=1e-4, atol=1e-5)
        assert states_.shape == (62, 32)
