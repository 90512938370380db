"""The proxies' mathematics against naive computations."""

import torch
from scipy.stats import spearmanr
from tiny import tiny_config, tiny_model

from spts_compress import fidelity, proxies
from spts_compress.modeling.spts import FeedForwardProxy


def network(hidden=16, wide=40, rank=None, seed=0):
    """A random feed-forward network behind a norm with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        if rank is None:
            return torch.randn(rows, columns, generator=generator) / columns**0.5
        return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / columns

    gate, up, down = matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide)
    norm = torch.rand(hidden, generator=generator) + 0.5
    return proxies.FeedForward(gate * norm, up * norm, down, norm, 1e-6, "silu")


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
    ffn = proxies.FeedForward.of(layer, tiny_config("llama"))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        expected = layer.mlp(layer.post_attention_layernorm(x))
    unit = ffn.unit(x)
    torch.testing.assert_close((torch.nn.functional.silu(unit @ ffn.gate.T) * (unit @ ffn.up.T)) @ ffn.down.T, expected)


def test_svd_error_is_the_discarded_singular_values():
    matrix = network().gate
    left, right = proxies.truncated_svd(matrix, 5)
    discarded = torch.linalg.svdvals(matrix)[5:]
    torch.testing.assert_close((matrix - left @ right).norm(), discarded.norm())


def test_channel_importance_is_the_mean_of_the_top_saliencies():
    ffn, act, unit = network(), torch.nn.SiLU(), states(30, 1)
    found = proxies.channel_importance(ffn, act, unit, 0.2)
    for channel in range(40):
        saliencies = [float(abs(act(x @ ffn.gate[channel]) * (x @ ffn.up[channel]))) for x in unit]
        expected = sum(sorted(saliencies, reverse=True)[:6]) / 6
        torch.testing.assert_close(found[channel], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_channels_are_the_most_important_ones_whatever_the_chunking(monkeypatch):
    ffn, act, unit = network(), torch.nn.SiLU(), states(50, 2)
    whole = proxies.channel_importance(ffn, act, unit, 0.2)
    monkeypatch.setattr(proxies, "CHANNELS_AT_ONCE", 7)
    torch.testing.assert_close(proxies.channel_importance(ffn, act, unit, 0.2), whole)


def test_a_network_of_low_rank_is_recovered():
    ffn, x = network(rank=3), states(64, 2)
    proxy = proxies.fit(ffn, x, channels=40, rank=3, top=0.2)
    torch.testing.assert_close(proxy(x), inside(ffn, x).norm(dim=-1), rtol=1e-3, atol=1e-5)


def test_fidelity_matches_plain_computations():
    ffn, x = network(), states(200, 3)
    proxy = FeedForwardProxy(16, 12, 4, "silu", 1e-6)
    for parameter in proxy.parameters():
        torch.nn.init.normal_(parameter)
    unit = fidelity.norms(proxy, ffn, x)
    true = (inside(ffn, x) @ ffn.down.T).norm(dim=-1)
    torch.testing.assert_close(unit["true"], true)
    found = fidelity.of(unit, 0.25)
    inputs = (x / torch.sqrt((x * x).mean(-1, keepdim=True)) * ffn.norm).norm(dim=-1)
    assert abs(found["input_norm"]["spearman"] - spearmanr(inputs.numpy(), true.numpy()).statistic) < 1e-4
    top = set(true.argsort(descending=True)[:50].tolist())
    hit = top & set(proxy(x).argsort(descending=True)[:50].tolist())
    assert found["proxy"]["recall"] == len(hit) / 50
