"""What every task makes: prompts of a given length with known answers."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any
from unicodedata import category

from ..utils.errors import UserError

TIME, DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""), datetime(2024, 7, 26)
PROSE = 0.5  # prompts made of less than this share of a text are not like it
# Of scripts that have marks of their own, some of which put no space after a sentence.
ENDS, COMMAS, CLOSING = "。！？।؟۔።။។", "，、،", "”’」』）"  # noqa: RUF001


@dataclass(frozen=True)
class Example:
    """One prompt with what its answer is judged by.

    `text` ends where the answer begins; it carries the chat template and, last, `answer_prefix`. `tokens` is its
    length, `limit` what it was made for (answer included). `outputs`: references. `scorer`: a name in
    `scorers.SCORERS`. `depth`: where in the text the needle lies (0 to 1), if there is one. `follow_up`: text of a
    further turn, sent on the same cache after the first answer; then the second answer is the one that is judged.
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

    def to_row(self) -> dict[str, Any]:
        """As plain data, without the prompt's text."""
        return {name: value for name, value in asdict(self).items() if name not in ("text", "follow_up")}


def rendered(tokenizer: Any, turns: list[dict[str, Any]], ask: bool = True) -> str:
    """What the chat template makes of `turns`, and with `ask` the start of an answer. A template that states the time
    is given the same day always: else no prompt would be the same again, and nothing that was made of one be found."""
    template = tokenizer.get_chat_template()
    dated = TIME.sub(lambda call: repr(DAY.strftime(call[2])), template)
    options = {} if dated == template else {"chat_template": dated}
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **options)


def chat(tokenizer: Any, user: str, answer_prefix: str = "") -> str:
    """The user's turn in the model's chat template (plain where it has none), and the start of the answer."""
    if getattr(tokenizer, "chat_template", None):
        return rendered(tokenizer, [{"role": "user", "content": user}]) + answer_prefix
    return user + answer_prefix


