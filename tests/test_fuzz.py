"""Malformed recipes, bases, calibration files and command lines: exit 2, a line for each fault, nothing left behind."""

import copy
import gzip
import json
import lzma
import shutil

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TEXT, tiny_base
from tiny_checkpoint import BLOCK, tiny_checkpoint

from spts_compress.cli import main

RECIPE = {
    "model": {"path": "base", "dtype": "bfloat16"},
    "calibration": {"source": "files", "path": "text.jsonl", "tokens": 1200, "length": 128, "held_out": 0.2},
    "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0, "steps": 5, "saliency_quantile": 0.2},
    "schedule": {
        "start": 2,
        "stages": [{"end": 3, "budget": {"fraction": 0.5, "floor": 20}, "prune_to": 48}, {"end": 4, "budget": 24}],
        "probe": {"window_size": 2, "heads": {2: [0, 1]}, "score_carry": 0.5, "kernel_size": 3},
        "sink_tokens": 1,
        "recent_tokens": 2,
        "ffn_selection": "relative",
    },
    "report": {"lengths": [300], "pairs": 1, "needles": 0, "answers": 0},
    "export": {"path": "out", "break_even": False},
}
SEARCH = {
    "speedup": 1.5,
    "lengths": [512],
    "kinds": ["free"],
    "prompts": 1,
    "starts": [2],
    "candidates": 4,
    "choices": {"window_size": [2], "heads": ["mean"], "kernel_size": [3]},
}
BAD = [
    None,
    -1,
    0,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    True,
    "",
    "x",
    "~nobody-of-that-name/x",
    [],
    [[]],
    {},
    {"x": 1},
]


def places(data, path=()):
    """The path of every value in nested data, the inner ones too."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutations(section):
    """A whole recipe, and paths of values of one of its sections with what to put there: half of `BAD` in turn."""
    without_schedule = {key: value for key, value in RECIPE.items() if key != "schedule"}
    whole = {**without_schedule, "search": SEARCH} if section == "search" else RECIPE
    inner = [path for path in places(whole) if path[0] == section]
    return whole, [(path, bad) for number, path in enumerate(inner) for bad in (*BAD[number % 2 :: 2], ...)]


def changed(data, path, change):
    """A copy of the data with the value at `path` replaced, or gone if `change` is `...`."""
    made = copy.deepcopy(data)
    place = made
    for key in path[:-1]:
        place = place[key]
    if change is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = change
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_base(folder / "base")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{n}. " + TEXT * 6}) + "\n" for n in range(12)))
    return folder


def outcome(folder, monkeypatch, *arguments):
    """Exit code and output of a command in `folder`; nothing but lines that begin with "error: " may come with 2, and
    no file may be left."""
    monkeypatch.chdir(folder)
    for left in folder.glob("out*"):
        shutil.rmtree(left)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    said = f"{arguments}: {done.output} {done.exception!r}"
    assert done.exit_code in (0, 2), said
    if done.exit_code == 2:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("computing on")]
        assert lines and all(line.startswith("error: ") for line in lines), said
    assert sorted(folder.rglob("*")) == before, said
    return done.exit_code, done.output


@pytest.mark.parametrize("section", [*RECIPE, "search"])
def test_every_value_of_a_recipe_replaced_by_what_it_can_not_be(folder, monkeypatch, section):
    refused = 0
    path = folder / "recipe.yaml"
    path.touch()
    whole, tried = mutations(section)
    for place, bad in tried:
        path.write_text(yaml.safe_dump(changed(whole, place, bad)))
        refused += outcome(folder, monkeypatch, "recipe", path, "--dry-run")[0] == 2
    assert refused > len(tried) / 3  # some of them are fine for some values: 0 tokens to keep, no cap


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "just words",
        "a: [1, 2",
        "model: {path: {{MODEL}}}",
        "? [1]\n: 2",
        "model: !!python/object/apply:os.system [ls]",
        "model: &a {path: *a}",
        "model: &a [*a]",
        "[" * 2000,
        "a: 1\na: 2",
        "\x00",
        "model: 2026-01-01",
        "1: 2",
        "null: {}",
    ],
)
def test_files_that_are_no_recipes(folder, monkeypatch, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    assert outcome(folder, monkeypatch, "recipe", path, "--dry-run")[0] == 2


def test_a_recipe_in_another_encoding(folder, monkeypatch):
    path = folder / "recipe.yaml"
    path.write_bytes("model: {path: \xe4}".encode("latin-1"))
    assert outcome(folder, monkeypatch, "recipe", path, "--dry-run")[0] == 2


WORDS = """
init recipe inspect sweep evaluate ablate bench verify strip push quickstart.yaml base . / .. out ~ -h --help --set
--output --work --force --dry-run --device auto cuda:7 meta --suite ruler --lengths 1,2 --items --batch 0 -1 --task vt =
a.b=c model.path=base schedule.stages.9.end=1 schedule.stages=[] user/name --revision --vary rank --layers 1,x --text
a=b --dtype float64 --pairs --new-tokens --rescore --certify --
"""
ARGUMENTS = st.one_of(
    st.sampled_from(WORDS.split()),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ARGUMENTS, min_size=1, max_size=6))
def test_any_words_as_a_command_line(folder, monkeypatch, words):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    if "recipe" in words and "--dry-run" not in words:  # a real run is for other tests
        words = [*words, "--dry-run"]
    outcome(folder, monkeypatch, *words)


EDITS = [
    "x", "=", "a=", ".=1", "model.=1", "model..path=x", "schedule.stages.7.end=1", "schedule.stages.x=1",
    "schedule.stages.²=1", "model.path.x=1", "schedule={", "schedule=[]", "search={}", "export=",
    "schedule.stages.0.budget=-3", "schedule.start=99", "schedule.start=0", "schedule.probe.heads={9: [0]}",
    "schedule.probe.heads={2: [99]}", "schedule.probe.kernel_size=2", "model.dtype=float8", "proxy.rank=4000",
    "calibration.path=nowhere", "calibration.source=dataset", "calibration.dataset=a/b", "model.gguf_file=x.gguf",
    "model.package=no_such_package", "report.lengths=[99999999]", "export.push_to_hub=x", "model.revision={}",
    "report.text=nowhere", "calibration.path=base",
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edits_that_make_no_recipe(folder, monkeypatch, edit):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert outcome(folder, monkeypatch, "recipe", "recipe.yaml", "--set", edit, "--dry-run")[0] == 2


def edit(name, **values):
    """Change keys of a JSON file of the base; a value of `...` takes the key out."""

    def change(base):
        data = {**json.loads((base / name).read_text()), **values}
        (base / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return change


def put(name, content):
    """Write a file of the base."""
    return lambda base: (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(name):
    return lambda base: (base / name).unlink()


def index(content):
    """An index, and no file of the plain name, which would hide it."""

    def change(base):
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        (base / "model.safetensors.index.json").write_text(content)

    return change


def tensors(change):
    """Change the base's tensors by name."""

    def changed_file(base):
        path = base / "model.safetensors"
        made = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, path, {"format": "pt"})

    return changed_file


