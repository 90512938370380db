"""Prompts that look like use: retrieval, facts to be put together, and free answers about a document."""

import random
from collections.abc import Sequence
from typing import Any

from ..evaluation import agreement, diversity, ruler
from ..evaluation.items import Item, about, chat, sentences, token_count

# What is asked, by kind; prompts of a kind take these in turn.
RETRIEVAL = (
    "niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_single_3", "niah_multikey_2", "niah_multiquery",
    "niah_multikey_3",
)  # fmt: skip
MULTI_HOP = ("vt", "multi_hop", "repository", "arithmetic")
GROUPS = {"retrieval": RETRIEVAL, "multi-hop": MULTI_HOP}
FREE = (
    "Explain in a few sentences what the following text says.\n\n{context}",
    "{context}\n\nWhich names and terms matter most in the text above, and what is said of them?",
    "Read the text and answer the question below.\n\n{context}\n\nQuestion: what does the text say about {term}?",
    "{context}\n\nSummarize the text above.",
)


def make(
    kinds: Sequence[str], tokenizer: Any, prose: str, length: int, count: int, tokens: int, seed: int
) -> list[Item]:
    """`count` items of each kind ("free", one of `GROUPS` or one of their tasks), of at most `length` tokens with
    `tokens` for the answer; kinds take turns.

    Raises:
        UserError: if a task does not fit into `length`.
    """
    columns = [_of_kind(kind, tokenizer, prose, length, count, tokens, seed) for kind in kinds]
    return [item for row in zip(*columns, strict=True) for item in row]


def kind_of(item: Item, kinds: Sequence[str]) -> str:
    """Which of `kinds` an item was made for."""
    if item.task == agreement.TASK:
        return "free"
    return next((kind for kind in kinds if kind == item.task or item.task in GROUPS.get(kind, ())), item.task)


def _of_kind(kind: str, tokenizer: Any, prose: str, length: int, count: int, tokens: int, seed: int) -> list[Item]:
    if kind == "free":
        return [_free(tokenizer, prose, length, index, tokens, seed) for index in range(count)]
    tasks = GROUPS.get(kind, (kind,))
    made = []
    for index in range(count):
        task = tasks[(index + seed) % len(tasks)]
        if task in ruler.TASKS:
            made += ruler.items(task, tokenizer, prose, length, 1, seed * 1000 + index, tokens)
        else:
            made += diversity.items(task, tokenizer, prose, length, 1, seed * 1000 + index)
    return made


def _free(tokenizer: Any, prose: str, length: int, index: int, tokens: int, seed: int) -> Item:
    """A question about a stretch of `prose` from a random place."""
    rng = random.Random(f"{seed} {index} {length}")
    parts = sentences(prose)
    start = rng.randrange(len(parts))
    words = [word.strip(".,;:()'\"") for word in " ".join(parts[start : start + 40]).split()]
    term = rng.choice([word for word in words if len(word) > 6] or words)
    question = FREE[index % len(FREE)]

    def ask(context: str) -> str:
        return chat(tokenizer, question.format(context=context, term=term))

    text = about(parts, start, tokenizer, length - tokens, ask)
    return Item(agreement.TASK, index, text, [], token_count(tokenizer, text), length, tokens)
