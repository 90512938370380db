"""Every family through the whole tool, and what makes it different; exactness is in test_exactness.py."""

import copy
import json
import re

import helpers
import pytest
import torch
from helpers import run, write_corpus
from reference import Reference
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SCHEDULE, stock_twin, tiny_base, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spts_compress.checkpoint.families import ALIASES
from spts_compress.checkpoint.families import FAMILIES as SUPPORTED
from spts_compress.modeling import decoding
from spts_compress.modeling.selection import probe_scores
from spts_compress.modeling.stock_layer import cos_sin_of

ELSEWHERE = ("llama",)  # goes through test_pipeline.py and test_generate.py


def recipe_for(base, folder, **model):
    """A recipe for the tiny model in `base`, and text for it."""
    (folder / "text").mkdir(exist_ok=True)
    changes = {f"model__{name}": value for name, value in model.items()}
    return helpers.recipe_for(
        base, write_corpus(folder / "text"), folder, schedule__ffn_selection="relative", **changes
    )


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == set(SUPPORTED)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ELSEWHERE])
def test_from_recipe_to_answers(family, tmp_path):
    """The run itself checks the export in a fresh process and the report's dense side against stock code."""
    base = tiny_base(tmp_path / "base", family)
    run("recipe", recipe_for(base, tmp_path))
    run("verify", tmp_path / "out")
    plan = run("recipe", tmp_path / "recipe.yaml", "--dry-run")
    told = run("inspect", tmp_path / "out")
    assert plan[plan.index("Active tokens") : plan.index("By the FLOP count")] in told
    assert re.findall(r"\| (\S+%) +\|", plan)[0] in told  # of the KV cache
    report = json.loads((tmp_path / "out/spts_report.json").read_text())
    assert [fit["layer"] for fit in report["proxies"]] == [2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 300, (n,), generator=generator) for n in (150, 90)]
    tokens = torch.stack([torch.cat([torch.zeros(150 - len(r), dtype=torch.long), r]) for r in rows])
    mask = (tokens > 0).long()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    together = model.generate(tokens, attention_mask=mask, **options)[:, 150:]
    for row, ours in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], ours)
    dense = model.generate(tokens, attention_mask=mask, spts=False, **options)
    assert torch.equal(dense, stock.generate(tokens, attention_mask=mask, **options))
    one = model.generate(rows[0][None], return_dict_in_generate=True, **options)
    active = [layer["active"] for layer in model.skipped(one.past_key_values)]
    assert active[0] > active[2] > active[4]
    more = torch.cat([one.sequences, torch.full((1, 3), 7)], dim=1)  # a second turn on the same cache
    again = model.generate(more, past_key_values=copy.deepcopy(one.past_key_values), **options)
    cache = one.past_key_values
    with torch.no_grad():
        while more.shape[1] < again.shape[1]:  # the same token by token
            logits = model(more[:, cache.get_seq_length() :][:, :1], past_key_values=cache).logits
            if cache.get_seq_length() == more.shape[1]:
                more = torch.cat([more, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(again, more)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe"])
def test_skipped_tokens_never_reach_a_router(family):
    model = tiny_model(family)
    seen, plain = [], getattr(model.config, "first_k_dense_replace", 0)
    for layer in model.model.layers[plain:]:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-2]))
    tokens = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model(tokens, logits_to_keep=1)
        assert seen == [40, 12, 12, 8, 8][plain:]
        seen.clear()
        routing = model(tokens, logits_to_keep=1, output_router_logits=True).get("router_logits")
    assert seen == [40] * (5 - plain)  # of every layer, so dense
    if routing is not None:  # transformers 5.17 gives none of DeepSeek's
        assert [len(logits) for logits in routing] == seen


def test_experts_have_no_low_rank_proxies(tmp_path):
    recipe = recipe_for(tiny_base(tmp_path / "base", "mixtral"), tmp_path)
    assert "regression" in run("recipe", recipe, "--dry-run")
    assert "share no matrices" in run("recipe", recipe, "--set", "proxy.regression=false", code=2)
    assert "share no matrices" in run("sweep", recipe, "--output", tmp_path / "study", code=2)


