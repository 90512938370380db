"""The plugin for vLLM, in an environment that has it: .github/CONTRIBUTING.md has the command. The judge is what
transformers answers with the same checkpoint."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from spts_compress.calibrate.base_model import resolve
from spts_compress.export import write
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ModelSection
from spts_compress.utils.store import Store

vllm = pytest.importorskip("vllm")

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where tests see into it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

UPDATE = {"attention_rank": 2, "ffn_rank": 0}
BLOCK = {
    "start": 2,
    "stages": [{"end": 3, "budget": {"fraction": 0.5}}, {"end": 4, "budget": {"fraction": 0.3}}],
    "probe": {"window_size": 4, "score_carry": 0.5, "kernel_size": 3},
    "sink_tokens": 2,
    "recent_tokens": 4,
    "ffn_selection": "attention",
    "update": UPDATE,
    "kv": 1.0,
    "min_length": 40,
}
PROXY = {**BLOCK, "ffn_selection": "relative", "proxy": {"channels": 1, "rank": 0}, "start": 1, "min_length": 0}
SHAPES = {
    "attention_update.bias": (64,),
    "attention_update.down": (2, 64),
    "attention_update.up": (64, 2),
    "ffn_update.bias": (64,),
    "proxy.down": (1, 64),
    "proxy.square": (64,),
    "proxy.constants": (2,),
}


def build(folder, family="llama", block=BLOCK):
    """A checkpoint of a tiny random model, exported to folder/out; vLLM's attention takes no smaller heads than these."""
    tiny_base(folder / "base", family, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    generator = torch.Generator().manual_seed(0)
    wanted = [part for part in ("update", "proxy") if block.get(part)]
    parameters = {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator).bfloat16() / 4
        for layer in range(block["start"], 5)
        for name, shape in SHAPES.items()
        if any(part in name for part in wanted)
    }
    (folder / "out").mkdir()
    write.write(base, write.carry(base), Schedule.from_dict(block, 5), parameters, folder / "out")
    return folder / "out"


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 290, (length,), generator=generator).tolist() for length in lengths]


def answers(checkpoint, asked, tokens=8, **options):
    """What transformers says to each, alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    return [model.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in asked]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine():
    """Makes an engine, of which one at a time is there."""
    made = []

    def make(checkpoint, **options):
        settings = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 1024, "enforce_eager": True}
        settings |= {"trust_remote_code": True, "max_num_seqs": 64}
        made.append(vllm.LLM(model=str(checkpoint), **{**settings, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()


def params(tokens=8, **options):
    options = {"temperature": 0, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, **options}
    return vllm.SamplingParams(**options)


def ask(llm, asked, wanted=None):
    outputs = llm.generate([{"prompt_token_ids": one} for one in asked], wanted or params(), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def skipped(llm):
    """How many prompts have skipped."""
    return llm.apply_model(lambda model: model.skipped["prompts"])[0]


@pytest.mark.parametrize(("family", "block"), [("llama", BLOCK), ("qwen2", BLOCK), ("llama", PROXY), ("qwen2", PROXY)])
def test_tokens_are_those_of_transformers(tmp_path, engine, family, block):
    checkpoint, asked = build(tmp_path, family, block), prompts(30, 60, 101, 300, 1000)
    skipping, dense = answers(checkpoint, asked), answers(checkpoint, asked, spts=False)
    assert sum(map(list.__ne__, skipping, dense)) >= 3
    llm = engine(checkpoint)
    assert [ask(llm, [one])[0] for one in asked] == skipping
    assert skipped(llm) == len(asked) - (block["min_length"] > 30)
    before = llm.apply_model(lambda model: dict(model.skipped))[0]
    assert before["active"] < 0.6 * before["tokens"]
    assert ask(llm, asked, params(extra_args={"spts": False})) == dense
    assert skipped(llm) == before["prompts"]


def test_a_compiled_model_answers_alike(checkpoint, engine):
    asked = prompts(30, 60, 101, 300)
    llm = engine(checkpoint, enforce_eager=False)
    assert ask(llm, asked) == answers(checkpoint, asked) and skipped(llm) == 3


def test_fifty_requests_at_a_time_equal_their_single_runs(checkpoint, engine):
    generator = torch.Generator().manual_seed(1)
    asked = prompts(*torch.randint(1, 500, (50,), generator=generator).tolist())
    wanted = [params(4 + n % 13, extra_args={"spts": n % 5 > 0}) for n in range(50)]
    llm = engine(checkpoint, max_num_seqs=12)  # so that prompts join while others are answered
    alone = [ask(llm, [one], [want])[0] for one, want in zip(asked, wanted, strict=True)]
    once = skipped(llm)
    assert once > 30
    assert ask(llm, asked, wanted) == alone
    assert skipped(llm) == 2 * once


def test_preempted_requests_equal_their_single_runs(checkpoint, engine):
    asked = prompts(*[200] * 6)
    llm = engine(checkpoint, num_gpu_blocks_override=13, block_size=128, disable_log_stats=False)
    alone = [ask(llm, [one], params(100))[0] for one in asked]
    assert ask(llm, asked, params(100)) == alone
    assert skipped(llm) > 12  # a request that was preempted skips again
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:num_preemptions"] > 0
