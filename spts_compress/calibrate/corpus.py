"""Documents from files, each read as what it is: plain text, JSON, JSON lines, CSV or parquet, packed or not.

A reader gives rows: where each is (file and line) and what stands there, or the `ValueError` that says why it can't be
told. `as_text` makes a document of a row, and never of a thing that only looks like text when printed.
"""

import ast
import bz2
import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.errors import UserError

PROSE, LINES, JSON, TABLES = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
KINDS = (*PROSE, *LINES, *JSON, *TABLES, ".parquet")
COLUMNS = ("text", "messages", "conversations")  # where text is looked for, unless a column is named
LONGEST = 1 << 20  # characters; a longer plain text is read as several documents, so that memory stays bounded

_PACKED = {b"\x1f\x8b": gzip.open, b"BZh91AY&SY": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_FOREIGN = {
    b"%PDF": "a PDF file",
    b"PK\x03\x04": "a zip archive or an office document",
    b"{\\rtf": "rich text",
    b"\x28\xb5\x2f\xfd": "a zstd file, which has to be unpacked first",
    b"version https://git-lfs": "a Git LFS pointer in place of the file: run git lfs pull",
}
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARKUP = re.compile(r"\s*<(!doctype|html|\?xml|svg)\b", re.IGNORECASE)
_DATA = re.compile(r"\s*[\[{][\[{\s]*['\"][^'\"\n]*['\"]\s*:")  # how JSON objects and Python's dicts begin
_LONE = re.compile("[\ud800-\udfff]")
_MISSING = {"none", "null", "nan", "<na>"}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}

Row = tuple[str, Any]


class Conversation(str):
    """What is said in a conversation, turn by turn; `turns` is what a chat template renders."""

    turns: list[dict[str, Any]]

    @classmethod
    def of(cls, turns: list[dict[str, Any]]) -> "Conversation":
        made = cls("\n\n".join(turn["content"] for turn in turns if turn["content"]))
        made.turns = turns
        return made


class Skipped:
    """How many rows were left out since they are not text, and the first of them with its place and reason."""

    count = 0
    first = ""

    def add(self, fault: str) -> None:
        self.first = self.first or fault
        self.count += 1

    def __str__(self) -> str:
        return f"{self.count} {'row that is' if self.count == 1 else 'rows that are'} not text left out ({self.first})"


def from_files(path: Path, columns: Sequence[str] = COLUMNS, skipped: Skipped | None = None) -> Iterator[str]:
    """Documents of a file, or of all files of a folder whose names end in one of `KINDS` (packed ones too), lazily.

    Args:
        columns: where the text of an object or row is: in the first of these that is there.
        skipped: takes rows that are not text; without it they are errors.

    Raises:
        UserError: naming file and line, for what can't be read or is not text, and if there is no text at all.
    """
    try:
        files = _files(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    empty = True
    for file in files:
        try:
            for text in texts(_rows(file, columns), columns, skipped):
                empty = False
                yield text
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError, csv.Error) as error:
            raise UserError(f"{file}: can't be read: {first_line(error)}") from None
    if empty:
        raise UserError(f"{path} holds no text" + (f": {skipped}" if skipped and skipped.count else ""))


def texts(rows: Iterable[Row], columns: Sequence[str], skipped: Skipped | None) -> Iterator[str]:
    """The documents of rows; blank ones are passed over.

    Raises:
        UserError: for the first row that is not text, unless `skipped` takes it.
    """
    for where, value in rows:
        try:
            text = as_text(value, columns)
        except ValueError as fault:
            if skipped is None:
                raise UserError(f"{where}: {fault}") from None
            skipped.add(f"{where}: {fault}")
            continue
        if text.strip():
            yield text


