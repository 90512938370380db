"""Updates of skipped tokens and the share of keys and values kept, beside what the reference says of them."""

import copy
import shutil

import pytest
import torch
from tiny import BARE, FAMILIES, SCHEDULE, UPDATES, UPDATING, stock_twin, tiny_model
from transformers import AutoModelForCausalLM

from spts_compress.cost import layer_costs, predicted
from spts_compress.export.verify import verify, write_manifest
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.modeling.update import LowRankUpdate
from spts_compress.plan import schedule_table


def prompt(length=40):
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(1))


def logits(model, **options):
    with torch.no_grad():
        return model(prompt(), logits_to_keep=1, **options).logits


def test_an_update_is_a_low_rank_affine_map():
    states = torch.randn(2, 7, 16)
    for rank, shapes in ((0, {"bias": (16,)}), (3, {"bias": (16,), "down": (3, 16), "up": (16, 3)})):
        update = LowRankUpdate(16, rank)
        assert {name: tuple(value.shape) for name, value in update.named_parameters()} == shapes
        for value in update.parameters():
            torch.nn.init.normal_(value)
        expected = update.bias.expand(2, 7, 16)
        if rank:
            expected = expected + torch.einsum("dr,re,bte->btd", update.up, update.down, states)
        torch.testing.assert_close(update(states).expand_as(states), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_without_updates_nothing_changes(family):
    model, plain = tiny_model(family, UPDATING), tiny_model(family)
    own = plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    assert torch.equal(logits(model, spts={"update": None, "kv": None}), logits(plain))
    assert torch.equal(logits(model, spts={"update": UPDATES}), logits(model))  # what it has anyway
    assert not torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model, spts=False), logits(stock_twin(model)))
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        for layer in zeros.model.layers[1:]:
            for value in [*layer.attention_update.parameters(), *layer.ffn_update.parameters()]:
                value.zero_()
    torch.testing.assert_close(logits(zeros), logits(plain))


def test_the_share_kept_is_what_the_cache_holds_and_what_is_counted():
    model = tiny_model("llama", UPDATING)
    active, whole = [12, 12, 8, 8], [40, 40, 16, 16]
    for kv, kept in ((None, active), (0.25, [12, 12, 10, 10]), (0.5, [20, 20, 16, 16]), (1.0, whole)):
        with torch.no_grad():
            cache = model(prompt(), logits_to_keep=1, spts={"kv": kv, "positions": True}).past_key_values
        seen = model.skipped(cache)
        assert [row["cached"] for row in seen] == [40, *kept]
        assert [row["active"] for row in seen] == [40, *active]
        assert [row["positions"].shape[1] for row in seen[1:]] == kept
        schedule = model.config.schedule(kv=kv)
        assert [cost.cached for cost in layer_costs(model.config, schedule, 40)] == [40, *kept]
        assert predicted(model.config, schedule, 40)["kv_share"] == (40 + sum(kept)) / 200
    assert "KV 24" in schedule_table(model.config, model.config.schedule(), [40])


def test_updates_cost_what_their_ranks_say():
    model = tiny_model("llama", UPDATING)
    costs = layer_costs(model.config, model.config.schedule(), 40)
    expected = [4 * 32 * (4 + 0) * 40, 4 * 32 * (2 + 3) * 40, 4 * 32 * (4 + 0) * 16, 4 * 32 * (2 + 3) * 16]
    assert [cost.update for cost in costs] == [0, *expected]
    fewer = layer_costs(model.config, model.config.schedule(update=None), 40)
    assert all(a.total - a.update == b.total for a, b in zip(costs, fewer, strict=True))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"update": {"attention_rank": -1, "ffn_rank": 0}}, "update.attention_rank is -1"),
        ({"update": {"attention_rank": 2}}, "update.ffn_rank is missing"),
        ({"update": {"rank": 2}}, "update.rank is unknown"),
        ({"update": [UPDATES[0]] * 3}, "3 entries for 4 skipping layers"),
        ({"kv": 0}, "kv is 0"),
        ({"kv": 1.5}, "kv is 1.5"),
        ({"kv": "all"}, "right type"),
        ({"proxy": None}, "there is no proxy"),
    ],
)
def test_what_can_not_be_is_named(changes, fault):
    with pytest.raises(ValueError, match=fault):
        Schedule.from_dict({**SCHEDULE, **changes}, 5)


@pytest.mark.parametrize("block", [UPDATING, BARE], ids=["updating", "bare"])
def test_blocks_survive_a_round_trip(block):
    schedule = Schedule.from_dict(block, 5)
    written = schedule.to_dict()
    assert Schedule.from_dict(written, 5) == schedule and written["update"] == block["update"]
    assert written.get("proxy") == block["proxy"]
    assert not {"update", "kv"} & Schedule.from_dict(SCHEDULE, 5).to_dict().keys()


def test_what_a_model_was_not_built_for_is_an_error():
    model = tiny_model("llama", BARE)
    for layer in model.model.layers[1:]:
        assert not hasattr(layer, "proxy")
    with pytest.raises(ValueError, match="there is no proxy"):
        logits(model, spts={"ffn_selection": "proxy"})
    plain = tiny_model()
    plain.config.spts = UPDATING
    with pytest.raises(ValueError, match="load it again"):
        logits(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_have_initial_values_and_a_gradient(family):
    model = tiny_model(family, UPDATING)
    updates = {name: value for name, value in model.named_parameters() if "_update." in name}
    assert len(updates) == 2 * (3 + 1) + 2 * (3 + 3)
    assert all(torch.isfinite(value).all() and value.std() > 0.05 for value in updates.values())
    model(prompt(), logits_to_keep=1).logits.sum().backward()
    assert all(updates[name].grad is not None for name in updates if ".4." not in name)


def test_a_checkpoint_with_updates_is_verified_loaded_and_saved_again(updating, tmp_path):
    out = shutil.copytree(updating, tmp_path / "out")
    write_manifest(out, {})
    (out / "README.md").write_text("# A card\n")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert [hasattr(layer, "ffn_update") for layer in model.model.layers] == [False, False, True, True, True]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(model, spts=False))
    assert [fault for fault in verify(out) if "base" not in fault] == []
