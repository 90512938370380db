"""Calibration text: documents that ship with Python, from files, or from a dataset; then token blocks."""

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..recipe import CalibrationSection
from ..utils.errors import UserError
from .corpus import COLUMNS, Conversation, Skipped, cut, first_line, from_files, of_dataset, texts


def python_docs() -> list[str]:
    """The English language reference that ships with every CPython, one document a topic, repetitions left out."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: -len(topics[name])):
        paragraphs = [p for p in topics[name].split("\n\n") if p.strip() and not (p in seen or seen.add(p))]  # type: ignore[func-returns-value]
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def python_code() -> list[str]:
    """Source files of CPython's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def documents(section: CalibrationSection, say: Callable[[str], None] = lambda _: None) -> list[list[str]]:
    """Documents of each source, in the source's order, as many as `section.tokens` can need. What is said in a chat is
    a `Conversation`.

    Args:
        say: told how many rows were left out.

    Raises:
        UserError: if a source is missing, empty or malformed, with file and line.
    """
    columns = (section.column,) if section.column else COLUMNS
    skipped = Skipped()
    takes = skipped if section.invalid == "skip" else None
    found = []
    for source in section.source:
        if source == "python-docs":
            found.append(python_docs())
        elif source == "python-code":
            found.append(python_code())
        elif source == "files":
            found.append(list(_enough(from_files(Path(section.path or ""), columns, takes), section.tokens)))
        else:
            found.append(list(_enough(_from_dataset(section, columns, takes), section.tokens)))
            if not found[-1]:
                rest = f": {skipped}" if skipped.count else ""
                raise UserError(f"calibration.dataset: {section.dataset} holds no text{rest}")
    if skipped.count:
        say(f"calibration: {skipped}")
    return found


class Seen:
    """Documents met so far, compared without regard to white space. `again`: how many were met again."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self.again = 0

    def new(self, texts: Iterable[str]) -> Iterator[str]:
        """Those of `texts` that were not met before."""
        for text in texts:
            key = hashlib.blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=16).digest()
            if key in self._keys:
                self.again += 1
                continue
            self._keys.add(key)
            yield text


def _enough(texts: Iterator[str], tokens: int) -> Iterator[str]:
    """The first documents, until there are many more characters than `tokens` need; memory stays bounded."""
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters > 32 * tokens:
            return


def _from_dataset(section: CalibrationSection, columns: Sequence[str], skipped: Skipped | None) -> Iterator[str]:
    name = section.dataset or ""
    return texts(of_dataset(f"calibration.dataset: {name}", name, section.config, section.split), columns, skipped)


@dataclass(frozen=True)
class Blocks:
    """Token sequences, each 1-dimensional, to fit on and to check on; the documents of the two don't overlap.

    `unseen`: the text of all documents of the first source that nothing was fitted on.
    """

    fit: list[torch.Tensor]
    held_out: list[torch.Tensor]
    unseen: str


def blocks(
    section: CalibrationSection,
    sources: list[list[str]],
    tokenizer: Any,
    say: Callable[[str], None] = lambda _: None,
) -> Blocks:
    """Tokenise documents in a seeded order into blocks of at most `section.length` tokens, `section.tokens` in all.

    Documents that are equal but for white space count once. A source of too few documents to share out, such as one
    book, is cut into pieces that don't overlap. Conversations go through the tokenizer's chat template.

    Args:
        say: told how many documents were left out.

    Raises:
        UserError: if there are too few tokens for both parts, or no chat template that can render what needs one.
    """
    seen = Seen()
    sources = [list(seen.new(texts)) for texts in sources]
    if seen.again:
        equal = "document that equals another" if seen.again == 1 else "documents that equal others"
        say(f"calibration: {seen.again} {equal} left out")
    chats = any(isinstance(text, Conversation) for texts in sources for text in texts)
    if (section.chat_template or chats) and not getattr(tokenizer, "chat_template", None):
        asks = "calibration.chat_template is set" if section.chat_template else "the calibration text has conversations"
        raise UserError(f"{asks}, but the base's tokenizer has no chat template: give plain text, or a base with one")
    made = [_of_one_source(section, texts, tokenizer, section.tokens // len(sources), seen) for texts in sources]
    fit = [sequence for part in made for sequence in part.fit]
    held_out = [sequence for part in made for sequence in part.held_out]
    have, kept = (sum(map(len, part)) for part in (fit, held_out))
    if have < 256 or kept < 64:
        raise UserError(
            f"calibration: only {have} tokens to fit on and {kept} to check on; at least 256 and 64 are needed: "
            "give more or longer documents (equal ones count once), or raise calibration.tokens"
        )
    return Blocks(fit, held_out, made[0].unseen)


def _of_one_source(section: CalibrationSection, texts: list[str], tokenizer: Any, tokens: int, seen: Seen) -> Blocks:
    """Blocks of whole documents; of pieces, where whole ones leave less than half of what is wanted to fit on."""
    whole = _share(section, texts, tokenizer, tokens)
    if 2 * sum(map(len, whole.fit)) >= tokens * (1 - section.held_out):
        return whole
    size = max(256, min(sum(map(len, texts)) // 20, 4 * section.length))
    pieces = [piece for text in texts for piece in _pieces(text, size, seen)]
    return max(whole, _share(section, pieces, tokenizer, tokens), key=lambda made: sum(map(len, made.fit)))


def _pieces(text: str, size: int, seen: Seen) -> Iterable[str]:
    if len(text) <= size or isinstance(text, Conversation):
        return [text]
    return seen.new(piece for piece in cut(text, size) if piece.strip())


def _share(section: CalibrationSection, texts: list[str], tokenizer: Any, tokens: int) -> Blocks:
    order = list(range(len(texts)))
    random.Random(section.seed).shuffle(order)
    wanted = {"held_out": round(tokens * section.held_out)}
    wanted["fit"] = tokens - wanted["held_out"]
    parts: dict[str, list[torch.Tensor]] = {"held_out": [], "fit": []}
    remaining = iter(order)
    fitted: set[int] = set()
    for part, goal in wanted.items():
        running: list[int] = []
        have = 0
        while have < goal and (number := next(remaining, None)) is not None:
            if part == "fit":
                fitted.add(number)
            ids = _tokens(texts[number], tokenizer, section.chat_template)
            running = running + ids if section.pack else ids[: section.length]
            while running and have < goal and (len(running) >= section.length or not section.pack):
                size = min(section.length, goal - have)
                if size < 16:
                    have = goal
                    break
                parts[part].append(torch.tensor(running[:size]))
                have += len(parts[part][-1])
                running = running[size:] if section.pack else []
        if running and section.pack and have < goal and len(running) >= 16:
            parts[part].append(torch.tensor(running[: goal - have]))
    unseen = "\n\n".join(texts[number] for number in order if number not in fitted)
    return Blocks(parts["fit"], parts["held_out"], unseen)


def _tokens(text: str, tokenizer: Any, chat: bool) -> list[int]:
    if not chat and not isinstance(text, Conversation):
        return tokenizer(text, verbose=False)["input_ids"]
    turns = text.turns if isinstance(text, Conversation) else [{"role": "user", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not isinstance(text, Conversation)
        )
    except Exception as error:  # a template is a program, and fails as it likes
        start = f"{text[:40]}..." if len(text) > 40 else text
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"calibration: the base's chat template can't render {start!r}: {reason}") from None
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
