"""Calibration text: documents that ship with Python, from files, or from a dataset; then token blocks."""

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .recipe import CalibrationSection


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


def documents(section: CalibrationSection) -> list[list[str]]:
    """Documents of each source, in the source's order, as many as `section.tokens` can need.

    Raises:
        UserError: if a source is missing, empty or malformed, with file and line.
    """
    found = []
    for source in section.source:
        if source == "python-docs":
            found.append(python_docs())
        elif source == "python-code":
            found.append(python_code())
        else:
            texts = from_files(Path(section.path or "")) if source == "files" else _from_dataset(section)
            name = section.path if source == "files" else section.dataset
            found.append(list(_enough((text for text in texts if text.strip()), section.tokens)))
            if not found[-1]:
                raise UserError(f"calibration: {name} holds no text")
    return found


def _enough(texts: Iterator[str], tokens: int) -> Iterator[str]:
    """The first documents, until there are many more characters than `tokens` need; memory stays bounded."""
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters > 32 * tokens:
            return


def from_files(path: Path) -> Iterator[str]:
    """Documents of a .txt or .jsonl file, or of a folder of them."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .txt or .jsonl file, or a folder of them")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no .txt or .jsonl file in {path}")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: can't be read as text: {error}") from None
        if file.suffix != ".jsonl":
            yield text
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    value = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    value = None
                if not isinstance(value, str):
                    raise UserError(f'{file}:{number}: not a JSON object with a "text" string')
                yield value


def _from_dataset(section: CalibrationSection) -> Iterator[str]:
    from datasets import load_dataset

    try:
        data = load_dataset(section.dataset, section.config, split=section.split, streaming=True)
        for row in data:
            if section.column not in row:
                raise UserError(
                    f"calibration.column: no {section.column} in {section.dataset}; it has {', '.join(row)}"
                )
            yield str(row[section.column])
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"calibration.dataset: {section.dataset}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Blocks:
    """Token sequences, each 1-dimensional, to fit on and to check on; the documents of the two don't overlap.

    `unseen`: the text of all documents of the first source that nothing was fitted on.
    """

    fit: list[torch.Tensor]
    held_out: list[torch.Tensor]
    unseen: str


def blocks(section: CalibrationSection, sources: list[list[str]], tokenizer: Any) -> Blocks:
    """Tokenise documents in a seeded order into blocks of at most `section.length` tokens, `section.tokens` in all.

    Raises:
        UserError: if there are too few tokens for both parts.
    """
    made = [_of_one_source(section, texts, tokenizer, section.tokens // len(sources)) for texts in sources]
    fit = [sequence for part in made for sequence in part.fit]
    held_out = [sequence for part in made for sequence in part.held_out]
    have, kept = (sum(map(len, part)) for part in (fit, held_out))
    if have < 256 or kept < 64:
        raise UserError(
            f"calibration: only {have} tokens to fit on and {kept} to check on; "
            "at least 256 and 64 are needed: give more or longer documents, or raise calibration.tokens"
        )
    return Blocks(fit, held_out, made[0].unseen)


def _of_one_source(section: CalibrationSection, texts: list[str], tokenizer: Any, tokens: int) -> Blocks:
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
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(text, verbose=False)["input_ids"]
