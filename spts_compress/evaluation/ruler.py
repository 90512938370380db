"""Needle-in-a-haystack tasks after RULER (arXiv 2404.06654), made on the spot for any tokenizer and length."""

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wonderwords import RandomWord

TEMPLATE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{context}\n"
    "What are all the special magic numbers for {query} mentioned in the provided text?"
)
PREFIX = " The special magic numbers for {query} mentioned in the provided text are"
# RULER asks in the singular where one value is asked for.
TEMPLATE_OF_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n{context}\n"
    "What is the special magic number for {query} mentioned in the provided text?"
)
PREFIX_OF_ONE = " The special magic number for {query} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {value}."


@dataclass(frozen=True)
class Item:
    """One prompt: `text` ends where the answer begins; `outputs` are the strings the answer must contain."""

    index: int
    text: str
    outputs: list[str]
    length: int
    answer_prefix: str


@dataclass(frozen=True)
class Needles:
    """Keys, values a key, and queried keys."""

    keys: int = 1
    values: int = 1
    queries: int = 1


def sentences(prose: str) -> list[str]:
    """The sentences of a text, white space folded; headings, tables and code in between are left out."""
    parts = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", prose))
    return [s for s in parts if len(s) >= 20 and sum(c.isalpha() or c in " ,." for c in s) >= 0.92 * len(s)]


def words() -> list[str]:
    """All adjective-noun keys' parts are drawn from here: (adjective, noun) lists joined on use."""
    source = RandomWord()
    adjectives = [w for w in source.filter(include_categories=["adjective"]) if w.isalpha()]
    nouns = [w for w in source.filter(include_categories=["noun"]) if w.isalpha()]
    return [f"{a}-{n}" for a, n in zip(adjectives, nouns, strict=False)]


def chat(tokenizer: Any, user: str, answer_prefix: str = "") -> str:
    """The user's turn in the model's chat template (plain where it has none), and the start of the answer."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": user}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + answer_prefix
    return user + answer_prefix


def token_count(tokenizer: Any, text: str) -> int:
    return len(
        tokenizer(text, add_special_tokens=not getattr(tokenizer, "chat_template", None), verbose=False)["input_ids"]
    )


def longest(build: Callable[[int], str], tokenizer: Any, limit: int, most: int) -> int:
    """The largest size up to `most` for which `build(size)` has at most `limit` tokens."""
    return bisect_right(range(1, most + 1), limit, key=lambda size: token_count(tokenizer, build(size)))


def needle_items(
    tokenizer: Any,
    prose: str,
    length: int,
    count: int,
    seed: int,
    needles: Needles = Needles(),
    answer_tokens: int = 128,
) -> list[Item]:
    """`count` needle prompts of at most `length` tokens, answer included (niah_single_2, niah_multikey_1, ...).

    Args:
        prose: haystack; repeated if it is too short for `length`.
        seed: equal seeds, equal items.
    """
    rng = random.Random(f"niah {seed} {needles}")
    haystack = sentences(prose)
    return [_needle_item(tokenizer, haystack, length - answer_tokens, index, rng, needles) for index in range(count)]


def _needle_item(
    tokenizer: Any, haystack: list[str], limit: int, index: int, rng: random.Random, needles: Needles
) -> Item:
    keys = rng.sample(words(), needles.keys)
    values = {key: [str(rng.randint(1_000_000, 9_999_999)) for _ in range(needles.values)] for key in keys}
    hidden = [NEEDLE.format(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    asked = rng.sample(keys, needles.queries)
    query = ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]
    one = needles.queries * needles.values == 1
    template, prefix = (TEMPLATE_OF_ONE, PREFIX_OF_ONE) if one else (TEMPLATE, PREFIX)
    offset = rng.randrange(len(haystack))
    depths = sorted(rng.random() for _ in hidden)

    def build(size: int) -> str:
        text = [haystack[(offset + i) % len(haystack)] for i in range(size)]
        for depth, needle in sorted(zip(depths, hidden, strict=True), reverse=True):
            text.insert(round(depth * size), needle)
        return chat(tokenizer, template.format(context=" ".join(text), query=query), prefix.format(query=query))

    size = longest(build, tokenizer, limit, most=limit)
    text = build(max(size, 1))
    outputs = [value for key in asked for value in values[key]]
    return Item(index, text, outputs, token_count(tokenizer, text), prefix.format(query=query))


def score(answer: str, outputs: list[str]) -> float:
    """Share of the reference strings found in the answer, case-insensitive."""
    return sum(output.lower() in answer.lower() for output in outputs) / len(outputs)