def plain(tokenizer: Any, text: str) -> str:
    """`text` without the chat template, for prompts read without the tokenizer's special tokens, as `token_count` does
    where there is a template: with the BOS that the tokenizer would have put first."""
    begins = getattr(tokenizer, "chat_template", None) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token + text if begins else text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt: without special ones where a chat template has put them, else with those that the tokenizer
    puts first. The one that some put last would end the answer before it begins."""
    special = not getattr(tokenizer, "chat_template", None)
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids[:-1] if special and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id] else ids


def token_count(tokenizer: Any, text: str) -> int:
    return len(token_ids(tokenizer, text))


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


def fit_example(
    task: str,
    index: int,
    tokenizer: Any,
    build: Callable[[int, str], str],
    limit: int,
    answer_tokens: int,
    filler: Callable[[int], str] = lambda number: "",
    room: int | None = None,
    **fields: Any,
) -> Example:
    """The example whose prompt comes closest from below to `limit` tokens without its answer.

    Args:
        build: makes the prompt from a number of units and a rest, which is part of one more unit.
        filler: the unit with a given number; words of it, long ones in pieces, make up the rest.
        room: tokens left free in place of `answer_tokens`.
        fields: further values of the example.

    Raises:
        UserError: if even the shortest prompt does not fit, or none comes near.
    """
    room = room or answer_tokens
    count = longest(lambda count: build(count, ""), tokenizer, limit - room, most=limit - room)
    unit = filler(count)
    ends = [0, *(piece.end() for piece in re.finditer(r"\S{1,16}", unit))]

    def filled(pieces: int) -> str:
        return build(count, " ".join(unit[: ends[pieces]].split()))

    text = filled(longest(filled, tokenizer, limit - room, most=len(ends) - 1) if unit else 0)
    if (tokens := token_count(tokenizer, text)) > limit - room:
        raise UserError(f"{task} does not fit into {limit} tokens: the least it needs is {tokens + room}")
    if (short := limit - room - tokens) > max(64, limit // 10):
        raise UserError(f"{task}: a prompt for {limit} tokens comes out {short} too short of this text; give another")
    return Example(task, index, text, tokens=tokens, limit=limit, answer_tokens=answer_tokens, **fields)


def hide(facts: Sequence[str], depths: Sequence[float], units: list[str]) -> list[str]:
    """`units` of text with every fact put in at its depth, from 0 to 1; `depths` rise."""
    count = len(units)
    for depth, fact in reversed(list(zip(depths, facts, strict=True))):
        units.insert(round(depth * count), fact)
    return units


def ask_about(
    task: str,
    index: int,
    tokenizer: Any,
    parts: list[str],
    start: int,
    question: str,
    limit: int,
    answer_tokens: int,
) -> Example:
    """A prompt for a free answer about a stretch of the sentences `parts` from `start` on, which stands in `question`
    in the place of {context}."""

    def unit(number: int) -> str:
        return parts[(start + number) % len(parts)]

    def build(count: int, rest: str) -> str:
        context = " ".join([*map(unit, range(count)), *([rest] if rest else [])])
        return chat(tokenizer, question.replace("{context}", context))

    return fit_example(task, index, tokenizer, build, limit, answer_tokens, unit, outputs=[])


def places(parts: list[str], count: int, first: float = 0.0) -> list[int]:
    """`count` of the sentences `parts`, with as much text from each to the next, and from the last one round to the
    first, which is the one at `first` of the text, from 0 to 1; of few sentences as many from each to the next."""
    ends, shares = list(accumulate(map(len, parts))), [(first + number / count) % 1 for number in range(count)]
    starts = [bisect_right(ends, share * ends[-1]) for share in shares]
    return starts if len(set(starts)) == count else [int(share * len(parts)) for share in shares]


def different(task: str, examples: list[Example]) -> list[Example]:
    """The examples.

    Raises:
        UserError: if two are the same prompt, which would count twice and narrow intervals.
    """
    if len({example.text for example in examples}) < len(examples):
        raise UserError(
            f"{task}: the text is too short, or too much alike, for {len(examples)} different prompts; name another"
        )
    return examples


def _is_plain(letter: str) -> bool:
    return letter.isalpha() or letter in f" ,.{COMMAS}{ENDS}" or category(letter).startswith("M")


def is_shorter(text: str, tokens: int, tokenizer: Any) -> bool:
    """Whether a text's sentences have fewer than so many `tokens`: prompts of as many together share parts of it."""
    return token_count(tokenizer, " ".join(sentences(text))[: 16 * tokens]) < tokens  # no more than tells


def text_notes(text: str, lengths: Sequence[int], tokenizer: Any, part: str | None = None) -> list[str]:
    """What has to be said of a text that prompts of so many tokens are made of, if anything: that most of it is not in
    them, or that it is shorter than one, in which it then stands more than once.

    Args:
        part: the shortest part of the text that a prompt is made of; all of it by default.
    """
    share, notes = sum(map(len, sentences(text))) / len(re.sub(r"\s+", " ", text)), list[str]()
    if share < PROSE:
        notes.append(
            f"Only {share:.0%} of the text is sentences in plain words, of which alone prompts are made: they are not "
            "like the rest of it."
        )
    longer = [f"{length}" for length in lengths if is_shorter(part or text, length, tokenizer)]
    if longer:
        notes.append(
            f"The text is shorter than a prompt of {' and '.join(longer)} tokens, in which it stands more than once."
        )
    return notes


def sentences(prose: str) -> list[str]:
    """The sentences of a text, white space folded and long ones in parts; headings, tables and code in between are left
    out.

    Raises:
        UserError: if there is none.
    """
    whole = re.split(rf"(?<=[.!?])\s+|(?<=[{ENDS}])(?![{ENDS}{CLOSING}])\s*", re.sub(r"\s+", " ", prose))
    parts = [part for sentence in whole for part in re.findall(r"\S.{0,299}(?!\S)|\S.{0,299}", sentence)]
    # in bytes, since a letter of some scripts says as much as several Latin ones
    plain = [s for s in parts if len(s.encode(errors="replace")) >= 20 and sum(map(_is_plain, s)) >= 0.92 * len(s)]
    if not plain:
        raise UserError("the text that prompts are made of has no sentence in plain words; name another text for them")
    return plain
