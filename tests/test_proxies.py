"""The proxies' mathematics against naive computations."""

import torch
from scipy.stats import spearmanr

from spts_compress import fidelity, proxies
from spts_compress.modeling.spts import FeedForwardProxy


def network(hidden=16, wide=40, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        if rank is None:
            return torch.randn(rows, columns, generator=generator) / columns**0.5
        return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / columns

    return proxies.FeedForward(matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide), "silu")


def test_svd_error_is_the_discarded_singular_values():
    matrix = network().gate
    left, right = proxies.truncated_svd(matrix, 5)
    discarded = torch.linalg.svdvals(matrix)[5:]
    torch.testing.assert_close((matrix - left @ right).norm(), discarded.norm())


def test_channel_importance_is_the_mean_of_the_top_saliencies():
    ffn, act = network(), torch.nn.SiLU()
    inputs = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    found = proxies.channel_importance(ffn, act, inputs, 0.2)
    for channel in range(40):
        saliencies = sorted(
            (float(abs(act(x @ ffn.gate[channel]) * (x @ ffn.up[channel]))) for x in inputs), reverse=True
        )
        torch.testing.assert_close(found[channel], torch.tensor(sum(saliencies[:6]) / 6), rtol=1e-4, atol=1e-6)


def test_channels_are_the_most_important_ones_whatever_the_chunking(monkeypatch):
    ffn, act = network(), torch.nn.SiLU()
    inputs = torch.randn(50, 16)
    whole = proxies.channel_importance(ffn, act, inputs, 0.2)
    monkeypatch.setattr(proxies, "CHANNELS_AT_ONCE", 7)
    torch.testing.assert_close(proxies.channel_importance(ffn, act, inputs, 0.2), whole)


def test_a_network_of_low_rank_is_recovered():
    ffn = network(rank=3)
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    proxy = proxies.fit(ffn, inputs, channels=40, rank=3, top=0.2)
    inside = torch.nn.functional.silu(inputs @ ffn.gate.T) * (inputs @ ffn.up.T)
    torch.testing.assert_close(proxy(inputs), inside.norm(dim=-1), rtol=1e-3, atol=1e-5)


def test_fidelity_matches_plain_computations():
    ffn = network()
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
    proxy = FeedForwardProxy(16, 12, 4, "silu")
    for parameter in proxy.parameters():
        torch.nn.init.normal_(parameter)
    unit = fidelity.norms(proxy, ffn, inputs)
    hidden = torch.nn.functional.silu(inputs @ ffn.gate.T) * (inputs @ ffn.up.T)
    true = (hidden @ ffn.down.T).norm(dim=-1)
    torch.testing.assert_close(unit["true"], true)
    found = fidelity.of(unit, 0.25)
    expected = spearmanr(inputs.norm(dim=-1).numpy(), true.numpy()).statistic
    assert abs(found["input_norm"]["spearman"] - expected) < 1e-6
    top = set(true.argsort(descending=True)[:50].tolist())
    hit = top & set(proxy(inputs).argsort(descending=True)[:50].tolist())
    assert found["proxy"]["recall"] == len(hit) / 50
