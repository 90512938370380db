"""Calibration text: documents that ship with Python, from files, or from a dataset; then token blocks."""

import hashlib
import random
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from ..recipe import CalibrationSection
from ..tasks.example import rendered
from ..utils.errors import UserError, reason
from . import corpus
from .corpus import COLUMNS, Conversation, Skipped, cut, dataset_records, from_files


def python_docs() -> list[str]:
    """The English language reference that ships with every CPython, one document a topic, repetitions left out."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: -len(topics[name])):
        paragraphs = [p for p in dict.fromkeys(topics[name].split("\n\n")) if p.strip() and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def python_code() -> list[str]:
    """Source files of CPython's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def documents(section: CalibrationSection, log: Callable[[str], None] = lambda _: None) -> list[list[str]]:
    """Documents of each source, in the source's order, as many as `section.tokens` can need. What is said in a chat is
    a `Conversation`.

    Args:
        log: told how many rows were left out.

    Raises:
        UserError: if a source is missing, empty or malformed, with file and line.
    """
    columns = (section.column,) if section.column else COLUMNS
    skipped = Skipped()
    options = columns, skipped if section.invalid == "skip" else None
    dataset = f"calibration.dataset: {section.dataset}"
    records = dataset_records(dataset, str(section.dataset), section.config, section.split)
    readers: dict[str, Callable[[], Iterable[str]]] = {
        "python-docs": python_docs,
        "python-code": python_code,
        "files": lambda: _enough(from_files(Path(str(section.path)), *options), section, str(section.path), log),
        "dataset": lambda: _enough(corpus.documents(records, dataset, *options), section, dataset, log),
    }
    sources = [list(readers[source]()) for source in section.source]
    if skipped.count:
        log(f"calibration: {skipped}")
    return sources


def _enough(texts: Iterator[str], section: CalibrationSection, name: str, log: Callable[[str], None]) -> Iterator[str]:
    """The first documents of a source called `name`, until there are many more characters than `section.tokens` need;
    memory stays bounded. `log` is told if some are left."""
    characters = 0
    for number, text in enumerate(texts, 1):
        yield text
        characters += len(text)
        if characters > 32 * section.tokens:
            if next(texts, None) is not None:
                log(f"calibration: the first {number} documents of {name} are enough; the others are not read")
            return


LITTLE = 0.05  # of a text, which is not missed


@dataclass(frozen=True)
class Blocks:
    """Token sequences, each 1-dimensional, to fit on and to check on; the documents of the two don't overlap.

    `unseen`: the text of the documents of the first source that nothing was fitted on; without those to check on where
    they are little of it. `fitted` and `checked`: the keys of those that something was fitted on and of those to check
    on, see `document_key`.
    """

    fit: list[torch.Tensor]
    held_out: list[torch.Tensor]
    unseen: str
    fitted: frozenset[str]
    checked: frozenset[str]

    @property
    def parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The sequences to fit on and to check on."""
        return self.fit, self.held_out

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens to fit on and to check on."""
        return sum(map(len, self.fit)), sum(map(len, self.held_out))


