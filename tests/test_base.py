"""What a base is refused for, before any long work, and that all else which transformers loads is taken."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, TEXT, tiny_base, tiny_tokenizer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from spts_compress.calibrate.base_checks import tell_of_own_code
from spts_compress.calibrate.base_model import resolve, resolve_config
from spts_compress.checkpoint import loadable
from spts_compress.checkpoint.families import context_of
from spts_compress.cli import main
from spts_compress.evaluate.measure import check_prompts
from spts_compress.modeling.modeling_spts_llama import SptsLlamaConfig
from spts_compress.recipe import ModelSection, ReportSection
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store

UP, INDEX = "model.layers.3.mlp.up_proj.weight", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny stock checkpoints that are made once; a test gets a copy."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(target, **settings):
        key = repr(settings)
        if key not in made:
            made[key] = tiny_base(folder / str(len(made)), **settings)
        return shutil.copytree(made[key], target)

    return base


def edit(name, **values):
    def change(folder):
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v is not ...}))

    return change


def weights(change):
    def changed(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return changed


def without(*names):
    return weights(lambda w: {k: v for k, v in w.items() if k not in names})


def plus(**tensors):
    return weights(lambda w: {**w, **{name.replace("__", "."): value for name, value in tensors.items()}})


def quantised(folder):
    def packed(w):
        return {k.removesuffix("weight") + "qweight" if "proj" in k else k: v for k, v in w.items()}

    weights(packed)(folder)


def stale_index(folder):
    path = folder / INDEX
    data = json.loads(path.read_text())
    data["weight_map"]["model.layers.9.gone.weight"] = next(iter(data["weight_map"].values()))
    path.write_text(json.dumps(data))


def repeated(folder):
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second, {"format": "pt"})


def adapter_only(folder):
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


HALF = torch.zeros(4, dtype=torch.bfloat16)
REFUSED = {
    "missing": (without(UP), f"missing tensors: {UP}"),
    "lm_head missing, not tied": (without("lm_head.weight"), "missing tensors: lm_head.weight"),
    "unexpected": (plus(model__strange=HALF), "no tensor of this model, by its config: model.strange"),
    "misshapen": (
        weights(lambda w: {**w, UP: w[UP].T.contiguous()}),
        f"{UP} has the shape [32, 48], the config asks for [48, 32]",
    ),
    "reward head": (plus(score__weight=torch.ones(1, 32)), "score.weight: a head for classes or rewards"),
    "adapter's tensors": (plus(model__layers__0__self_attn__q_proj__lora_A__weight=HALF), "merge it into its model"),
    "GPTQ": (quantised, "quantised weights"),
    "fp8 scales": (plus(model__layers__0__mlp__up_proj__weight_scale_inv=HALF), "quantised weights"),
    "fp8": (weights(lambda w: {**w, UP: w[UP].to(torch.float8_e4m3fn)}), f"{UP} (F8_E4M3)"),
    "integers": (weights(lambda w: {**w, UP: w[UP].to(torch.int8)}), f"{UP} (I8)"),
    "tied, but unlike": (
        weights(lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1}),
        "set tie_word_embeddings to false",
    ),
    "empty file": (write("model.safetensors", ""), "model.safetensors: can't be read, damaged or cut short"),
    "pickled": (pickled, "load them with transformers and save_pretrained them"),
    "index: malformed": (write(INDEX, "{"), "not a JSON object with a weight_map"),
    "index: no map": (write(INDEX, '{"weight_map": [1]}'), "not a JSON object with a weight_map"),
    "index: tensor that is nowhere": (stale_index, "lists tensors that are in no file: model.layers.9.gone.weight"),
    "index: elsewhere": (
        write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
        "../x.safetensors points outside the folder",
    ),
    "index: twice": (repeated, "only one of them can count"),
    "index: shard missing": (lambda f: next(f.glob("model-*")).unlink(), "which is not there"),
    "nothing but the index": (
        lambda f: [(f / "model.safetensors").unlink(), (f / INDEX).write_text("{}")],
        "not a JSON object with a weight_map",
    ),
    "adapter beside": (write("adapter_config.json", "{}"), "holds an adapter (adapter_config.json)"),
    "adapter's weights beside": (write("adapter_model.bin", ""), "merge it into its model (peft"),
    "adapter alone": (adapter_only, "merge it into its model (peft"),
    "hidden states": (edit("config.json", output_hidden_states=True), "output_hidden_states is true"),
    "attentions": (edit("generation_config.json", output_attentions=True), "output_attentions is true"),
    "tuples": (edit("config.json", return_dict=False), "return_dict is false"),
    "static cache": (edit("generation_config.json", cache_implementation="static"), "cache_implementation is static"),
    "in chunks": (edit("generation_config.json", prefill_chunk_size=64), "prefill_chunk_size is 64, with which gen"),
    "guidance": (edit("generation_config.json", guidance_scale=1.5), "guidance_scale is 1.5"),
    "guidance, in the config": (edit("config.json", guidance_scale=1.5), "config.json: guidance_scale is 1.5"),
    "a schedule for generate": (edit("generation_config.json", spts=False), "generation_config.json: spts is False"),
    "early exit": (edit("generation_config.json", assistant_early_exit=2), "assistant_early_exit is 2"),
    "generation config: no JSON": (write("generation_config.json", "{"), "generation_config.json: can't be read"),
    "classifier": (
        edit("config.json", architectures=["LlamaForSequenceClassification"]),
        "skipping is for models that answer in text",
    ),
    "config: a list": (write("config.json", "[]"), "config.json: can't be read: not a JSON object"),
    "config: odd family": (edit("config.json", model_type=["llama"]), "model family ['llama'] is not supported"),
    "config: odd width": (edit("config.json", hidden_size=30), "not a usable configuration: Class validation error"),
    "config: odd type": (edit("config.json", dtype="bfloat17"), "not a usable configuration"),
    "config: odd activation": (edit("config.json", hidden_act="odd"), "no model can be built from it: no 'odd'"),
    "config: rope without factor": (
        edit("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "'rope_type'='yarn': {'factor'}",
    ),
    "tokenizer gone": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no usable tokenizer"),
    "tokenizer damaged": (write("tokenizer.json", "{}"), "no usable tokenizer"),
    "template damaged": (template("{% for"), "chat template can't show a user's turn"),
    "template raises": (template("{{ raise_exception('no users') }}"), "can't show a user's turn: no users"),
    "template without the user": (template("hello"), "leaves out what the user says"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_base_is_refused_in_one_line(name, bases, tmp_path):
    change, message = REFUSED[name]
    base = bases(tmp_path / "base", shards=name.startswith("index"), tie_word_embeddings=name.startswith("tied"))
    change(base)
    with pytest.raises(UserError) as error:
        resolve_config(ModelSection(path=str(base)))
    lines = str(error.value).splitlines()
    assert message in lines[0]
    assert lines[0].startswith(str(base)) and len(lines) <= 2


INV_FREQ = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(5)}
TAKEN = {
    "as it is": ({}, lambda folder: None),
    "old rotary buffers": ({}, weights(lambda w: {**w, **INV_FREQ})),
    "tied, without the prefix": (
        {"tie_word_embeddings": True},
        weights(lambda w: {k.removeprefix("model."): v for k, v in w.items()}),
    ),
    "tied, both there": (
        {"tie_word_embeddings": True},
        weights(lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}),
    ),
    "defaults left out": (
        {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64, "head_dim": 2},
        edit("config.json", num_attention_heads=...),
    ),
    "padded vocabulary": ({"vocab_size": 320}, lambda folder: None),
    "shards": ({"shards": True}, lambda folder: None),
    **{family: ({"family": family}, lambda folder: None) for family in FAMILIES},
    "extra layers": ({"family": "deepseek_v3"}, plus(model__layers__61__embed_tokens__weight=HALF)),
    "float32": ({}, weights(lambda w: {k: v.float() for k, v in w.items()})),
    "an index that the plain name hides": ({}, write(INDEX, "{}")),
    "guidance of no effect": ({}, edit("generation_config.json", guidance_scale=1.0, prefill_chunk_size=None)),
    "hybrid cache, which is dynamic now": ({}, edit("generation_config.json", cache_implementation="hybrid")),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_transformers_loads_is_taken(name, bases, tmp_path):
    settings, change = TAKEN[name]
    base = bases(tmp_path / "base", **settings)
    change(base)
    assert resolve_config(ModelSection(path=str(base))).num_hidden_layers == 5


LOADED = {
    **{name: settings | {"change": change} for name, (settings, change) in TAKEN.items()},
    **{name: {"change": REFUSED[name][0]} for name in ("missing", "unexpected", "misshapen", "reward head", "GPTQ")},
    "an expert missing": {
        "family": "qwen3_moe",
        "change": without("model.layers.1.mlp.experts.2.down_proj.weight"),
    },
    "an expert of another size": {
        "family": "qwen3_moe",
        "change": weights(
            lambda w: {**w, "model.layers.1.mlp.experts.2.down_proj.weight": torch.zeros(7, 24, dtype=torch.bfloat16)}
        ),
    },
}


@pytest.mark.parametrize("name", LOADED)
def test_tensors_are_judged_as_transformers_judges_them(name, bases, tmp_path):
    settings = dict(LOADED[name])
    change = settings.pop("change")
    base = bases(tmp_path / "base", **settings)
    change(base)
    found, wrong = {}, True
    with suppress(RuntimeError):  # of experts that can't be stacked
        _, found = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, ignore_mismatched_sizes=True)
        wrong = any(found.values())
    config = AutoConfig.from_pretrained(base)
    assert bool(loadable.faults(base, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)) == wrong


def test_tokens_without_an_embedding_are_refused_unless_nothing_brings_them_in(bases, tmp_path):
    base = bases(tmp_path / "base", vocab_size=290)
    with pytest.raises(UserError, match=r"more tokens than the model has embeddings \(290\)"):
        resolve_config(ModelSection(path=str(base)))
    placeholder = bases(tmp_path / "other")  # as Gemma 3's for an image
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(placeholder)
    config = resolve_config(ModelSection(path=str(placeholder)))
    assert len(tokenizer) > config.vocab_size
    tokenizer.chat_template = "<image>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(placeholder)
    with pytest.raises(UserError, match="more tokens than the model has embeddings"):
        resolve_config(ModelSection(path=str(placeholder)))


def recipe_for(base, folder, **sections):
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {n}. " + TEXT * 3 + f"Ends at {n * 37}. "}) + "\n" for n in range(12))
    )
    data = {
        "model": {"path": str(base)},
        "calibration": {"source": "files", "path": str(folder / "documents.jsonl"), "tokens": 1200, "length": 128},
        "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0, "steps": 5},
        "schedule": {"start": 2, "stages": [{"end": 3, "budget": 40, "prune_to": 48}, {"end": 4, "budget": 24}]},
        "report": {"lengths": [300], "pairs": 1, "needles": 1, "answers": 0, "quality_length": 400},
        "export": {"path": str(folder / "out")},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return folder / "recipe.yaml"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def infinite(folder):
    weights(lambda w: {**w, UP: w[UP] * float("nan")})(folder)


LATE = {  # what is only seen with the text and the weights, and what is a matter of the recipe
    "needle": (
        None,
        {"report": {"quality_length": 256}},
        "report.quality_length: needles does not fit into 256 tokens",
    ),
    "many keys": (None, {"report": {"keys": 90}}, "report.quality_length: needles does not fit into 400 tokens"),
    "long template": (
        template("A long talk before. " * 40 + "{{ messages[0]['content'] }}"),
        {},
        "report.lengths: free_answer does not fit into 300 tokens",
    ),
    "context": (None, {"report": {"lengths": [2049]}}, "report.lengths: 2049 is more than the model's context of 2048"),
    "blocks": (None, {"calibration": {"length": 4096}}, "calibration.length: 4096 is more than the model's context"),
    "no template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        {"calibration": {"chat_template": True}},
        "calibration.chat_template is true, but the tokenizer has no chat template",
    ),
    "not finite": (infinite, {}, "gives values that are not finite"),
    "several answers": (edit("generation_config.json", num_return_sequences=3), {}, "transformers does not load it"),
    "odd bias": (edit("generation_config.json", sequence_bias=[1]), {}, "answer with its generation_config.json"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_recipe_that_can_not_end_well_stops_before_anything_is_fitted(name, bases, tmp_path):
    change, sections, message = LATE[name]
    base = bases(tmp_path / "base")
    if change:
        change(base)
    output = run("recipe", recipe_for(base, tmp_path, **sections), code=2)
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not list(tmp_path.glob("out.work/proxy-*")) and not (tmp_path / "out").exists()


def test_a_plan_judges_the_base_as_a_run_does(bases, tmp_path):
    base = bases(tmp_path / "base")
    without(UP)(base)
    assert f"missing tensors: {UP}" in run("recipe", recipe_for(base, tmp_path), "--dry-run", code=2)


def test_what_a_recipe_makes_of_an_odd_base_is_verified_and_stripped(bases, tmp_path):
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64, "head_dim": 2}
    base = bases(tmp_path / "base", tie_word_embeddings=True, **heads)
    edit("config.json", num_attention_heads=...)(base)
    edit("generation_config.json", return_dict_in_generate=True, num_beams=2, stop_strings=["x"], max_time=1e-9)(base)
    weights(lambda w: {k.removeprefix("model."): v for k, v in {**w, **INV_FREQ}.items()})(base)
    run("recipe", recipe_for(base, tmp_path, report={"answers": 1, "answer_tokens": 2}))
    assert "is whole" in run("verify", tmp_path / "out")
    run("strip", tmp_path / "out", "--output", tmp_path / "stock")
    name = "model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (base / name).read_bytes()


def test_a_text_without_sentences_is_named(tmp_path):
    with pytest.raises(UserError, match=r"report.lengths: the text .* has no sentence"):
        check_prompts(ReportSection(lengths=[300]), tiny_tokenizer(), "x = 1\n" * 500)


def test_a_stretched_context_counts():
    def context(**rope):
        return context_of(SptsLlamaConfig(max_position_embeddings=100, rope_parameters={"rope_theta": 1e4, **rope}))

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context(rope_type="default") == 100 and context(**yarn) == 400
    long = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama-3.2 says 8192 and 32, and reads 131072
    assert context(**{**yarn, "rope_type": "llama3", **long}) == 100
    assert context(**{**yarn, "rope_type": "dynamic"}) == 100


def test_a_revision_is_of_a_repository_alone(bases, tmp_path):
    base = bases(tmp_path / "base")
    for section in ({"path": str(base)}, {"package": "click", "gguf_file": "x.gguf"}):
        with pytest.raises(UserError, match=r"model\.revision: v2 is of a model on the Hub, not of .*; leave it out"):
            resolve_config(ModelSection(revision="v2", **section))


def test_a_base_of_the_hubs_cache_is_called_by_its_repository(bases, tmp_path):
    sha = "0123456789abcdef" * 2 + "01234567"
    for parent, repository, title in (("models--org--name", "org/name", "name"), ("own", None, sha)):
        folder = bases(tmp_path / parent / "snapshots" / sha)
        base = resolve(ModelSection(path=str(folder)), Store(tmp_path / "work"))
        assert (base.repository, base.title, base.revision) == (repository, title, None)
        assert base.name == str(folder)


def test_modelling_code_of_the_base_that_does_not_run_is_told(bases, tmp_path):
    told = []
    for stated in ({}, {"AutoTokenizer": ["a.A", None]}, {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.Model"}):
        base = bases(tmp_path / str(len(stated)))
        edit("config.json", auto_map=stated)(base)
        tell_of_own_code(resolve_config(ModelSection(path=str(base))), "base", told.append)
    assert len(told) == 1 and "its own modelling code (own.Model) is not run" in told[0]


def tiny_gguf(file, fields=None, tensors=None, without=()):
    """A llama of one layer, with further metadata `fields` and `tensors`, and `without` some of its own."""
    gguf = pytest.importorskip("gguf")
    sizes = {
        "context_length": 64,
        "block_count": 1,
        "feed_forward_length": 48,
        "embedding_length": 32,
        "vocab_size": 300,
    }
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    numbers = {f"llama.{name}": value for name, value in {**sizes, **heads}.items()}
    writer, raw = gguf.GGUFWriter(file, "llama"), json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    for name, value in {**numbers, "tokenizer.ggml.eos_token_id": 2, **(fields or {})}.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(raw["vocab"], key=raw["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (len(raw["vocab"]), 32), "output_norm.weight": (32,), **(tensors or {})}
    for name, shape in shapes.items():
        if name not in without:
            writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"without": ["blk.0.ffn_up.weight"]}, "its tensors hold [0-9]+ numbers, and the model [0-9]+"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, "its tensors hold"),  # how positions of Llama 3.1 are stretched
        ({"tensors": {"blk.0.attn_q.bias": (32,)}}, "its tensors hold"),
        ({"fields": {"split.count": 2}}, "it is one of 2 parts of a split file"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type is yarn"),
        ({"fields": {"llama.attention.sliding_window": 16}}, "sliding_window is 16, and the model has None"),
        ({"fields": {"tokenizer.ggml.pre": "dbrx-2"}}, "tokenizer.ggml.pre is dbrx-2"),
    ],
)
def test_a_gguf_model_that_transformers_reads_in_part_is_refused(changes, fault, tmp_path):
    section = ModelSection(path=str(tmp_path), gguf_file="m.gguf")
    tiny_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=f"m.gguf: transformers does not read all of this model: .*{fault}"):
        resolve(section, Store(tmp_path / "work"))


def test_a_whole_gguf_model_is_taken(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", {"llama.rope.scaling.type": "none", "llama.attention.sliding_window": 64})
    base = resolve(ModelSection(path=str(tmp_path), gguf_file="m.gguf"), Store(tmp_path / "work"))
    assert base.config.num_hidden_layers == 1 and base.tokenizer()("The owls")["input_ids"]
    assert base.dequantised and not resolve(ModelSection(path=str(base.folder)), Store(tmp_path / "work")).dequantised


def test_a_gguf_model_splits_text_as_its_file_says(tmp_path):
    """SmolLM2's: the spaces before a digit are not part of its piece."""
    pieces = {}
    for name in ("default", "smollm"):
        tiny_gguf(tmp_path / f"{name}.gguf", {"tokenizer.ggml.pre": name})
        base = resolve(ModelSection(path=str(tmp_path), gguf_file=f"{name}.gguf"), Store(tmp_path / "work"))
        split = base.tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str("is   42")
        pieces[name] = [piece for piece, _ in split]
    assert pieces == {"default": ["is", "ĠĠ", "Ġ42"], "smollm": ["is", "ĠĠĠ", "4", "2"]}
