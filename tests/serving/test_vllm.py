"""The plugin for vLLM, in an environment that has it: .github/CONTRIBUTING.md has the command. The judge is what
transformers answers with the same checkpoint."""

import gc
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from spts_compress import vllm_plugin
from spts_compress.calibrate import data
from spts_compress.calibrate.base_model import resolve
from spts_compress.export import write
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.modeling.update import UPDATES
from spts_compress.recipe import ModelSection
from spts_compress.utils.store import Store

vllm = pytest.importorskip("vllm")
openai, psutil = pytest.importorskip("openai"), pytest.importorskip("psutil")
setup = pytest.importorskip("spts_compress.vllm_plugin.setup")

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
PROXY["probe"] = {**PROXY["probe"], "rank": 3}
SHAPES = {
    "attention_update.bias": (64,),
    "attention_update.down": (2, 64),
    "attention_update.up": (64, 2),
    "ffn_update.bias": (64,),
    "probe_update.bias": (64,),
    "probe_update.down": (3, 64),
    "probe_update.up": (64, 3),
    "proxy.down": (1, 64),
    "proxy.square": (64,),
    "proxy.constants": (2,),
}


def build(folder, family="llama", block=BLOCK):
    """A checkpoint of a tiny random model, exported to folder/out; vLLM's attention takes no smaller heads."""
    tiny_base(folder / "base", family, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    base = resolve(ModelSection(path=str(folder / "base")), Store(folder / "work"))
    generator = torch.Generator().manual_seed(0)
    asked = {"proxy": block.get("proxy"), "probe_update": block["probe"].get("rank"), **dict.fromkeys(UPDATES, UPDATE)}
    wanted = tuple(part for part, given in asked.items() if given)
    parameters = {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator).bfloat16() / 4
        for layer in range(block["start"], 5)
        for name, shape in SHAPES.items()
        if name.startswith(wanted)
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


def test_memory_stays_level_over_hundreds_of_requests(checkpoint, engine):
    llm, process = engine(checkpoint, num_gpu_blocks_override=64), psutil.Process()
    lengths = torch.randint(1, 400, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    sizes = []
    for number in range(9):  # always of these lengths, since kernels keep something for each that they have seen
        ask(llm, prompts(*lengths, seed=number), params(4))
        gc.collect()
        sizes.append(process.memory_info().rss / 2**20)
    assert skipped(llm) > 400
    assert sizes[-1] - sizes[3] < 8, sizes
    assert not llm.apply_model(lambda model: model.new_prompts.lengths)[0]


def test_prompt_logprobs_run_dense_and_samples_of_one_prompt_skip(checkpoint, engine):
    (prompt,), llm = prompts(100), engine(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    request = [{"prompt_token_ids": prompt}]
    output = llm.generate(request, params(prompt_logprobs=0), use_tqdm=False)[0]
    got = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    wanted = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-3, rtol=0)
    assert skipped(llm) == 0
    several = llm.generate(request, params(n=3, temperature=1e-6), use_tqdm=False)[0].outputs
    assert [list(one.token_ids) for one in several] == answers(checkpoint, [prompt]) * 3
    assert skipped(llm) == 3


def test_every_step_of_a_beam_search_is_a_prompt_of_its_own(checkpoint, engine):
    from vllm.sampling_params import BeamSearchParams

    llm, [asked] = engine(checkpoint), prompts(120)
    before = skipped(llm)
    llm.beam_search([{"prompt_token_ids": asked}], BeamSearchParams(beam_width=1, max_tokens=3, ignore_eos=True))
    assert skipped(llm) == before + 3


def test_what_is_neither_true_nor_false_is_an_error(checkpoint, engine):
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="neither true nor false"):
        ask(engine(checkpoint), prompts(100), params(extra_args={"spts": "no"}))


def test_an_aborted_request_leaves_the_others_alone(checkpoint, engine):
    asked, llm = prompts(120, 130, 140), engine(checkpoint)
    alone = [ask(llm, [one])[0] for one in asked]
    for name, prompt in zip("abc", asked, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params())
    finished = llm.llm_engine.step()
    llm.llm_engine.abort_request(["b"])
    while llm.llm_engine.has_unfinished_requests():
        finished += llm.llm_engine.step()
    got = {one.request_id: list(one.outputs[0].token_ids) for one in finished if one.finished}
    assert got == {"a": alone[0], "c": alone[2]}


def test_a_prompt_that_is_read_in_chunks_runs_dense(checkpoint, engine):
    asked = prompts(300, 400)
    llm = engine(checkpoint, max_num_batched_tokens=512)
    assert [ask(llm, [one])[0] for one in asked] == answers(checkpoint, asked)
    assert skipped(llm) == 2
    assert ask(llm, prompts(600)) == answers(checkpoint, prompts(600), spts=False)
    assert ask(llm, asked) == [*answers(checkpoint, asked[:1]), *answers(checkpoint, asked[1:], spts=False)]
    assert skipped(llm) == 3  # the second did not fit into the first one's step


def test_a_smaller_share_of_keys_and_values_runs_as_all_of_them(tmp_path, engine):
    checkpoint, asked = build(tmp_path, block={**BLOCK, "kv": 0.6}), prompts(100, 200)
    whole = answers(checkpoint, asked, spts={"kv": 1.0})
    assert ask(engine(checkpoint), asked) == whole != answers(checkpoint, asked)


def test_other_families_run_dense(tmp_path, engine, logged):
    checkpoint, asked = build(tmp_path, "mistral"), prompts(100)
    dense = answers(checkpoint, asked, spts=False)  # before vLLM's Transformers backend changes transformers' classes
    assert ask(engine(checkpoint), asked) == dense
    assert "prompts run dense: of the exported families only Llama and Qwen2 skip in vLLM" in logged.text


def test_schedules_with_holes_run_dense(tmp_path, engine, logged):
    stages = [{**BLOCK["stages"][0], "prune_to": {"fraction": 0.6}}, BLOCK["stages"][1]]
    checkpoint, asked = build(tmp_path, block={**BLOCK, "stages": stages}), prompts(100)
    llm = engine(checkpoint)
    assert ask(llm, asked) == answers(checkpoint, asked, spts=False) and skipped(llm) == 0
    assert "prompts run dense: the schedule has `prune_to`" in logged.text


@pytest.fixture
def logged(caplog, monkeypatch):
    """What is logged here; vLLM's loggers pass nothing on, and the first engine clears their handlers."""
    monkeypatch.setattr(logging.getLogger("vllm.spts"), "callHandlers", caplog.handler.handle)
    return caplog


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"spts": {**BLOCK, "update": None, "kv": None}}, "the schedule has no `update`"),
        ({"spts": {**BLOCK, "enabled": False}}, "not enabled"),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 5}, "sliding windows"),
        ({"runner_type": "pooling"}, "does not generate"),
        ({"world_size": 2}, "pipeline and context parallelism"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"kv_offloading_size": 1.0}, "KV connector"),
        ({"quantization": "fp8"}, "quantised weights"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_hinders_skipping_is_named(change, reason):
    plain = dict(spts=BLOCK, num_hidden_layers=5, architecture="SptsQwen2ForCausalLM", runner_type="generate")
    plain |= dict(world_size=1, tensor_parallel_size=1)
    names = "sliding_window", "layer_types", "quantization", "lora_config", "speculative_config", "kv_transfer_config"
    kind = type("Every", (SimpleNamespace,), {"sliding_window": None, "layer_types": None})  # which its family knows
    every = kind(**{**dict.fromkeys((*names, "kv_offloading_size", "use_v2_model_runner")), **plain, **change})
    for part in ("hf_config", "model_config", "parallel_config", "cache_config"):
        setattr(every, part, every)  # no two parts have a name in common
    found = setup.why_dense(every)
    assert found is None if reason is None else reason in found


def test_an_untested_vllm_is_left_alone(monkeypatch, logged):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setattr(vllm.ModelRegistry, "register_model", lambda *_: pytest.fail("registered"))
    vllm_plugin.register()
    assert "skips in vLLM from 0.32 up to, not including, 0.33; this is 0.33.1: prompts run dense" in logged.text


@pytest.fixture
def server(checkpoint, tmp_path):
    """A server, as users start it: the address, and the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `vllm serve`, whose command of vllm-cpu 0.32.0 looks for a package named vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--port", str(port)]
    command += ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--served-model-name", "tiny"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(1)
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            with suppress(OSError):
                urllib.request.urlopen(address + "/health")
                break
        yield address, tmp_path / "log"
    finally:
        process.terminate()
        process.wait(300)


def test_the_server_answers_a_client(checkpoint, server):
    address, log = server
    (prompt,) = prompts(200)
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)

    def said(**extra):
        made = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
        )
        return made.choices[0].token_ids

    (skipping,), (dense,) = answers(checkpoint, [prompt]), answers(checkpoint, [prompt], spts=False)
    assert said() == skipping != dense
    assert said(vllm_xargs={"spts": 0}) == dense
    with pytest.raises(openai.BadRequestError, match="neither true nor false"):
        said(vllm_xargs={"spts": "no"})
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: said(), range(16))) == [skipping] * 16
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "The quick brown fox " * 40}], max_tokens=4, stream=True
    )
    assert len(list(chat)) >= 2
    assert "the first prompt that skips has 200 tokens, 86 in a skipping layer" in log.read_text()


def test_processes_that_share_the_heads_answer_alike(checkpoint, engine, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    asked = prompts(30, 100, 300)
    skipping = answers(checkpoint, asked)
    assert ask(engine(checkpoint, tensor_parallel_size=2), asked) == skipping


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_models_answer_as_in_transformers(tmp_path, engine, name):
    folder = Path(os.environ.get("SPTS_MODELS", "models")) / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no {folder}; set SPTS_MODELS")
    base = resolve(ModelSection(path=str(folder)), Store(tmp_path / "work"))
    layers, size = base.config.num_hidden_layers, base.config.hidden_size
    stages = [{"end": layers // 2, "budget": {"fraction": 0.6}}, {"end": layers - 1, "budget": {"fraction": 0.3}}]
    ranks = {"attention_rank": 0, "ffn_rank": 0}
    block = {**BLOCK, "start": layers // 4, "stages": stages, "update": ranks, "recent_tokens": 32, "min_length": 0}
    names = [
        f"model.layers.{n}.{part}_update.bias" for n in range(layers // 4, layers) for part in ("attention", "ffn")
    ]
    (tmp_path / "out").mkdir()
    parameters = {name: torch.zeros(size) for name in names}
    write.write(base, write.carry(base), Schedule.from_dict(block, layers), parameters, tmp_path / "out")
    text = AutoTokenizer.from_pretrained(folder)("\n\n".join(data.python_docs()[:200])).input_ids
    asked = [text[3000 * n : 3000 * n + length] for n, length in enumerate((500, 1000, 2000))]
    plain = {"repetition_penalty": 1.0, "top_p": None, "top_k": None, "temperature": None}
    skipping = answers(tmp_path / "out", asked, 32, **plain)
    llm = engine(tmp_path / "out", max_model_len=2048, max_num_batched_tokens=4096, generation_config="vllm")
    assert ask(llm, asked, params(32)) == skipping != answers(tmp_path / "out", asked, 32, spts=False, **plain)
    assert skipped(llm) == 3