def test_only_the_rows_asked_for_of_a_fused_projection(monkeypatch):
    """And all of them where the module is not plain, with the same result; with a bias if someone gave it one."""
    monkeypatch.setattr(decoding, "STOCK_ON", ())
    model = tiny_model("phi3")
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.bias = torch.nn.Parameter(torch.randn(layer.self_attn.qkv_proj.out_features))
    tokens = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
    plain, calls = model(tokens, logits_to_keep=1).logits, []
    for layer in model.model.layers[1:]:
        layer.self_attn.qkv_proj.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, plain, rtol=0, atol=1e-5)
    assert len(calls) >= 3 * 4
    model.model.layers[0].self_attn.qkv_proj.register_forward_hook(lambda *args: seen.append(1))
    seen = []
    model(tokens, logits_to_keep=1, spts=True)
    assert len(seen) == 1  # before the first skipping layer
    kept = [model(tokens, logits_to_keep=1, spts=spts).past_key_values.layers[0].keys for spts in (True, False)]
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_rotary_positions_are_the_stock_ones(family):
    """Where nothing is skipped in the first skipping layer, its keys are the dense model's, at every length."""
    theta = {"rope_theta": 10000.0}
    kinds = {
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
        "dynamic": {"factor": 2.0},
        "linear": {"factor": 2.0},
    }
    if family.startswith("deepseek"):  # whose attention scales by these as well
        kinds["yarn"] = {**kinds["yarn"], "mscale": 0.7, "mscale_all_dim": 1.0}
    if family == "phi3":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
        kinds = {"longrope": factors}
    schedule = {**SCHEDULE, "stages": [{"end": 2, "budget": {"fraction": 0.9}}, {"end": 4, "budget": 8}]}
    for kind, more in kinds.items():
        changes = {"rope_parameters": {"rope_type": kind, **theta, **more}, "max_position_embeddings": 64}
        if family == "gemma3_text":
            default = {"rope_type": "default", "rope_theta": 100.0}
            changes["rope_parameters"] = {"full_attention": changes["rope_parameters"], "sliding_attention": default}
        if family in ("gemma3_text", "ministral"):
            changes["sliding_window"] = 256  # the stock cache then holds what is looked at here
        if family == "mixtral":
            changes["head_dim"] = 8  # whose default transformers' scaled positions can't read
        model = tiny_model(family, schedule, **changes)
        stock = stock_twin(model)
        for length in (20, 60):
            tokens = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(6))
            with torch.no_grad():
                ours = model(tokens, logits_to_keep=1, spts={"positions": True}).past_key_values
                theirs = stock(tokens, use_cache=True).past_key_values
            where = ours.layers[1].positions[0]
            assert len(where) < length
            for mine, stocks in zip(*((c.layers[1].keys, c.layers[1].values) for c in (ours, theirs)), strict=True):
                torch.testing.assert_close(mine[0], stocks[0][:, where], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("hooked", [False, True])
def test_latents_are_probed_as_the_keys_made_of_them_would_be(family, hooked):
    """By the attention that the dense model pays; and without a look at weights where the module is not plain."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    yarn |= {"mscale": 0.7, "mscale_all_dim": 1.0}
    model, given = tiny_model(family, attn_implementation="eager", rope_parameters=yarn), []
    layer = model.model.layers[1]
    made = layer.self_attn.kv_b_proj
    made.bias = torch.nn.Parameter(torch.randn(made.out_features))  # alike for all tokens, so that it changes nothing
    layer.self_attn.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        paid = model(tokens, output_attentions=True).attentions[1][:, :, -3:].mean(2)
        normed, tables = given[0]["hidden_states"], cos_sin_of(given[0]["position_embeddings"])
        calls = []
        if hooked:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, output: calls.append(args))
        query = layer.probes(normed[:, -3:], *(table[:, -3:] for table in tables))
        found = probe_scores(query, layer.keys(normed, *tables), layer.self_attn.scaling)
    torch.testing.assert_close(found, paid, rtol=1e-5, atol=1e-6)
    assert len(calls) == hooked


def test_mistral_with_kinds_of_layers_is_ministral(tmp_path):
    base = tiny_base(tmp_path / "base", "ministral")
    plain = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**plain, "model_type": "mistral"}))
    run("recipe", recipe_for(base, tmp_path))
    run("verify", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.model_type == "spts_ministral"
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}


def test_layers_that_predict_further_tokens_stay_in_the_files_and_out_of_the_model(tmp_path):
    base, out = tiny_base(tmp_path / "base", "deepseek_v3"), tmp_path / "out"
    weights = load_file(base / "model.safetensors")
    further = {n.replace("layers.4", "layers.5"): w.clone() for n, w in weights.items() if "layers.4." in n}
    further["model.layers.5.eh_proj.weight"] = torch.zeros(32, 64)
    save_file({**weights, **further}, base / "model.safetensors", {"format": "pt"})
    run("recipe", recipe_for(base, tmp_path))
    assert len(load_file(out / "base_model.safetensors")) == len(weights) + len(further)
    run("verify", out)
    model, told = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not told["unexpected_keys"] and len(model.model.layers) == 5
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.state_dict()[bias], weights[bias].float()) and weights[bias].any()
    fits = json.loads((out / "spts_report.json").read_text())["proxies"]
    assert [len(fit["candidates"]) for fit in fits] == [3, 1, 1]  # one layer of matrices, two of experts
    run("strip", out, "--output", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["gemma3_text", "ministral", "mistral", "mixtral", "phi3", "qwen2"])
def test_windows_in_padded_batches_and_several_turns_equal_the_reference(family):
    """Rows that end a window at different slots, then a chunk of tokens for each; all on one cache."""
    changes = {"sliding_window": 7} if family != "qwen2" else {}
    if family == "qwen2":
        changes = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    schedule = {**SCHEDULE, "probe": {"window_size": 3, "score_carry": 0.5}, "sink_tokens": 2}
    model = tiny_model(family, schedule, **changes).double()
    rows = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 22, 5)]
    tokens = torch.stack([torch.cat([torch.zeros(40 - len(r), dtype=torch.long), r]) for r in rows])
    mask, later = (tokens > 0).long(), torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    positions = (torch.cat([mask, torch.ones_like(later)], 1).cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, position_ids=positions[:, :40], logits_to_keep=1)
        whole = torch.cat([mask, torch.ones_like(later)], 1)
        more = model(later, attention_mask=whole, position_ids=positions[:, 40:], past_key_values=out.past_key_values)
    for number, row in enumerate(rows):
        reference = Reference(model.state_dict(), model.config, schedule)
        expected = [reference.prefill(row.tolist()), *(reference.step(int(t)) for t in later[number])]
        assert reference.margin > 1e-6
        ours = torch.cat([out.logits[number], more.logits[number]])
        torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "ministral", "mistral"])
def test_windows_after_a_crop_into_the_prompt(family):
    """The cut tokens, run again, give the same answers, wherever the layers' last kept tokens came from."""
    model = tiny_model(family, {**SCHEDULE, "recent_tokens": 3}, sliding_window=7).double()
    for seed in range(5):
        tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(seed))
        plain, recording = DynamicCache(), DynamicCache(config=model.config)
        recording.activate_past_recording()
        with torch.no_grad():
            for cache in (plain, recording):
                out = model(tokens, past_key_values=cache, logits_to_keep=1)
                cache.crop(-3)
                again = model(tokens[:, -3:], past_key_values=cache).logits[:, -1:]
                torch.testing.assert_close(again, out.logits, rtol=0, atol=1e-4)
            recording.crop(0)  # transformers 5.17 asks for it after every pass
            step = model(tokens[:, :5], past_key_values=recording).logits
            recording.crop(-5)
            torch.testing.assert_close(model(tokens[:, :5], past_key_values=recording).logits, step)