NORM, UP = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"
BASES = {
    "no config": without("config.json"),
    "config cut short": put("config.json", '{"model_type": "lla'),
    "config is a list": put("config.json", "[]"),
    "config is text": put("config.json", '"llama"'),
    "config is not UTF-8": put("config.json", b"\xff\xfe\x00"),
    "no model type": edit("config.json", model_type=...),
    "model type is a number": edit("config.json", model_type=3),
    "unknown family": edit("config.json", model_type="mamba"),
    "hidden size is text": edit("config.json", hidden_size="big"),
    "hidden size is negative": edit("config.json", hidden_size=-32),
    "hidden size is another": edit("config.json", hidden_size=64),
    "no layers": edit("config.json", num_hidden_layers=0),
    "more layers": edit("config.json", num_hidden_layers=9),
    "fewer layers": edit("config.json", num_hidden_layers=4),
    "no heads": edit("config.json", num_attention_heads=0),
    "heads that do not divide": edit("config.json", num_attention_heads=5, head_dim=...),
    "key heads that do not divide": edit("config.json", num_key_value_heads=3),
    "another vocabulary": edit("config.json", vocab_size=100),
    "unknown activation": edit("config.json", hidden_act="no_such_act"),
    "unknown rotary type": edit("config.json", rope_parameters={"rope_type": "no_such_rope", "rope_theta": 1.0}),
    "quantised": edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "unknown quantisation": edit("config.json", quantization_config={"quant_method": "no_such"}),
    "no weights": without("model.safetensors"),
    "empty weights": put("model.safetensors", b""),
    "weights are text": put("model.safetensors", "not weights at all"),
    "weights cut short": lambda base: put("model.safetensors", (base / "model.safetensors").read_bytes()[:-1000])(base),
    "weights with a huge header": put("model.safetensors", b"\xff" * 64),
    "a tensor missing": tensors(lambda made: {name: made[name] for name in made if name != UP}),
    "a tensor too many": tensors(lambda made: {**made, "model.layers.3.mlp.more.weight": made[NORM].clone()}),
    "a tensor of another shape": tensors(lambda made: {**made, UP: made[UP][:-1]}),
    "a tensor of whole numbers": tensors(lambda made: {**made, UP: made[UP].int()}),
    "a tensor that is not finite": tensors(lambda made: {**made, NORM: made[NORM] * float("nan")}),
    "no tensors": tensors(lambda made: {NORM: made[NORM]}),
    "index cut short": index('{"weight_map"'),
    "index without a map": index("{}"),
    "index is a list": index("[]"),
    "index of a file that is gone": index('{"weight_map": {"a": "gone.safetensors"}}'),
    "index out of the folder": index('{"weight_map": {"a": "../x.safetensors"}}'),
    "index of a number": index('{"weight_map": {"a": 3}}'),
    "no tokenizer": lambda base: [path.unlink() for path in base.glob("tokenizer*")],
    "tokenizer cut short": put("tokenizer.json", '{"version": "1.0"'),
    "tokenizer is text": put("tokenizer.json", "words"),
    "tokenizer of code that is gone": edit(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_gone.Gone", None]}, tokenizer_class="Gone"
    ),
    "tokenizer configuration is a list": put("tokenizer_config.json", "[]"),
    "generation configuration cut short": put("generation_config.json", '{"do_sample"'),
    "generation configuration is a list": put("generation_config.json", "[]"),
    "an adapter": put("adapter_config.json", '{"peft_type": "LORA"}'),
    "weights of PyTorch alone": lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_are_broken(folder, monkeypatch, tmp_path, name):
    shutil.copytree(folder / "base", tmp_path, dirs_exist_ok=True)
    BASES[name](tmp_path)
    data = changed(RECIPE, ("model", "path"), str(tmp_path))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    code, said = outcome(folder, monkeypatch, "recipe", "recipe.yaml", "--device", "cpu")
    assert code == 2, said


LINE = json.dumps({"text": TEXT * 6})
TEXTS = {
    "empty.txt": "",
    "blank.txt": " \n\n ",
    "bytes.txt": bytes(range(256)) * 40,
    "utf16-without-mark.txt": (TEXT * 40).encode("utf-16-le"),
    "nulls.txt": "\0" * 4000,
    "empty.jsonl": "",
    "cut.jsonl": LINE + "\n" + LINE[:-5],
    "null.jsonl": LINE + '\n{"text": null}\n',
    "number.jsonl": LINE + '\n{"text": 3}\n',
    "list.jsonl": LINE + '\n{"text": ["a"]}\n',
    "object.jsonl": LINE + '\n{"text": {"a": 1}}\n',
    "no-text.jsonl": LINE + '\n{"txt": "a"}\n',
    "plain-string.jsonl": '3\n"a"\n',
    "surrogate.jsonl": '{"text": "\\ud83d"}\n' * 12,
    "not-utf8.jsonl": b'{"text": "\xff"}\n',
    "words.jsonl": "just words\n",
    "cut.json": "[" + LINE,
    "null.json": "[null]",
    "number.json": "3",
    "no-text.json": '[{"txt": "a"}]',
    "empty.json": "",
    "no-column.csv": "a,b\n1,2\n",
    "empty.csv": "",
    "bytes.parquet": b"PAR1 no parquet",
    "empty.parquet": b"",
    "bytes.gz": b"\x1f\x8b no gzip",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "page.html": "<html><body><p>" + TEXT * 40 + "</p></body></html>",
    "short.txt": "A few words.",
    "deep.json": "[" * 100_000,
    "open-quote.csv": 'text\n"open\n',
    "more-fields.csv": "text,id\nfine,1\nfine,2,3\n",
    "none.csv": "id,text\n1,None\n",
    "cut.txt.gz": gzip.compress(TEXT.encode() * 99)[:-9],
    "cut.json.xz": lzma.compress(json.dumps([TEXT] * 99).encode())[:-9],
    "bytes.bz2": b"BZh91AY&SY no bzip2",
    "cut-utf16.txt": (TEXT * 40).encode("utf-16")[:-1],
    "file.pdf": b"%PDF-1.7 words",
    "archive.zip": b"PK\x03\x04 words",
    "pointer.jsonl": "version https://git-lfs.github.com/spec/v1\n",
    "turn.jsonl": '{"messages": [{"role": "user", "content": null}]}\n',
    "turns.jsonl": '{"messages": ["hello"]}\n',
    "printed.txt": "{'text': 'a'}\n{'text': 'b'}\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_hold_no_text(folder, monkeypatch, tmp_path, name):
    put(name, TEXTS[name])(tmp_path)
    data = changed(RECIPE, ("calibration", "path"), str(tmp_path / name))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    code, said = outcome(folder, monkeypatch, "recipe", "recipe.yaml", "--device", "cpu")
    assert code == 2, said
    assert name in said or "calibration" in said


MANIFEST, SPTS_INDEX = "spts_files.json", "model.safetensors.index.json"
EXPORTS = {
    "no manifest": without(MANIFEST),
    "manifest cut short": put(MANIFEST, '{"sha256"'),
    "manifest is a list": put(MANIFEST, "[]"),
    "manifest without hashes": edit(MANIFEST, sha256=...),
    "manifest with a list of hashes": edit(MANIFEST, sha256=["config.json"]),
    "manifest with no hash": edit(MANIFEST, sha256={}),
    "manifest with a name outside": edit(MANIFEST, sha256={"../x": "0"}),
    "manifest without the base's names": edit(MANIFEST, base=...),
    "manifest with a list of names": edit(MANIFEST, base=["config.json"]),
    "manifest with a number for a name": edit(MANIFEST, base={"config.json": 3}),
    "no config": without("config.json"),
    "config cut short": put("config.json", '{"model_type": "spts_lla'),
    "config is a list": put("config.json", "[]"),
    "config is nested too deeply": put("config.json", "[" * 100_000),
    "no spts block": edit("config.json", spts=...),
    "spts block is a list": edit("config.json", spts=[]),
    "spts block is empty": edit("config.json", spts={}),
    "spts block with an unknown key": edit("config.json", spts={**BLOCK, "more": 1}),
    "spts block of text": edit("config.json", spts={**BLOCK, "start": "one"}),
    "spts block beyond the model": edit("config.json", spts={**BLOCK, "start": 99}),
    "spts block without stages": edit("config.json", spts={**BLOCK, "stages": []}),
    "unknown model type": edit("config.json", model_type="spts_mamba"),
    "model type is a list": edit("config.json", model_type=["spts_llama"]),
    "other code": edit("config.json", auto_map={"AutoConfig": "other.Config"}),
    "another width": edit("config.json", hidden_size=64),
    "width is text": edit("config.json", hidden_size="wide"),
    "no weights": without("base_model.safetensors"),
    "weights cut short": lambda out: put("base_model.safetensors", (out / "base_model.safetensors").read_bytes()[:-9])(
        out
    ),
    "no proxies": without("spts-proxies.safetensors"),
    "proxies are text": put("spts-proxies.safetensors", "no proxies"),
    "no index": without(SPTS_INDEX),
    "index is a list": put(SPTS_INDEX, "[]"),
    "index out of the folder": put(SPTS_INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
    "code changed": put("configuration_spts.py", "print('other')"),
    "no code": without("modeling_spts_llama.py"),
    "a file more": put("more.model", "words"),
    "a link to nothing": lambda out: (out / "link").symlink_to("nowhere"),
}


@pytest.fixture(scope="module")
def whole_export(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("name", EXPORTS)
def test_checkpoints_that_are_broken(folder, whole_export, monkeypatch, tmp_path, name):
    shutil.copytree(whole_export, tmp_path, dirs_exist_ok=True)
    EXPORTS[name](tmp_path)
    assert outcome(folder, monkeypatch, "verify", tmp_path)[0] == 2
    assert outcome(folder, monkeypatch, "strip", tmp_path, "--output", "out")[0] == 2
    outcome(folder, monkeypatch, "inspect", tmp_path)


def test_they_are_many():
    """Distinct malformed inputs; of each value's mutations as many as the file has time for."""
    recipes = {repr((section, each)) for section in [*RECIPE, "search"] for each in mutations(section)[1]}
    assert len(recipes) > 400 and len(recipes) + len(EDITS) + len(BASES) + len(TEXTS) + len(EXPORTS) > 600