def blocks(
    section: CalibrationSection,
    sources: list[list[str]],
    tokenizer: Any,
    log: Callable[[str], None] = lambda _: None,
) -> Blocks:
    """Tokenise documents in a seeded order into blocks of at most `section.length` tokens, `section.tokens` in all.

    Documents that are equal but for white space count once. A source of too few documents to share out, such as one
    book, is cut into pieces that don't overlap. Conversations go through the tokenizer's chat template.

    Args:
        log: told how many documents were left out, and if there are fewer tokens.

    Raises:
        UserError: if there are too few tokens for both parts, or no chat template that can render what needs one.
    """
    seen: set[str] = set()
    unique = [_distinct(texts, seen) for texts in sources]
    if repeated := sum(map(len, sources)) - sum(map(len, unique)):
        equal = "document that equals another" if repeated == 1 else "documents that equal others"
        log(f"calibration: {repeated} {equal} left out")
    chats = any(isinstance(text, Conversation) for texts in unique for text in texts)
    if (section.chat_template or chats) and not getattr(tokenizer, "chat_template", None):
        asks = "calibration.chat_template is set" if section.chat_template else "the calibration text has conversations"
        raise UserError(f"{asks}, but the base's tokenizer has no chat template: give plain text, or a base with one")
    parts = [_of_one_source(section, texts, tokenizer, section.tokens // len(unique), seen) for texts in unique]
    fit = [block for part in parts for block in part.fit]
    joined = Blocks(
        fit,
        _mixed([part.held_out for part in parts]),
        parts[0].unseen,
        frozenset().union(*(part.fitted for part in parts)),
        frozenset().union(*(part.checked for part in parts)),
    )
    to_fit, to_check = joined.sizes
    if to_fit < 256 or to_check < 64:
        raise UserError(
            f"calibration: only {to_fit} tokens to fit on and {to_check} to check on; at least 256 and 64 are needed: "
            "give more or longer documents (equal ones count once), or raise calibration.tokens"
        )
    if to_fit + to_check < 0.9 * section.tokens:
        log(f"calibration: the text gives {to_fit + to_check} tokens, fewer than calibration.tokens: {section.tokens}")
    return joined


def _mixed(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The blocks of several sources in turn, so that any stretch of them is of all, each by its share."""
    placed = []
    for part in parts:
        ends = list(accumulate(map(len, part)))
        placed += [((end - len(block) / 2) / ends[-1], block) for end, block in zip(ends, part, strict=True)]
    return [block for _, block in sorted(placed, key=itemgetter(0))]


def document_key(text: str) -> str:
    """Equal for texts of the same words."""
    return hashlib.blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _distinct(texts: Iterable[str], seen: set[str]) -> list[str]:
    """Those whose keys are not in `seen`, which then holds them."""
    new = []
    for text in texts:
        if (key := document_key(text)) not in seen:
            seen.add(key)
            new.append(text)
    return new


def _of_one_source(
    section: CalibrationSection, texts: list[str], tokenizer: Any, tokens: int, seen: set[str]
) -> Blocks:
    """Blocks of whole documents; of pieces, where whole ones leave less than half of what is wanted to fit on."""
    whole = _shared_out(section, texts, tokenizer, tokens)
    if 2 * whole.sizes[0] >= tokens * (1 - section.held_out):
        return whole
    size = max(256, min(sum(map(len, texts)) // 20, 4 * section.length))
    pieces: list[str] = []
    for text in texts:
        short = len(text) <= size or isinstance(text, Conversation)
        pieces += [text] if short else _distinct(filter(str.strip, cut(text, size)), seen)
    in_pieces = _shared_out(section, pieces, tokenizer, tokens)
    if 2 * whole.sizes[0] >= in_pieces.sizes[0]:
        return whole
    return replace(in_pieces, fitted=frozenset(map(document_key, texts)))


def _shared_out(
    section: CalibrationSection, texts: list[str], tokenizer: Any, tokens: int, again: bool = True
) -> Blocks:
    """Blocks of so many `tokens`; where the texts have fewer, shared out `again` by what they have."""
    shuffled = list(texts)
    random.Random(section.seed).shuffle(shuffled)
    waiting = deque(shuffled)
    for_check = round(tokens * section.held_out)
    held_out = list(_filled(section, waiting, tokenizer, for_check))
    checked = shuffled[: len(shuffled) - len(waiting)]
    fit = list(_filled(section, waiting, tokenizer, tokens - for_check))
    fitted = frozenset(map(document_key, shuffled[len(checked) : len(shuffled) - len(waiting)]))
    keys = frozenset(map(document_key, checked))
    spared = sum(map(len, checked)) < LITTLE * sum(map(len, waiting))
    made = Blocks(fit, held_out, "\n\n".join(waiting if spared else [*checked, *waiting]), fitted, keys)
    if waiting or not again:
        return made
    return max(made, _shared_out(section, texts, tokenizer, sum(made.sizes), False), key=lambda blocks: blocks.sizes[0])


def _filled(section: CalibrationSection, waiting: deque[str], tokenizer: Any, room: int) -> Iterator[torch.Tensor]:
    """Blocks of `room` tokens in all, of documents taken from `waiting`; none is shorter than 16 tokens, unless a
    document that is not packed with others is."""
    running: list[int] = []
    while room > 0 and waiting:
        running += _tokens(waiting.popleft(), tokenizer, section.chat_template)
        while room > 0 and len(running) >= (section.length if section.pack else 1):
            if room < 16:
                return
            block = running[: min(section.length, room)]
            running = running[len(block) :] if section.pack else []
            room -= len(block)
            yield torch.tensor(block)
    if room > 0 and len(running) >= 16:
        yield torch.tensor(running[:room])


def _tokens(text: str, tokenizer: Any, chat: bool) -> list[int]:
    if not chat and not isinstance(text, Conversation):
        return tokenizer(text, verbose=False)["input_ids"]
    turns = text.turns if isinstance(text, Conversation) else [{"role": "user", "content": text}]
    try:
        shown = rendered(tokenizer, turns, ask=not isinstance(text, Conversation))
    except Exception as error:  # a template is a program, and fails as it likes
        start = f"{text[:40]}..." if len(text) > 40 else text
        fault = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"calibration: the base's chat template can't render {start!r}: {fault}") from None
    return tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