def test_a_layer_with_a_window_holds_no_more_than_that():
    model = tiny_model("mistral", sliding_window=7)
    tokens = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(tokens[:, :40], logits_to_keep=1).past_key_values
        for step in range(40, 60):
            model(tokens[:, step : step + 1], past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [6, 7, 7, 7, 7]
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.layers[1].crop(-9)
        cache.reset()
        if cache.layers[1].get_seq_length() > 0:
            return  # transformers 5.17 keeps the length of a cache that was reset, so it can't be used again
        expected = stock_twin(model)(tokens, use_cache=False).logits[:, -20:]
        model(tokens[:, :40], past_key_values=cache, logits_to_keep=1, spts=False)
        got = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(40, 60)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-4)


def test_pruning_where_a_window_hides_the_rest_is_warned_of(tmp_path):
    recipe = recipe_for(tiny_base(tmp_path / "base", "gemma3_text"), tmp_path)
    assert "stages end at layers with a window (3)" in run("recipe", recipe, "--dry-run")
    carried = ("--set", "schedule.probe.score_carry=1.0", "--dry-run")
    assert "stages end at" in run("recipe", recipe, *carried)  # from layer 2, which has a window too
    stages = [{"end": 4, "budget": 40}]
    assert "stages end at" not in run("recipe", recipe, *carried, "--set", f"schedule.stages={json.dumps(stages)}")


