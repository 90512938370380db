"""Calibration text: documents from the Python language reference, from files, or from a dataset; then token blocks."""

import json
import random
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


def documents(section: CalibrationSection) -> list[str]:
    """All documents of the source, in the source's order.

    Raises:
        UserError: if the source is missing, empty or malformed, with file and line.
    """
    if section.source == "python-docs":
        return python_docs()
    found = from_files(Path(section.path or "")) if section.source == "files" else _from_dataset(section)
    kept = [text for text in found if text.strip()]
    if not kept:
        raise UserError(f"calibration: {section.path or section.dataset} holds no text")
    return kept


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

    `unseen`: the text of all documents that nothing was fitted on.
    """

    fit: list[torch.Tensor]
    held_out: list[torch.Tensor]
    unseen: str


def blocks(section: CalibrationSection, texts: list[str], tokenizer: Any) -> Blocks:
    """Tokenise documents in a seeded order into blocks of at most `section.length` tokens, up to `section.tokens`.

    Raises:
        UserError: if there are too few tokens for both parts.
    """
    order = list(range(len(texts)))
    random.Random(section.seed).shuffle(order)
    wanted = {"held_out": round(section.tokens * section.held_out)}
    wanted["fit"] = section.tokens - wanted["held_out"]
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
    got = {part: sum(map(len, made)) for part, made in parts.items()}
    if got["fit"] < 256 or got["held_out"] < 64:
        raise UserError(
            f"calibration: only {got['fit']} tokens to fit on and {got['held_out']} to check on; "
            "at least 256 and 64 are needed: give more or longer documents, or raise calibration.tokens"
        )
    unseen = "\n\n".join(texts[number] for number in order if number not in fitted)
    return Blocks(parts["fit"], parts["held_out"], unseen)


def _tokens(text: str, tokenizer: Any, chat: bool) -> list[int]:
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(text, verbose=False)["input_ids"]
