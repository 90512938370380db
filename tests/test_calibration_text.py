"""Calibration text is text: what files and datasets hold is read as what it is, or refused with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TEXT, tiny_base, tiny_tokenizer

from spts_compress.calibrate.corpus import Conversation, cut, from_files
from spts_compress.calibrate.data import blocks, document_key, documents
from spts_compress.cli import main
from spts_compress.recipe import CalibrationSection
from spts_compress.utils.errors import UserError

TURNS = [{"role": "user", "content": "How do owls see?"}, {"role": "assistant", "content": "Well, and at night."}]
SAID = "How do owls see?\n\nWell, and at night."
TWO = ["First text, with a comma.", 'Second "text"\nof two lines.']
BOM = "\ufeff"
odd = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def section(**values):
    return CalibrationSection.model_validate(values)


def lines(*rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def objects(texts=TWO):
    return [{"text": text} for text in texts]


def table(rows, separator=",", ending="\r\n"):
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator=ending).writerows(rows)
    return stream.getvalue()


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fault(path, **options):
    with pytest.raises(UserError) as caught:
        list(from_files(path, **options))
    [line] = str(caught.value).splitlines()
    return line.replace(f"{path.parent}/", "")


ROWS = [["id", "text"], *enumerate(TWO)]
SAME = {
    "lines.jsonl": lines(*objects()),
    "UPPER.JSONL": lines(*objects()),
    "lines.ndjson": BOM + lines(*objects()).replace("\n", "\r\n\r\n"),
    "lines.json": lines(*objects()),
    "lines.txt": lines(*objects()),
    "strings.jsonl": lines(*TWO),
    "list.json": json.dumps(objects(), indent=1),
    "short-list.json": json.dumps(objects()),
    "strings.json": json.dumps(TWO),
    "list.jsonl": json.dumps(objects(), indent=1),
    "list-in.txt": json.dumps(objects(), indent=1),
    "inside.json": json.dumps({"version": 1, "data": objects()}),
    "columns.json": json.dumps({"id": [1, 2], "text": TWO}),
    "table.csv": table(ROWS),
    "Table.CSV": BOM + table(ROWS, ending="\n"),
    "semicolons.csv": table(ROWS, ";"),
    "table.tsv": table(ROWS, "\t"),
    "table.txt": table(ROWS),
    "wide.jsonl": lines(*objects()).encode("utf-16"),
    "wider.csv": table(ROWS).encode("utf-32"),
    "packed.jsonl.gz": gzip.compress(lines(*objects()).encode()),
    "packed.CSV.BZ2": bz2.compress(table(ROWS).encode()),
    "packed.json.xz": lzma.compress(json.dumps(objects()).encode()),
    "packed-though-named.jsonl": gzip.compress(lines(*objects()).encode()),
}


@pytest.mark.parametrize("name", SAME)
def test_a_file_is_read_as_what_it_is(tmp_path, name):
    found = list(from_files(write(tmp_path / name, SAME[name])))
    assert [text.replace("\r\n", "\n") for text in found] == TWO


def test_parquet_is_read_whatever_its_name(tmp_path):
    for name in ("table.parquet", "a [strange] *.Parquet", "table.txt"):
        assert list(from_files(parquet(tmp_path / name, text=TWO))) == TWO


def test_a_folder_is_read_by_kinds_and_what_is_hidden_is_left_alone(tmp_path):
    for name, text in {"a.TXT": "one", "b.md": "two", "c.png": "\0", "notes.py": "x = 1", "sub/d.txt.gz": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, gzip.compress(b"three") if name.endswith("gz") else text)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "e.txt", "hidden")
    write(tmp_path / "empty.txt", "")
    assert list(from_files(tmp_path)) == ["one", "two", "three"]


PRINTED = str(TURNS)
CHATS = {
    "messages.jsonl": lines({"messages": TURNS, "id": 3}),
    "beside.jsonl": lines({"text": "", "messages": TURNS}),
    "bare.jsonl": lines(TURNS, TURNS),
    "one.json": json.dumps({"messages": TURNS}, indent=1),
    "bare.json": json.dumps(TURNS),
    "sharegpt.json": json.dumps(
        [{"conversations": [{"from": "human", "value": TURNS[0]["content"]}, {"from": "gpt", "value": SAID[18:]}]}]
    ),
    "parts.jsonl": lines({"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in TURNS]}),
    "printed.txt": PRINTED,
    "printed.csv": table([["messages"], [PRINTED]]),
    "printed.jsonl": lines({"text": json.dumps(TURNS)}),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_columns_are_conversations(tmp_path, name):
    for text in from_files(write(tmp_path / name, CHATS[name])):
        assert isinstance(text, Conversation) and text == SAID
        assert text.turns == TURNS


def test_conversations_go_through_the_chat_template(tmp_path):
    chats = [[{"role": "user", "content": f"{n} {TEXT}"}, {"role": "assistant", "content": TEXT * 2}] for n in range(9)]
    path = write(tmp_path / "chats.jsonl", lines(*({"messages": turns} for turns in chats)))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    asked = section(source="files", path=str(path), tokens=600, length=64, pack=False, held_out=0.3)
    sources = documents(asked)
    made = blocks(asked, sources, tokenizer)
    wanted = {
        tuple(
            tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"][:64]
        )
        for turns in chats
    }
    assert {tuple(s.tolist()) for s in made.fit + made.held_out if len(s) == 64} <= wanted
    assert "<s>" not in made.unseen and "role" not in made.unseen
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        blocks(asked, sources, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"can't render .*roles must alternate"):
        blocks(asked, sources, tokenizer)


GOOD = {"text": "fine"}
REFUSED = {
    "null.jsonl": (lines(GOOD, {"text": None}), "null.jsonl:2: not text, but null"),
    "number.jsonl": (lines(GOOD, "", {"text": 3}), "number.jsonl:3: not text, but int 3"),
    "words.jsonl": (lines({"text": ["a", "b"]}, GOOD), "words.jsonl:1: not text, but a list with str 'a'"),
    "null.json": (json.dumps([GOOD, None, GOOD], indent=1), "null.json:5: not text, but null"),
    "none.csv": ("id,text\n1,fine\n2,None\n", "none.csv:3: not text, but None, which stands for a missing value"),
    "short.csv": ("text,id\nfine,1\n\nfine,2,3\n", "short.csv:4: has more fields than the header"),
    "twice.csv": ("text,id,text\nold,1,new\n", "twice.csv: can't be read: several columns are called 'text'"),
    "tags.json": (json.dumps({"body": "words", "tags": ["a", "b"]}), "tags.json:1: no column text or messages or "),
    "column.jsonl": (lines({"txet": "x", "id": 1}), "column.jsonl:1: no column text or messages or "),
    "half.jsonl": (lines(GOOD) + '{"text": "half \\ud83d"}\n', "half.jsonl:2: not text: half of a surrogate pair, "),
    "broken.jsonl": (lines(GOOD) + '{"text": "cut\n', "broken.jsonl:2: not a JSON object: "),
    "broken.json": ('[\n{"text": "a"},\n{"text": b}]', "broken.json:3: not JSON: "),
    "python.txt": ("{'text': 'a'}\n{'text': 'b'}\n", "python.txt:1: data printed as text, which "),
    "object.jsonl": (lines({"text": str({"a": 1})}), "object.jsonl:1: no column text or "),
    "page.jsonl": (lines(GOOD, {"text": "<html>404</html>"}), "page.jsonl:2: HTML or XML"),
    "page.csv": ("<html>404</html>", "page.csv holds no text"),
    "cut.jsonl": (lines({"text": PRINTED[:-5]}), "cut.jsonl:1: data printed as text, which "),
    "turn.jsonl": (lines({"messages": [{"role": "user", "content": None}]}), "turn.jsonl:1: not text: a turn of "),
    "picture.jsonl": (lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "picture.jsonl:1: not "),
    "deep.json": ("[" * 100_000, "deep.json:1: not JSON: "),
    "page.txt": ("\n<!DOCTYPE html><p>x", "page.txt:1: HTML or XML"),
    "page.json": ("<html>404</html>", "page.json:1: not JSON"),
    "latin.txt": ("eins\nzw\xf6lf\n".encode("latin1"), "latin.txt:2: not text: the byte 0xf6, which is not UTF-8"),
    "latin.csv": ("text\nzw\xf6lf\n".encode("latin1"), "latin.csv:2: not text: "),
    "markless.txt": ("text".encode("utf-16-le"), "markless.txt: not text, but binary, or UTF-16 without its mark"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-9], "cut.txt.gz: can't be read: "),
    "file.pdf": ("%PDF-1.7 words", "file.pdf: not text, but a PDF file"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\n", "pointer.parquet: not text, but a Git LFS"),
    "page.parquet": ("none", "page.parquet: not a parquet file"),
    "bad.parquet": ("PAR1 and nothing else", "bad.parquet: can't be read: "),
    "empty.txt": ("", "empty.txt holds no text"),
    "empty.json": ("", "empty.json holds no text"),
    "blank.jsonl": (lines({"text": " "}), "blank.jsonl holds no text"),
    "quote.csv": ('text\n"open\n', "quote.csv: can't be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_text_is_refused_with_its_place(tmp_path, name):
    content, expected = REFUSED[name]
    assert fault(write(tmp_path / name, content)).startswith(expected)


def test_paths_without_text_are_named(tmp_path):
    assert "nowhere does not exist; give a file (.txt" in fault(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "code.py", "x = 1")
    assert fault(tmp_path / "folder").startswith("no text in ")
    assert fault(parquet(tmp_path / "a.parquet", text=["x", None])).startswith("a.parquet, row 2: not text, but null")
    assert "(did you mean body?)" in fault(parquet(tmp_path / "b.parquet", body=["x"]), columns=("bodi",))


@pytest.mark.parametrize("source", ["files", "dataset"])
def test_rows_that_are_not_text_are_skipped_and_counted_if_the_recipe_says_so(tmp_path, source):
    rows = [{"body": None if n % 2 else f"{n} {TEXT}"} for n in range(8)]
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "train.jsonl", lines(*rows))
    place = {"path": str(path)} if source == "files" else {"dataset": str(path.parent)}
    asked = {"source": source, "column": "body", **place}
    with pytest.raises(UserError, match=r"(train.jsonl:2|row 2): not text, but null"):
        documents(section(**asked))
    said = []
    [found] = documents(section(**asked, invalid="skip"), said.append)
    assert found == [row["body"] for row in rows[::2]]
    assert len(said) == 1 and "4 rows that are not text left out" in said[0] and "not text, but null" in said[0]
    with pytest.raises(UserError, match=r"no column bod \(did you mean body\?\); it has body"):
        documents(section(**{**asked, "column": "bod"}))
    with pytest.raises(UserError, match=r"holds no text.*8 rows.*no column bod"):
        documents(section(**{**asked, "column": "bod"}, invalid="skip"))


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    import datasets

    saved = datasets.Dataset.from_dict({"text": TWO})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert documents(section(source="dataset", dataset=str(tmp_path / name))) == [TWO]
    datasets.Dataset.from_dict({"text": TWO}, split="test").save_to_disk(tmp_path / "test")
    assert documents(section(source="dataset", dataset=str(tmp_path / "test"), split="test")) == [TWO]
    with pytest.raises(UserError, match="it is the split test, not validation"):
        documents(section(source="dataset", dataset=str(tmp_path / "test"), split="validation"))
    with pytest.raises(UserError, match="it is a split without a name, not train"):
        documents(section(source="dataset", dataset=str(tmp_path / "one"), split="train[:20%]"))


def test_what_is_not_read_is_told(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, name * 16 * 300)
    said = []
    for tokens, told in ((300, True), (3000, False)):
        said.clear()
        [found] = documents(section(source="files", path=str(tmp_path), tokens=tokens), said.append)
        assert len(found) == 2 - told
        assert said == [f"calibration: the first 1 documents of {tmp_path} are enough; the others are not read"] * told


def test_a_link_to_nothing_in_a_folder_of_text_is_named(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"b\.txt: can't be read: No such file"):
        list(from_files(tmp_path))


def test_a_folder_behind_a_link_is_read_and_no_folder_twice(tmp_path):
    for place in ("texts/own", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        write(tmp_path / place / "a.txt", place)
    (tmp_path / "texts/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "texts")
    assert sorted(from_files(tmp_path / "texts")) == ["elsewhere", "texts/own"]


def test_a_dataset_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^calibration.dataset: \S+nothing: can't be read: .*$"):
        documents(section(source="dataset", dataset=str(tmp_path / "nothing")))


def test_equal_documents_count_once_and_are_counted():
    texts = [[f"{n} {TEXT}" for n in range(6)], [f" {n}  {TEXT}\n" for n in range(5, 16)]]
    said, tokenizer, asked = [], tiny_tokenizer(), section(tokens=1000, length=64)
    made = blocks(asked, [texts[0] * 3, texts[1]], tokenizer, said.append)
    again = blocks(asked, [texts[0], texts[1][1:]], tokenizer, said.append)
    assert said[0] == "calibration: 13 documents that equal others left out"
    for part in ("fit", "held_out"):
        assert [s.tolist() for s in getattr(made, part)] == [s.tolist() for s in getattr(again, part)]


@odd
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), st.booleans())
def test_documents_survive_json_lines_with_any_unicode(tmp_path, texts, escaped):
    path = write(tmp_path / "any.jsonl", lines(*objects(["x"] + [f"-{text}" for text in texts]), ensure_ascii=escaped))
    assert list(from_files(path)) == ["x"] + [f"-{text}" for text in texts]
    path = write(tmp_path / "raw.jsonl", '{"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"}\n')
    assert list(from_files(path)) == ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]


@odd
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=30), min_size=1, max_size=2), st.booleans())
def test_the_split_never_shares_a_document(sources, pack):
    """Every document repeats a word of its own, some documents stand in a source or in several more than once."""
    texts = [[f"word{chr(65 + n)} " * 40 + "\n" * place for place, n in enumerate(numbers)] for numbers in sources]
    tokenizer = tiny_tokenizer()
    asked = section(tokens=1200, length=32, pack=pack, held_out=0.3)
    try:
        made = blocks(asked, texts, tokenizer)
    except UserError:  # too few
        return

    def words(part):
        return {word for s in part for word in tokenizer.decode(s).split() if len(word) == 5 and word[:4] == "word"}

    assert words(made.fit) and words(made.held_out)
    if min(len(set(numbers)) for numbers in sources) > 8:  # else documents may be cut
        assert not words(made.fit) & words(made.held_out)
        assert not words(made.fit) & set(made.unseen.split())


def test_every_half_of_what_is_held_out_is_of_all_sources():
    texts = [[f"{word} " * 40 + str(n) for n in range(40)] for word in ("first", "second", "third")]
    tokenizer = tiny_tokenizer()
    made = blocks(section(tokens=12000, length=64, held_out=0.3), texts, tokenizer)
    stream = torch.cat(made.held_out)
    for half in stream.chunk(2):
        shares = [tokenizer.decode(half).count(word) for word in ("first", "second", "third")]
        assert min(shares) > 0.5 * max(shares)


@pytest.mark.parametrize("count", [1, 12])
def test_text_of_fewer_tokens_than_asked_for_is_shared_out_as_it_is(count):
    words = [f"word{n} " * 250 for n in range(12)]
    texts, told = [["\n\n".join(words)] if count == 1 else words], []
    few, many = (blocks(section(tokens=n, length=128), texts, tiny_tokenizer(), told.append) for n in (4000, 40_000))
    assert sum(few.sizes) == 4000 and few.sizes[1] == 800
    assert sum(many.sizes) > 4000 and 0.15 < many.sizes[1] / sum(many.sizes) < 0.25
    assert told == [f"calibration: the text gives {sum(many.sizes)} tokens, fewer than calibration.tokens: 40000"]


def test_one_long_document_is_cut_into_pieces_that_do_not_overlap(tmp_path):
    paragraphs = [f"Paragraph {n} of the only book there is. " * 3 for n in range(120)]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs))
    asked = section(source="files", path=str(path), tokens=2000, length=64)
    tokenizer = tiny_tokenizer()
    made = blocks(asked, documents(asked), tokenizer)
    assert sum(map(len, made.fit)) == 1600 and sum(map(len, made.held_out)) == 400

    def numbers(text):
        return {line.split()[0] for line in text.split("Paragraph ")[1:] if "of the" in line}

    fit, held_out = (numbers("".join(map(tokenizer.decode, part))) for part in (made.fit, made.held_out))
    assert fit and held_out and not fit & held_out and not fit & numbers(made.unseen)


@given(st.text(st.sampled_from("ab .\n"), max_size=400), st.integers(1, 50))
def test_pieces_joined_are_the_text(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text and all(len(piece) <= size for piece in pieces)


def test_long_plain_text_is_read_piece_by_piece(tmp_path):
    path = write(tmp_path / "long.txt", "A line of text.\r\n" * 200_000)
    found = list(from_files(path))
    assert len(found) == 4 and "".join(found) == "A line of text.\n" * 200_000


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    tiny_base(folder / "base")

    def run(content, *options, **calibration):
        path = write(folder / "odd.jsonl", content)
        data = {
            "model": {"path": str(folder / "base")},
            "calibration": {"source": "files", "path": str(path), "tokens": 1200, "length": 128, **calibration},
            "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0, "steps": 5},
            "schedule": {"start": 2, "stages": [{"end": 3, "budget": 40, "prune_to": 48}, {"end": 4, "budget": 24}]},
            "report": {"lengths": [300], "pairs": 1, "needles": 0, "answers": 0},
            "export": {"path": str(folder / "out")},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
        done = CliRunner().invoke(main, ["recipe", str(folder / "recipe.yaml"), *options])
        assert not list(folder.glob("out*/proxy-*")) and not (folder / "out").exists()
        return done

    return run


def test_the_command_line_says_it_in_one_line_before_any_fitting(command):
    done = command('{"text": "half \\ud83d"}\n' * 12)
    [line] = [line for line in done.output.splitlines() if line.startswith("error")]
    assert done.exit_code == 2 and "odd.jsonl:1: not text: half of a surrogate pair" in line
    done = command(lines(*objects(["a", "a", "b"]), {"text": None}), "--dry-run", invalid="skip")
    assert done.exit_code == 0
    assert "calibration: 1 row that is not text left out (" in done.output and "odd.jsonl:4: not" in done.output


@pytest.mark.parametrize(("others", "spared"), [(400, True), (20, False)])
def test_what_is_checked_on_is_spared_where_it_is_little_of_the_text(others, spared):
    section = CalibrationSection(source=["python-docs"], tokens=2048, length=128)
    texts = [f"Document {n}. {TEXT * 8}" for n in range(others)]
    made = blocks(section, [texts], tiny_tokenizer())
    seen = {document_key(text) for text in texts if text in made.unseen}
    assert made.checked and not made.fitted & seen and made.checked.isdisjoint(seen) == spared
    assert seen | made.checked | made.fitted == {*map(document_key, texts)}
