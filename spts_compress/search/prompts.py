"""Prompts that look like use: retrieval, facts to be put together, and free answers about a document."""

import random
from collections.abc import Sequence
from typing import Any

from ..tasks import agreement, ruler, synthetic
from ..tasks.example import Example, ask_about, sentences

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
) -> list[Example]:
    """`count` items of each kind, see `one`; kinds take turns."""
    return [one(kind, index, tokenizer, prose, length, tokens, seed) for index in range(count) for kind in kinds]


def one(
    kind: str, index: int, tokenizer: Any, prose: str, length: int, tokens: int, seed: int, attempt: int = 0
) -> Example:
    """The item `index` of a kind ("free", one of `GROUPS` or one of their tasks), of at most `length` tokens with
    `tokens` for the answer. Each `attempt` gives another prompt of the same task.

    Raises:
        UserError: if a task does not fit into `length`.
    """
    if kind == "free":
        return _free(tokenizer, prose, length, index, tokens, seed)
    tasks = GROUPS.get(kind, (kind,))
    task, seed = tasks[(index + seed) % len(tasks)], seed * 1000 + index + attempt * 1_000_000
    if task in ruler.TASKS:
        return ruler.examples(task, tokenizer, prose, length, 1, seed, tokens)[0]
    return synthetic.examples(task, tokenizer, prose, length, 1, seed)[0]


def kind_of(item: Example, kinds: Sequence[str]) -> str:
    """Which of `kinds` an item was made for."""
    if item.task == agreement.TASK:
        return "free"
    return next((kind for kind in kinds if kind == item.task or item.task in GROUPS.get(kind, ())), item.task)


def _free(tokenizer: Any, prose: str, length: int, index: int, tokens: int, seed: int) -> Example:
    """A question about a stretch of `prose` from a random place."""
    rng = random.Random(f"{seed} {index} {length}")
    parts = sentences(prose)
    start = rng.randrange(len(parts))
    words = [word.strip(".,;:()'\"") for word in " ".join(parts[start : start + 40]).split()]
    term = rng.choice([word for word in words if len(word) > 6] or words)
    question = FREE[index % len(FREE)].replace("{term}", term)
    return ask_about(agreement.TASK, index, tokenizer, parts, start, question, length, tokens)