def test_windows_with_flash_attention_and_unknown_layers_and_wrappers_get_a_clear_error(tmp_path):
    model = tiny_model("ministral")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa'"):
        model(torch.ones(1, 40, dtype=torch.long), logits_to_keep=1)
    model = tiny_model("ministral", sliding_window=45)
    cache = model(torch.ones(1, 40, dtype=torch.long), logits_to_keep=1).past_key_values  # shorter than the window
    ALL_ATTENTION_FUNCTIONS["as_flash"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.config._attn_implementation = "as_flash"
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa'"):
        model(torch.ones(1, 10, dtype=torch.long), past_key_values=cache)
    base = tiny_base(tmp_path / "base", "ministral")
    config = json.loads((base / "config.json").read_text())
    faults = [
        ({"layer_types": ["full_attention"] * 4 + ["chunked_attention"]}, "layers of chunked_attention"),
        ({"model_type": "gemma3", "text_config": {}}, "family gemma3 is not supported.*text part alone"),
        ({"model_type": "t5"}, "family t5 is not supported"),
        ({"model_type": "jamba"}, "family jamba is not supported"),
    ]
    for changes, message in faults:
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        assert re.search(message, run("recipe", recipe_for(base, tmp_path), code=2))
    (base / "model.safetensors").unlink()  # a plan needs none, and these are of another family
    sizes = {"vocab_size": 300, "max_position_embeddings": 2048}
    for bidirectional in (True, False):
        tiny_config("gemma3_text", use_bidirectional_attention=bidirectional, **sizes).save_pretrained(base)
        output = run("recipe", recipe_for(base, tmp_path), "--dry-run", code=2 if bidirectional else 0)
        assert ("looks ahead" in output) == bidirectional


TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class PanguTokenizer(PreTrainedTokenizerFast):
    pass
"""


def pangu(folder):
    """An openPangu-like checkpoint: Llama's parts with attention biases, under a config and a tokenizer of its own."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    )
    more = dict(vocab_size=300, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more, rope_theta=16e6, attention_bias=True, initializer_range=0.25))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
        "model_type": "PanguEmbedded",
        "bias": True,
        "hidden_act": "silu",
        "rope_theta": 16e6,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps({**plain, **sizes, **more}))
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenization_openpangu.py").write_text(TOKENIZER)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["auto_map"] = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    told["tokenizer_class"] = "PanguTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return stock


def test_openpangu_is_read_as_the_llama_it_is(tmp_path):
    (tmp_path / "base").mkdir()
    stock = pangu(tmp_path / "base")
    assert set(ALIASES) == {"PanguEmbedded"}
    assert "model.trust_remote_code: true" in run("recipe", recipe_for(tmp_path / "base", tmp_path), code=2)
    run("recipe", recipe_for(tmp_path / "base", tmp_path, trust_remote_code=True))
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "spts_llama" and config["attention_bias"] is True and "bias" not in config
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    tokens = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens, spts=False).logits, stock(tokens).logits)
        assert not torch.equal(model(tokens, logits_to_keep=1).logits[:, -1], stock(tokens).logits[:, -1])
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "PanguTokenizer"
    assert 'from_pretrained("THIS_REPOSITORY", trust_remote_code=True)' in (out / "README.md").read_text()
    run("strip", out, "--output", tmp_path / "back")
    names = {p.name for p in (tmp_path / "base").iterdir()}
    assert {p.name for p in (tmp_path / "back").iterdir()} == names
    assert all((tmp_path / "back" / n).read_bytes() == (tmp_path / "base" / n).read_bytes() for n in names)
    assert load_file(out / "base_model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()


# What the models' own config.json files say.
PUBLISHED = {
    "llama-paper.yaml": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen2.5-7b.yaml": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
        "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False,
    },
    "openpangu-1b.yaml": {  # but for intermediate_size, which its documents do not tell
        "model_type": "PanguEmbedded", "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 26,
        "num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 153376, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 16000000.0, "bias": True, "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "size", "kept"),
    [
        ("llama.yaml", "8.03B", "41.5%"),
        ("llama-paper.yaml", "8.03B", "41.5%"),
        ("qwen2.5-7b.yaml", "7.62B", "48.3%"),
        ("openpangu-1b.yaml", "B parameters", "%"),
    ],
)
def test_the_papers_models_plan_from_their_published_configs(recipe, size, kept, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[recipe.replace("llama.yaml", "llama-paper.yaml")]))
    plan = run("recipe", recipe, "--set", f"model.path={tmp_path}", "--set", "report.lengths=[32768]", "--dry-run")
    assert size in plan and kept in plan
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
