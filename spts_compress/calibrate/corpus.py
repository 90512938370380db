"""Documents from files and datasets.

Each format's reader gives records: a place (file and line) and the value there, or the `ValueError` that says why it
can't be told. `as_text` alone decides whether a value is a document.
"""

import ast
import bz2
import csv
import difflib
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, reason

Record = tuple[str, Any]

COLUMNS = ("text", "messages", "conversations")  # where text is looked for, unless a column is named
MAX_CHARACTERS = 1 << 20  # a longer plain text is read as several documents, so that memory stays bounded

OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh91AY&SY": bz2.open, b"\xfd7zXZ\x00": lzma.open}
FOREIGN = {
    b"%PDF": "a PDF file",
    b"PK\x03\x04": "a zip archive or an office document",
    b"{\\rtf": "rich text",
    b"\x28\xb5\x2f\xfd": "a zstd file, which has to be unpacked first",
    b"version https://git-lfs": "a Git LFS pointer in place of the file: run git lfs pull",
}
MARKUP = re.compile(r"\s*<(!doctype|html|\?xml|svg)\b", re.IGNORECASE)
PRINTED_DATA = re.compile(r"\s*[\[{][\[{\s]*['\"][^'\"\n]*['\"]\s*:")  # how JSON objects and Python's dicts begin
SURROGATE = re.compile("[\ud800-\udfff]")
MISSING = {"none", "null", "nan", "<na>"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}


class Conversation(str):
    """What is said in a conversation, turn by turn; `turns` is what a chat template renders."""

    turns: list[dict[str, Any]]

    @classmethod
    def of(cls, turns: list[dict[str, Any]]) -> "Conversation":
        conversation = cls("\n\n".join(turn["content"] for turn in turns if turn["content"]))
        conversation.turns = turns
        return conversation


@dataclass
class Skipped:
    """How many records were left out since they are not text, and the first of them with its place and reason."""

    count: int = 0
    first: str = ""

    def __str__(self) -> str:
        return f"{self.count} {'row that is' if self.count == 1 else 'rows that are'} not text left out ({self.first})"


def from_files(path: Path, columns: Sequence[str] = COLUMNS, skipped: Skipped | None = None) -> Iterator[str]:
    """Documents of a file, or of all files of a folder whose names end in one of `ENDINGS` (packed ones too), lazily.

    Args:
        columns, skipped: see `documents`.

    Raises:
        UserError: naming file and line, for what can't be read or is not text, and if there is no text at all.
    """
    return documents(_all_records(path, columns), str(path), columns, skipped)


def documents(
    records: Iterable[Record], name: str, columns: Sequence[str], skipped: Skipped | None = None
) -> Iterator[str]:
    """The documents of records; blank ones are passed over.

    Args:
        name: what to call the source of the records.
        columns: the text of an object is in the first of these that is there and not empty.
        skipped: takes records that are not text; without it they are errors.

    Raises:
        UserError: for the first record that is not text, unless `skipped` takes it, and if there is no text at all.
    """
    empty = True
    for place, value in records:
        try:
            text = as_text(value, columns)
        except ValueError as fault:
            if skipped is None:
                raise UserError(f"{place}: {fault}") from None
            skipped.first, skipped.count = skipped.first or f"{place}: {fault}", skipped.count + 1
            continue
        if text.strip():
            empty = False
            yield text
    if empty:
        raise UserError(f"{name} holds no text" + (f": {skipped}" if skipped and skipped.count else ""))


def as_text(value: Any, columns: Sequence[str] = COLUMNS) -> str:
    """The document of a record, a `Conversation` if it is a list of turns. What was printed as text is read back.

    Raises:
        ValueError: if it is not text; says why.
    """
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, dict):
        value = _cell(value, columns)
    if isinstance(value, str) and PRINTED_DATA.match(value):
        value = _read_back(value)
        value = _cell(value, columns) if isinstance(value, dict) else value
    if isinstance(value, list):
        value = Conversation.of([_turn(turn) for turn in value])
    if not isinstance(value, str):
        raise ValueError(f"not text, but {_shown(value)}")
    if value.strip().lower() in MISSING:
        raise ValueError(f"not text, but {value.strip()}, which stands for a missing value")
    if MARKUP.match(value):
        raise ValueError("HTML or XML; give the text that it holds")
    if surrogate := SURROGATE.search(value):
        code = ord(surrogate[0])
        half = f"half of a surrogate pair, U+{code:04X}"
        if 0xDC80 <= code <= 0xDCFF:  # what a byte that can't be decoded is read as
            raise ValueError(f"not text: the byte 0x{code - 0xDC00:02x}, which is not UTF-8 (or {half})")
        raise ValueError(f"not text: {half}")
    return value


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, which joined are `text`: cut after a paragraph, line, sentence or word."""
    start = 0
    while len(text) - start > size:
        stop = start + size
        for mark in ("\n\n", "\n", ". ", " "):
            if (at := text.rfind(mark, start + size // 2, stop)) >= 0:
                stop = at + len(mark)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:40] + '...'}"


def _cell(row: dict, columns: Sequence[str]) -> Any:
    if None in row:  # where csv puts what has no column
        raise ValueError("has more fields than the header has columns; text that holds separators has to be quoted")
    if there := [row[name] for name in columns if name in row]:
        return next((value for value in there if value not in (None, "")), there[0])
    names = [str(name)[:40] for name in row]
    near = difflib.get_close_matches(columns[0], names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    wanted, has = " or ".join(columns), ", ".join(names[:12]) or "none"
    raise ValueError(f"no column {wanted}{hint}; it has {has}; calibration.column says where the text is")


def _read_back(text: str) -> Any:
    """What `text` is the JSON or Python's repr of."""
    if not isinstance(value := _parse(text), ValueError):
        return value
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("data printed as text, which can't be read back; store it as JSON lines or parquet") from None


