"""What of a base travels into the export, under which names, and how it is given back."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from spts_compress.calibrate.base_model import resolve, resolve_config
from spts_compress.checkpoint import families
from spts_compress.checkpoint.layout import exported, travelling, weight_files
from spts_compress.export import fresh, write
from spts_compress.export import strip as stripping
from spts_compress.export.verify import verify, write_manifest
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import ModelSection
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store

SPTS = {"start": 2, "stages": [{"end": 4, "budget": 24}], "proxy": {"channels": 12, "rank": 4}}
SCHEDULE = Schedule.from_dict(SPTS, 5)
# A tokenizer of its own code: it imports a sibling, which imports another, and reads a file of an odd name.
CODE = """
from transformers import PreTrainedTokenizer
from .ours_words import read


class OursTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "ours.words"}

    def __init__(self, vocab_file, **kwargs):
        self.words = read(vocab_file)
        self.back = {number: word for word, number in self.words.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, 3)

    def _convert_id_to_token(self, index):
        return self.back.get(index, "?")
"""
GENERATE = "def generate(model, *args, **kwargs):\n    return 'custom'\n"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def own_code(folder, reads="ours.words", **config):
    (folder / "tokenization_ours.py").write_text(CODE.replace("ours.words", reads))
    (folder / "ours_words.py").write_text("from .ours_more import json\n\ndef read(f): return json.load(open(f))\n")
    (folder / "ours_more.py").write_text("import json\n")
    (folder / reads).parent.mkdir(exist_ok=True)
    (folder / reads).write_text(json.dumps({chr(32 + n): n + 3 for n in range(95)}))
    (folder / "tokenizer.json").unlink()
    auto_map = {"AutoTokenizer": ["tokenization_ours.OursTokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OursTokenizer", auto_map=auto_map, **config)


def found(folder, trusted=False):
    return resolve(ModelSection(path=str(folder), trust_remote_code=trusted), Store(folder.parent / "work"))


def exporting(base, folder):
    """A checkpoint with random proxies in `folder`."""
    cls = families.model_class(base.family)
    settings = {key: value for key, value in base.config.to_dict().items() if key != "model_type"}
    model = cls(cls.config_class(**settings, spts=SPTS)).to(torch.bfloat16)
    folder.mkdir()
    proxies = {name: value for name, value in model.state_dict().items() if ".proxy." in name}
    carried = write.carry(base)
    write.write(base, carried, SCHEDULE, proxies, folder)
    write_manifest(folder, carried.names)
    return carried


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A base with much that is easily lost or in the way, and its checkpoint."""
    folder = tmp_path_factory.mktemp("rich")
    base = tiny_base(folder / "base", tie_word_embeddings=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "TOOLS {{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(base)
    own_code(base)
    (base / "generation_config.json").unlink()
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(GENERATE)
    (base / "LICENSES").mkdir()
    (base / "LICENSES" / "MIT.txt").write_text("free")
    for name in (
        "README.md",
        "recipe.yaml",
        "spts_files.json",
        "cache.py",
        "configuration_spts.py",
        "base_config.json",
    ):
        (base / name).write_text(f"the base's own {name}")
    for name in ("vocab.bpe", "spiece.model", "preprocessor_config.json", "chat_template.json", "tekken.spm"):
        (base / name).write_text("{}")
    kept = contents(base)
    for name in ("pytorch_model.bin", "original/consolidated.pth", "runs/notes.txt", ".git/config", "optimizer.pt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("not needed")
    resolved = found(base, trusted=True)
    carried = exporting(resolved, folder / "out")
    return resolved, carried, folder / "out", kept


def test_a_fresh_process_finds_all_that_the_base_had(rich):
    base, carried, out, _ = rich
    (out / "README.md").write_text("the card")
    assert verify(out) == []
    write.check(out, base, carried, SCHEDULE, "bfloat16")
    tokenizers = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in (base.folder, out)]
    assert tokenizers[0]("Some text, with <s> in it").input_ids == tokenizers[1]("Some text, with <s> in it").input_ids
    assert tokenizers[1].chat_template == tokenizers[0].chat_template and len(tokenizers[1].chat_template) == 2
    assert (out / "base_custom_generate" / "generate.py").read_text() == GENERATE
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.is_tensor(model.generate(torch.tensor([[1, 5]]), max_new_tokens=1))  # by the checkpoint's own code


def test_strip_gives_back_what_stood_in_the_way_of_the_exports_own_files(rich, tmp_path):
    _, _, out, kept = rich
    assert set(stripping.strip(out, tmp_path / "stock")) == kept.keys()
    assert contents(tmp_path / "stock") == kept


def test_whatever_differs_from_the_base_is_named(rich, tmp_path):
    base, carried, out, _ = rich
    tensors, facts = write.expected(out, base, carried, SCHEDULE, "bfloat16")
    save_file(tensors, tmp_path / "tensors.safetensors")

    def faults(change):
        folder = shutil.copytree(out, tmp_path / "changed")
        change(folder)
        told = fresh.main(folder, tmp_path / "tensors.safetensors", json.loads(json.dumps(facts)))
        shutil.rmtree(folder)
        return "; ".join(told)

    assert faults(lambda folder: (folder / "recipe.yaml").write_text("decides nothing")) == ""
    words = {chr(32 + n): (n + 1) % 95 + 3 for n in range(95)}

    def change_many(folder):
        (folder / "ours.words").write_text(json.dumps(words))
        (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
        edit(folder / "tokenizer_config.json", padding_side="right", model_max_length=7, pad_token="<s>")
        edit(folder / "config.json", use_cache=False)
        (folder / "generation_config.json").write_text('{"temperature": 0.3}')

    told = faults(change_many)
    for fact in ("token ids", "vocabulary", "chat templates", "rendered chats", "special tokens", "model_max_length"):
        assert f"tokenizer: {fact} not the base's" in told
    assert "config: use_cache is not the base's" in told and "generation: temperature is not the base's" in told


def test_verify_covers_files_in_subfolders_and_of_any_name(rich, tmp_path):
    out = shutil.copytree(rich[2], tmp_path / "copy")
    for name, what in (("ours.words", "changed"), ("additional_chat_templates/tool_use.jinja", "changed")):
        before = (out / name).read_text()
        (out / name).write_text("other")
        assert verify(out) == [f"{name}: {what} since it was exported"]
        (out / name).write_text(before)
    for name in ("additional_chat_templates/more.jinja", "tiktoken.model", "vocab.txt"):
        (out / name).write_text("more")
        assert verify(out) == [f"{name}: not among the exported files; remove it if it is yours"]
        (out / name).unlink()
    (out / "linked").symlink_to(tmp_path)
    assert verify(out) == ["linked: not among the exported files; remove it if it is yours"]
    (out / "linked").unlink()
    for name in ("notes.md", "evaluation.json", "answers.jsonl", ".gitattributes"):
        (out / name).write_text("{}")
    assert verify(out) == []
    manifest = json.loads((out / "spts_files.json").read_text())
    edit(out / "spts_files.json", base={**manifest["base"], "ours.words": "../ours.words", "elsewhere": "x"})
    assert verify(out) == [
        "spts_files.json: ../ours.words points outside the base's folder",
        "spts_files.json: elsewhere, a file of the base, is not among the exported files",
    ]
    with pytest.raises(UserError, match="points outside"):
        stripping.strip(out, tmp_path / "stock")
    edit(out / "spts_files.json", base={k: v for k, v in manifest["base"].items() if not k.endswith(".safetensors")})
    assert verify(out) == ["spts_files.json: does not say what the base calls base_model.safetensors"]
    edit(out / "spts_files.json", base={})
    assert verify(out) == [
        "spts_files.json: does not say what the base calls base_model.safetensors",
        "spts_files.json: does not say what the base's files are called",
    ]


def test_verify_names_code_that_is_not_this_packages(rich, tmp_path):
    out = shutil.copytree(rich[2], tmp_path / "copy")
    edit(out / "config.json", auto_map={"AutoConfig": "base_spts.Config"})
    assert "config.json: auto_map names other code than that of spts-compress" in verify(out)


def rewritten(folder, name, names):
    """Put the weights of `folder` into files called `names`, with an index called `name` unless that is None."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[n :: len(names)]) for n in range(len(names))]
    for file, part in zip(names, parts, strict=True):
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(part, folder / file, {"format": "pt"})
    if name is not None:
        weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


INDEX = "model.safetensors.index.json"
LAYOUTS = {
    "one file": (None, ["model.safetensors"], {}),
    "one shard with an index": (INDEX, ["model-00001-of-00001.safetensors"], {}),
    "shards": (INDEX, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], {}),
    "odd names": (INDEX, ["base.safetensors", "spts-proxies.safetensors", "weights.bin.safetensors"], {}),
    "shards in a subfolder": (INDEX, ["shards/a.safetensors", "shards/b.safetensors", "shards_a.safetensors"], {}),
    "a file that the config names": (None, ["odd.safetensors"], {"transformers_weights": "odd.safetensors"}),
    "an index that the config names": ("i.safetensors.index.json", ["a.safetensors", "b.safetensors"], {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strip_gives_back_every_layout_that_transformers_loads(layout, tmp_path):
    index, names, config = LAYOUTS[layout]
    folder = tiny_base(tmp_path / "base", num_hidden_layers=5, tie_word_embeddings=False)
    if index not in (None, INDEX):
        config = {"transformers_weights": index}
    edit(folder / "config.json", **config)
    rewritten(folder, index, names)
    exporting(found(folder), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    stripping.strip(tmp_path / "out", tmp_path / "stock")
    assert contents(tmp_path / "stock") == contents(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for other in ("stock", "out"):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / other, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values())
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_plain_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder = tiny_base(tmp_path / "base")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "gone.safetensors"}}))
    assert weight_files(folder) == ["model.safetensors"]
    assert found(folder).weights.keys() == {"model.safetensors"}
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text("[]")
    with pytest.raises(UserError, match="not a JSON object with a weight_map"):
        weight_files(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(UserError, match="points outside the folder"):
        weight_files(folder)


def dangling(folder):
    (folder / "LICENSE").symlink_to(folder / "gone")


def fifo(folder):
    os.mkfifo(folder / "vocab.pipe")


def other_repository(folder):
    ref = "org/tokens--tokenization_ours.OursTokenizer"
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, ref]})


def file_of_this_machine(folder):
    (folder.parent / "words.txt").write_text("words")
    own_code(folder, dictionary=str(folder.parent / "words.txt"))


def reads_a_subfolder(folder):
    own_code(folder)
    (folder / "sub").mkdir()
    (folder / "ours.words").rename(folder / "sub" / "ours.words")
    (folder / "ours.words").write_text("{}")
    code = (
        'import json, os\n\ndef read(f): return json.load(open(os.path.join(os.path.dirname(f), "sub/ours.words")))\n'
    )
    (folder / "ours_words.py").write_text(code)


@pytest.mark.parametrize(
    "change, message",
    [
        (dangling, "LICENSE: a link to .*gone, which is not there; mend or remove it"),
        (fifo, "vocab.pipe: not a readable file"),
        (file_of_this_machine, "tokenizer_config.json: dictionary is .*words.txt, a file that can't travel"),
        (reads_a_subfolder, "it does not load: .*files and folders that don't travel: .*sub"),
    ],
)
def test_what_cannot_travel_is_refused_before_any_work(change, message, tmp_path):
    folder = tiny_base(tmp_path / "base")
    change(folder)
    with pytest.raises(UserError, match=message):
        write.carry(found(folder, trusted=True))


def test_a_tokenizers_code_in_another_repository_is_refused(tmp_path, monkeypatch):
    folder = tiny_base(tmp_path / "base")
    base = found(folder, trusted=True)
    tokenizer = base.tokenizer()
    other_repository(folder)
    monkeypatch.setattr(type(base), "tokenizer", lambda self: tokenizer)  # as if it had been downloaded
    with pytest.raises(UserError, match="code is in another repository, org/tokens, so it can't travel"):
        write.carry(base)


def test_a_vocabulary_that_the_tokenizer_names_travels_whatever_its_name(tmp_path):
    folder = tiny_base(tmp_path / "base")
    own_code(folder, reads="words/vocab.bin")
    base = found(folder, trusted=True)
    assert write.carry(base).names["words/vocab.bin"] == "words/vocab.bin"
    before = base.key
    (folder / "words/vocab.bin").write_text((folder / "words/vocab.bin").read_text() + " ")
    assert base.key == before != base.key_now() == found(folder, trusted=True).key


def test_code_that_the_recipe_does_not_trust_is_not_run_by_those_who_trust_the_export(tmp_path):
    folder = tiny_base(tmp_path / "base")
    (folder / "tokenization_bad.py").write_text("raise RuntimeError('ran')\n")
    auto_map = {"AutoTokenizer": [None, "tokenization_bad.BadTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map=auto_map)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(GENERATE)
    exporting(found(folder), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.is_tensor(model.generate(torch.tensor([[1, 5]]), max_new_tokens=1))
    stripping.strip(tmp_path / "out", tmp_path / "stock")
    assert contents(tmp_path / "stock") == contents(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("stated", [None, "LlamaTokenizer", "Qwen2Tokenizer"])
def test_the_exports_model_type_does_not_change_the_tokenizer(family, stated, tmp_path):
    folder = tiny_base(tmp_path / "base", family, vocab_size=320)  # some classes add tokens of their own
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": stated} if stated else {}))
    base = found(folder)
    exporting(base, tmp_path / "out")
    expected = fresh.tokenizer_facts(base.tokenizer())
    for trust in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert fresh.tokenizer_facts(tokenizer) == expected
    stripping.strip(tmp_path / "out", tmp_path / "stock")
    assert contents(tmp_path / "stock") == contents(folder)


def test_names_stay_apart():
    names = [
        "config.json",
        "base_config.json",
        "base_base_config.json",
        "a/b.safetensors",
        "a_b.safetensors",
        "x/y.txt",
    ]
    given = exported(names)
    assert len(set(given.values())) == len(names) and given.keys() == set(names)
    assert given["base_config.json"] == "base_config.json" and given["x/y.txt"] == "x/y.txt"
    assert given["config.json"] == "base_base_base_config.json" and given["a/b.safetensors"] == "base_a_b.safetensors"


def test_the_hub_is_asked_for_what_travels(rich, monkeypatch):
    base, _, _, kept = rich
    there = [*contents(base.folder), "consolidated.safetensors", "int8/model.safetensors", "onnx/model.onnx"]
    asked = []

    def download(repository, revision, **patterns):
        asked.append((revision, set(filter_repo_objects(there, **patterns))))
        return str(base.folder)

    monkeypatch.setattr("spts_compress.calibrate.base_model.snapshot_download", download)
    section = ModelSection(path="org/model", revision="v1", trust_remote_code=True)
    resolve_config(section)
    resolve(section, Store(base.folder.parent / "work"))
    assert [revision for revision, _ in asked] == ["v1", "v1", base.folder.name]  # the weights of that very commit
    assert asked[0][1] == asked[1][1] == kept.keys() - {"model.safetensors"} | {"runs/notes.txt"}
    assert asked[2][1] == {"model.safetensors"}


def test_every_family_names_its_code():
    for family in FAMILIES:
        assert all(path.is_file() for path in families.code_files(family))
        modules = {path.stem for path in families.code_files(family)}
        named = families.exported_config({"model_type": family})["auto_map"]
        assert {value.split(".")[0] for value in named.values()} <= modules


def test_other_models_data_and_notes_in_the_folder_stay_behind(tmp_path):
    folder = tiny_base(tmp_path / "base")
    wanted = sorted(contents(folder))
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/config.json", "data/train.txt", ".env", "train.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert travelling(folder, ["model.safetensors"]) == wanted