def as_text(value: Any, columns: Sequence[str] = COLUMNS) -> str:
    """The document of a row, a `Conversation` if it is a list of turns. What was printed as text is read back.

    Raises:
        ValueError: if it is not text; says why.
    """
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, dict):
        value = _cell(value, columns)
    if isinstance(value, str) and _DATA.match(value):
        value = _parsed(value)
        value = _cell(value, columns) if isinstance(value, dict) else value
    if isinstance(value, list):
        value = Conversation.of([_turn(turn) for turn in value])
    if not isinstance(value, str):
        raise ValueError(f"not text, but {_named(value)}")
    if value.strip().lower() in _MISSING:
        raise ValueError(f"not text, but {value.strip()}, which stands for a missing value")
    if _MARKUP.match(value):
        raise ValueError("HTML or XML; give the text that it holds")
    if lone := _LONE.search(value):
        raise ValueError(_lone(lone[0]))
    return value


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, which joined are `text`: cut behind a paragraph, line, sentence or word."""
    start = 0
    while len(text) - start > size:
        stop = start + size
        for mark in ("\n\n", "\n", ". ", " "):
            if (found := text.rfind(mark, start + size // 2, stop)) >= 0:
                stop = found + len(mark)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _named(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:40] + '...'}"


def _lone(character: str) -> str:
    code = ord(character)
    half = f"half of a surrogate pair, U+{code:04X}"
    if 0xDC80 <= code <= 0xDCFF:  # what a byte that can't be decoded is read as
        return f"not text: the byte 0x{code - 0xDC00:02x}, which is not UTF-8 (or {half})"
    return f"not text: {half}"


def _cell(row: dict, columns: Sequence[str]) -> Any:
    if None in row:  # where csv puts what has no column
        raise ValueError("has more fields than the header has columns; text that holds separators has to be quoted")
    for name in columns:
        if name in row:
            return row[name]
    names = [str(name)[:40] for name in row]
    near = difflib.get_close_matches(columns[0], names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    wanted, has = " or ".join(columns), ", ".join(names[:12]) or "none"
    raise ValueError(f"no column {wanted}{hint}; it has {has}; calibration.column says where the text is")


def _parsed(text: str) -> Any:
    """What `text` is the JSON or Python's repr of."""
    for read in (_loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError("data printed as text, which can't be read back; store it as JSON lines or parquet")


def _keys(turn: Any) -> tuple[str, str] | None:
    """Under which keys a turn of a conversation says who speaks and what; None if it is no turn."""
    if isinstance(turn, dict):
        for who, what in (("role", "content"), ("from", "value")):
            if isinstance(turn.get(who), str) and (what in turn or turn.get("tool_calls")):
                return who, what
    return None


def _turn(turn: Any) -> dict[str, Any]:
    """A turn as chat templates know it, with `role` and `content`; parts that are text are joined."""
    if (keys := _keys(turn)) is None:
        raise ValueError(f"not text, but a list with {_named(turn)}; a conversation is a list of role and content")
    role, content = turn[keys[0]], turn.get(keys[1])
    rest = {name: value for name, value in turn.items() if value is not None and name not in keys}
    if isinstance(content, list) and content and all(isinstance(p, dict) and "text" in p for p in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and "tool_calls" in rest:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"not text: a turn of the conversation says {_named(content)}")
    return {**rest, "role": _ROLES.get(role, role), "content": content}


def _files(path: Path) -> list[Path]:
    kinds = f"a file ({', '.join(KINDS)}; gz, bz2 or xz of one), or a folder of them"
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}; give {kinds}")
    inside = (file for file in sorted(path.rglob("*")) if not any(p[0] == "." for p in file.relative_to(path).parts))
    found = [file for file in inside if _kind(file) in KINDS and file.is_file()]
    if not found:
        raise UserError(f"no text in {path}; give {kinds}")
    return found


def _kind(file: Path) -> str:
    """What a file's name says it is: its ending in small letters, that of packing left out."""
    name = file.name.lower()
    for packed in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def _rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file, by what is in it where that can be told, else by its name."""
    with _bytes(file) as stream:
        head = stream.read(1 << 16)
    kind = _kind(file)
    if what := next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None):
        raise UserError(f"{file}: not text, but {what}")
    if head.startswith(b"PAR1"):
        yield from _parquet(file)
        return
    if kind == ".parquet":
        raise UserError(f"{file}: not a parquet file, though named like one")
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise UserError(f"{file}: not text, but binary, or UTF-16 without its mark: give UTF-8")
    start = head.decode(encoding, "replace").lstrip()
    if kind in LINES + JSON or (kind not in TABLES and start.startswith(("[", "{")) and _is_json(file, encoding)):
        yield from _json(file, encoding, columns)
    elif kind in TABLES or _is_table(start):
        yield from _table(file, encoding, kind)
    else:
        yield from _plain(file, encoding)


@contextmanager
def _bytes(file: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked by what it is."""
    with file.open("rb") as stream:
        head = stream.read(16)
    opener: Any = next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), open)
    with opener(file, "rb") as stream:
        yield stream