def _turn_keys(turn: Any) -> tuple[str, str] | None:
    """Under which keys a turn of a conversation says who speaks and what; None if it is no turn."""
    pairs = (("role", "content"), ("from", "value")) if isinstance(turn, dict) else ()
    spoken = ((who, what) for who, what in pairs if what in turn or turn.get("tool_calls"))
    return next(((who, what) for who, what in spoken if isinstance(turn.get(who), str)), None)


def _is_conversation(value: list) -> bool:
    return bool(value) and all(map(_turn_keys, value))


def _turn(turn: Any) -> dict[str, Any]:
    """A turn as chat templates know it, with `role` and `content`; parts that are text are joined."""
    if (keys := _turn_keys(turn)) is None:
        raise ValueError(f"not text, but a list with {_shown(turn)}; a conversation is a list of role and content")
    role, content = turn[keys[0]], turn.get(keys[1])
    rest = {name: value for name, value in turn.items() if value is not None and name not in keys}
    if isinstance(content, list) and content and all(isinstance(p, dict) and "text" in p for p in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and "tool_calls" in rest:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"not text: a turn of the conversation says {_shown(content)}")
    return {**rest, "role": ROLES.get(role, role), "content": content}


def dataset_records(
    name: str, path: str, config: str | None = None, split: str = "train", **options: Any
) -> Iterator[Record]:
    """Records of a dataset that is called `name` in errors, in the words of `datasets`; see `datasets.load_dataset`.

    Raises:
        UserError: for whatever `datasets` can't do with it.
    """
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs, it raises too
    number = 0
    try:
        if (Path(path) / "state.json").is_file():  # how `save_to_disk` leaves one split, or several
            rows = datasets.load_from_disk(path)
            if split not in ("train", str(rows.split)):
                kind = "a split without a name" if rows.split is None else f"the split {rows.split}"
                raise ValueError(f"it is {kind}, not {split}")
        elif (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(Path(path) / split))
        else:
            rows = datasets.load_dataset(path, config, split=split, streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", row
    except Exception as error:  # readers of many libraries are behind it, with errors of their own
        after = f", after row {number}" if number else ""
        raise UserError(f"{name}{after}: can't be read: {reason(error)}") from None


class TextFile:
    """A file of text, packed or not; `columns`: see `documents`.

    Raises:
        UserError: if it is known not to be text.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns
        with path.open("rb") as stream:
            packed = stream.read(16)
        self._opener = next((opener for magic, opener in OPENERS.items() if packed.startswith(magic)), open)
        with self._opener(path, "rb") as stream:
            head = stream.read(1 << 16)
        self.ending, self.encoding = _ending(path), json.detect_encoding(head)
        if what := next((what for magic, what in FOREIGN.items() if head.startswith(magic)), None):
            raise UserError(f"{path}: not text, but {what}")
        self.is_parquet = head.startswith(b"PAR1")
        if self.ending == ".parquet" and not self.is_parquet:
            raise UserError(f"{path}: not a parquet file, though named like one")
        if b"\0" in head and self.encoding not in ("utf-16", "utf-32") and not self.is_parquet:
            raise UserError(f"{path}: not text, but binary, or UTF-16 without its mark: give UTF-8")
        self.start = head.decode(self.encoding, "replace").lstrip()

    def open(self, newline: str | None = "\n") -> io.TextIOWrapper:
        """Bytes that can't be decoded become lone surrogates, which `as_text` finds and names."""
        return self._opener(self.path, "rt", encoding=self.encoding, errors="surrogateescape", newline=newline)


def _ending(path: Path) -> str:
    """What a file's name says it is: its ending in small letters, that of packing left out."""
    return Path(re.sub(r"\.(gz|bz2|xz)$", "", path.name.lower())).suffix


def _all_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Records of a file, or of the files of a folder that are not hidden."""
    wanted = f"a file ({', '.join(ENDINGS)}; gz, bz2 or xz of one), or a folder of them"
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}; give {wanted}")
    file = path
    try:
        files = [path]
        if path.is_dir():
            inside = (p for p in sorted(_below(path)) if not re.search(r"(^|/)\.", p.relative_to(path).as_posix()))
            files = [p for p in inside if _ending(p) in ENDINGS and (p.is_file() or p.is_symlink())]  # or to nothing
        if not files:
            raise UserError(f"no text in {path}; give {wanted}")
        for file in files:
            text = TextFile(file, columns)
            yield from next(read for endings, told, read in FORMATS if text.ending in endings or told(text))(text)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError, csv.Error) as error:
        raise UserError(f"{file}: can't be read: {getattr(error, 'strerror', None) or reason(error)}") from None


def _raise(error: OSError) -> None:
    raise error


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, links followed, each folder once."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        yield from (Path(place) / name for name in names)
        for name in sorted(folders):
            if (real := os.path.realpath(os.path.join(place, name))) in seen:
                folders.remove(name)
            seen.add(real)


def _plain(file: TextFile) -> Iterator[Record]:
    line, rest, more = 1, "", True
    with file.open(None) as stream:
        while more:
            more = bool(chunk := stream.read(MAX_CHARACTERS))
            *pieces, rest = cut(rest + chunk, MAX_CHARACTERS)
            for piece in pieces if more else [*pieces, rest]:
                fault = SURROGATE.search(piece)
                yield f"{file.path}:{line + (piece.count(chr(10), 0, fault.start()) if fault else 0)}", piece
                line += piece.count("\n")


def _parse(text: str) -> Any:
    """A JSON value, or the `ValueError` that says why it is none; strings may hold control characters."""
    try:
        return json.loads(text, strict=False)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _json(file: TextFile) -> Iterator[Record]:
    """Records of JSON lines, or of the one value that the file is. Only a line feed ends a line."""
    with file.open() as stream:
        nonblank = filter(str.strip, stream)
        in_lines = not isinstance(_parse(next(nonblank, "")), ValueError) and any(nonblank)
    if not in_lines:
        with file.open() as stream:
            text = stream.read()
        value = _parse(text or '""')
        if not isinstance(value, ValueError):
            yield from _inside(file, text, value)
            return
        if file.ending not in (".jsonl", ".ndjson"):
            yield f"{file.path}:{getattr(value, 'lineno', 1)}", ValueError(f"not JSON: {reason(value)}")
            return
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                value = _parse(line)
                is_fault = isinstance(value, ValueError)
                yield f"{file.path}:{number}", ValueError(f"not a JSON object: {reason(value)}") if is_fault else value


def _is_json(file: TextFile) -> bool:
    return file.start.startswith(("[", "{")) and not isinstance(next(_json(file), ("", None))[1], ValueError)


def _inside(file: TextFile, text: str, value: Any) -> Iterator[Record]:
    """Records of one JSON value: a list of records, an object that holds one, or a single record."""
    if isinstance(value, dict):
        lists = {name: item for name, item in value.items() if isinstance(item, list) and not _is_conversation(item)}
        # A list of plain values may be what an object says of its text, such as tags.
        records = [
            name for name, item in lists.items() if len(value) == 1 or all(isinstance(row, dict) for row in item)
        ]
        named = [name for name in file.columns if name in value] or records
        if len(named) == 1 and named[0] in lists:
            yield from ((f"{file.path}: {named[0]}[{n}]", item) for n, item in enumerate(lists[named[0]]))
            return
    if not isinstance(value, list) or _is_conversation(value):
        yield f"{file.path}:1", value
        return
    decoder, at = json.JSONDecoder(strict=False), text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    for _ in value:  # once more, item by item, for the lines they begin in
        start = re.compile(r"[\s,]*").match(text, at).end()  # type: ignore[union-attr]
        item, end = decoder.raw_decode(text, start)
        line += text.count("\n", at, start)
        yield f"{file.path}:{line}", item
        line, at = line + text.count("\n", start, end), end


def _table(file: TextFile) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with file.open("") as stream:
        header = stream.readline()
        separator = "\t" if file.ending == ".tsv" else max(",;\t", key=header.count)
        stream.seek(0)
        rows = csv.DictReader(stream, delimiter=separator, strict=True)
        if twice := [name for name, count in Counter(rows.fieldnames).items() if count > 1]:
            raise csv.Error(f"several columns are called {twice[0]!r}")
        yield from ((f"{file.path}:{rows.line_num}", row) for row in rows)


def _is_table(file: TextFile) -> bool:
    """Whether a text begins with a table's header that names a column of text."""
    names = re.split(r"[,;\t]", file.start.split("\n", 1)[0].strip())
    return len(names) > 1 and all(map(str.isidentifier, names)) and any(name in names for name in COLUMNS)


def _parquet(file: TextFile) -> Iterator[Record]:
    return dataset_records(str(file.path), "parquet", data_files=glob.escape(str(file.path.absolute())))


Reader = Callable[[TextFile], Iterator[Record]]
FORMATS: tuple[tuple[tuple[str, ...], Callable[[TextFile], bool], Reader], ...] = (
    # names that say it, how its content tells whatever the name, how it is read
    ((), lambda file: file.is_parquet, _parquet),
    ((".jsonl", ".ndjson", ".json"), _is_json, _json),
    ((".csv", ".tsv"), _is_table, _table),
    ((), lambda _: True, _plain),
)
ENDINGS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
