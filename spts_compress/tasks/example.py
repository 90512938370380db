"""What every task makes: prompts of a given length with known answers."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.errors import UserError


@dataclass(frozen=True)
class Item:
    """One prompt with what its answer is judged by.

    `text` ends where the answer begins; it carries the chat template and, last, `answer_prefix`. `tokens` is its
    length, `limit` what it was made for (answer included). `outputs`: references. `scorer`: a name in
    `scorers.SCORERS`.
    `depth`: where in the text the needle lies (0 to 1), if there is one. `follow_up`: text of a further turn, sent on
    the same cache after the first answer; then the second answer is the one that is judged.
    """

    task: str
    index: int
    text: str
    outputs: list[str]
    tokens: int
    limit: int
    answer_tokens: int
    answer_prefix: str = ""
    scorer: str = "contains"
    depth: float | None = None
    follow_up: str | None = None
    classes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain data, without the prompt's text."""
        return {name: value for name, value in asdict(self).items() if name not in ("text", "follow_up")}


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
    """The largest size up to `most` for which `build(size)` has at most `limit` tokens; 0 if there is none."""
    low, high, guess, steps = 0, most + 1, min(32, most), 0
    while low + 1 < high:
        count = token_count(tokenizer, build(guess))
        low, high = (guess, high) if count <= limit else (low, guess)
        steps += 1  # a guess by proportion needs few prompts to be made; halving ends what it does not
        guess = round(guess * limit / count) if steps < 6 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low


def filled(build: Callable[[int, str], str], filler: Callable[[int], str], tokenizer: Any, limit: int) -> str:
    """The prompt that comes closest to `limit` tokens from below.

    Args:
        build: makes the prompt from a number of units and a rest, which is part of one more unit.
        filler: the unit with a given number; its words make up the rest.
    """
    size = longest(lambda size: build(size, ""), tokenizer, limit, most=limit)
    words = filler(size).split()
    count = (
        longest(lambda count: build(size, " ".join(words[:count])), tokenizer, limit, most=len(words)) if words else 0
    )
    return build(size, " ".join(words[:count]))


def about(parts: list[str], start: int, tokenizer: Any, limit: int, ask: Callable[[str], str]) -> str:
    """`ask(context)` of at most `limit` tokens; the context is a stretch of the sentences `parts` from `start` on."""

    def unit(number: int) -> str:
        return parts[(start + number) % len(parts)]

    def build(size: int, rest: str) -> str:
        return ask(" ".join([*map(unit, range(size)), *([rest] if rest else [])]))

    return filled(build, unit, tokenizer, limit)


def counted(task: str, tokenizer: Any, text: str, limit: int, room: int) -> int:
    """Tokens of a prompt.

    Raises:
        UserError: if they leave less than `room` of `limit`.
    """
    tokens = token_count(tokenizer, text)
    if tokens > limit - room:
        raise UserError(f"{task} does not fit into {limit} tokens: the least it needs is {tokens + room}")
    return tokens


def sentences(prose: str) -> list[str]:
    """The sentences of a text, white space folded; headings, tables and code in between are left out.

    Raises:
        UserError: if there is none.
    """
    parts = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", prose))
    found = [s for s in parts if len(s) >= 20 and sum(c.isalpha() or c in " ,." for c in s) >= 0.92 * len(s)]
    if not found:
        raise UserError("the text that prompts are made of has no sentence in plain words; name another text for them")
    return found
