"""On the real small models: `pytest -m real`, with SPTS_MODELS naming the folder that holds their checkpoints."""

import os
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from spts_compress.calibrate import data
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.tasks import ruler, runner
from spts_compress.timing import pairs

pytestmark = pytest.mark.real
MODELS = Path(os.environ.get("SPTS_MODELS", "models"))


def lab_schedule(layers, start, channels, rank):
    """Budgets of 28/22/12.5/6% of the prompt in four stages, the windowed probe."""
    ends = [start + round((layers - start) * i / 4) - 1 for i in (1, 2, 3, 4)]
    stages = [{"end": e, "budget": {"fraction": f}} for e, f in zip(ends, (0.28, 0.22, 0.125, 0.06), strict=True)]
    for stage, fraction in zip(stages, (0.35, 0.27, 0.16), strict=False):
        stage["prune_to"] = {"fraction": fraction}
    probe = {"window_size": 32, "heads": "max", "kernel_size": 7}
    proxy = {"channels": channels, "rank": rank}
    return dict(
        start=start, stages=stages, probe=probe, proxy=proxy, sink_tokens=4, recent_tokens=64, ffn_selection="attention"
    )


@pytest.fixture(scope="module", params=[("smollm2-135m-instruct", 21), ("qwen2.5-coder-0.5b-instruct", 12)])
def models(request):
    """Stock and skipping model on the same weights (the attention score alone chooses, so no proxies are needed)."""
    name, start = request.param
    if not (MODELS / name / "config.json").is_file():
        pytest.skip(f"no {name} in {MODELS}; set SPTS_MODELS")
    stock = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.bfloat16).eval()
    config_class, model_class = FAMILIES[stock.config.model_type][1:]
    block = lab_schedule(stock.config.num_hidden_layers, start, 256, 64)
    Schedule.from_dict(block, stock.config.num_hidden_layers)
    config = config_class(**{k: v for k, v in stock.config.to_dict().items() if k != "model_type"}, spts=block)
    config._attn_implementation = "sdpa"
    model = model_class(config).to(torch.bfloat16).eval()
    missing = model.load_state_dict(stock.state_dict(), strict=False)
    assert all(".proxy." in key for key in missing.missing_keys)
    assert not missing.unexpected_keys
    model.generation_config = stock.generation_config
    return stock, model, AutoTokenizer.from_pretrained(MODELS / name)


def test_needles_are_found_as_by_the_dense_model(models):
    stock, model, tokenizer = models
    prose = "\n\n".join(data.python_docs())
    dense = kept = 0
    for item in ruler.examples("niah_single_2", tokenizer, prose, 3000, 3, seed=5, answer_tokens=32):
        found = [item.outputs[0] in runner.answers(m, tokenizer, [item])[0] for m in (stock, model)]
        dense += found[0]
        kept += found[0] * found[1]
    assert dense >= 2
    assert kept == dense


def test_off_is_the_stock_model_and_padded_rows_run_as_alone(models):
    stock, model, tokenizer = models
    paragraphs = data.python_docs()[0].split("\n\n")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["\n\n".join(paragraphs[:40])[:2400], "\n\n".join(paragraphs[40:80])[:1500]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model.generate(**batch, **options, spts=False), stock.generate(**batch, **options))
        single, double = model.float(), []
        made = single.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for one in texts:
            alone = tokenizer(one, return_tensors="pt")
            double.append(single.generate(**alone, **options)[0, alone["input_ids"].shape[1] :])
        model.to(torch.bfloat16)
    for together, alone in zip(made, double, strict=True):
        assert together[: len(alone)].tolist() == alone.tolist()
        ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
        assert pairs.memory(model, ids)["kv_bytes"] < pairs.memory(stock, ids)["kv_bytes"]


def test_beams_lookup_and_turns(models):
    _, model, tokenizer = models
    prompt = tokenizer(data.python_docs()[1][:3000], return_tensors="pt")
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = model.generate(**prompt, max_new_tokens=12, **options)
    looked_up = model.generate(**prompt, max_new_tokens=12, prompt_lookup_num_tokens=3, **options)
    # bfloat16 rounds differently in chunks of several tokens, so the first tokens are what must agree
    n = prompt["input_ids"].shape[1]
    assert looked_up[0, : n + 3].tolist() == plain[0, : n + 3].tolist()
    one, two = model.generate(**prompt, max_new_tokens=4, num_beams=2, num_return_sequences=2, **options)
    assert len(one) == n + 4 and not torch.equal(one, two)
    first = model.generate(**prompt, max_new_tokens=4, return_dict_in_generate=True, **options)
    again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    assert again[0].tolist() == plain[0, : n + 8].tolist()  # on the cache as without a stop in between