@contextmanager
def _text(file: Path, encoding: str, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """A file as text. Bytes that are not UTF-8 become lone surrogates, which `as_text` finds and names."""
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with _bytes(file) as stream, io.TextIOWrapper(stream, encoding, errors, newline) as text:
        yield text


def _plain(file: Path, encoding: str) -> Iterator[Row]:
    with _text(file, encoding, None) as stream:
        line, rest = 1, ""
        while chunk := stream.read(LONGEST):
            *pieces, rest = cut(rest + chunk, LONGEST)
            for piece in pieces:
                yield _place(file, line, piece), piece
                line += piece.count("\n")
        yield _place(file, line, rest), rest


def _place(file: Path, line: int, piece: str) -> str:
    """Where a piece of plain text begins, or where in it the first character is that is none."""
    lone = _LONE.search(piece)
    return f"{file}:{line + (piece.count(chr(10), 0, lone.start()) if lone else 0)}"


def _loads(text: str) -> Any:
    """A JSON value; control characters inside strings are let through.

    Raises:
        ValueError: saying why it is none.
    """
    try:
        return json.loads(text, strict=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _holds(text: str) -> bool:
    try:
        return isinstance(_loads(text), dict | list)
    except ValueError:
        return False


def _lines(stream: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Only a line feed ends one, not what Unicode calls a separator."""
    return ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def _is_json(file: Path, encoding: str) -> bool:
    with _text(file, encoding, "\n") as stream:
        first = next(_lines(stream))[1]
        return _holds(first) or _holds(first + stream.read())


def _json(file: Path, encoding: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of JSON lines, or of the one value that the file is."""
    with _text(file, encoding, "\n") as stream:
        found = _lines(stream)
        first = next(found, (1, ""))[1]
        in_lines = _holds(first) and next(found, None) is not None
    if not in_lines:
        with _text(file, encoding, "\n") as stream:
            text = stream.read()
        try:
            value = _loads(text or '""')
        except ValueError as error:
            if _kind(file) not in LINES:
                yield f"{file}:{getattr(error, 'lineno', 1)}", ValueError(f"not JSON: {first_line(error)}")
                return
        else:
            yield from _of_value(file, text, value, columns)
            return
    with _text(file, encoding, "\n") as stream:
        for number, line in _lines(stream):
            try:
                row = _loads(line)
            except ValueError as error:
                row = ValueError(f"not a JSON object: {first_line(error)}")
            yield f"{file}:{number}", row


def _of_value(file: Path, text: str, value: Any, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file that is one JSON value: a list of rows, an object that holds one, or a single row."""
    if isinstance(value, dict):
        lists = {name: item for name, item in value.items() if isinstance(item, list) and not _is_conversation(item)}
        named = [name for name in columns if name in value] or list(lists)
        if len(named) == 1 and named[0] in lists:
            yield from ((f"{file}: {named[0]}[{number}]", item) for number, item in enumerate(lists[named[0]]))
            return
    if not isinstance(value, list) or _is_conversation(value):
        yield f"{file}:1", value
        return
    decoder, line, seen, at = json.JSONDecoder(strict=False), 1, 0, text.index("[") + 1
    for _ in value:  # once more, item by item, for the lines they begin in
        while text[at] in " \t\r\n,":
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        item, at = decoder.raw_decode(text, at)
        yield f"{file}:{line}", item


def _is_conversation(value: list) -> bool:
    return bool(value) and all(map(_keys, value))


def _is_table(start: str) -> bool:
    """Whether a text begins with a table's header that names a column of text."""
    names = re.split(r"[,;\t]", start.split("\n", 1)[0].strip())
    return len(names) > 1 and all(name.isidentifier() for name in names) and any(name in names for name in COLUMNS)


def _table(file: Path, encoding: str, kind: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with _text(file, encoding, "") as stream:
        header = stream.readline()
        separator = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
        stream.seek(0)
        rows = csv.DictReader(stream, delimiter=separator, strict=True)
        yield from ((f"{file}:{rows.line_num}", row) for row in rows)


def _parquet(file: Path) -> Iterator[Row]:
    return of_dataset(str(file), "parquet", data_files=glob.escape(str(file.absolute())))


def of_dataset(name: str, path: str, config: str | None = None, split: str = "train", **options: Any) -> Iterator[Row]:
    """Rows of a dataset that is called `name` in errors; the rest is as for `datasets.load_dataset`.

    Raises:
        UserError: for whatever `datasets` can't do with it, in its words.
    """
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs, it raises too
    number = 0
    try:
        if (Path(path) / "state.json").is_file():  # how `save_to_disk` leaves one split, or several
            data = datasets.load_from_disk(path)
        elif (Path(path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(Path(path) / split))
        else:
            data = datasets.load_dataset(path, config, split=split, streaming=True, **options)
        for number, row in enumerate(data, 1):
            yield f"{name}, row {number}", row
    except Exception as error:  # readers of many libraries are behind it, with errors of their own
        after = f", after row {number}" if number else ""
        raise UserError(f"{name}{after}: can't be read: {first_line(error)}") from None
