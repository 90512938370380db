"""The eleven synthetic RULER tasks (arXiv 2404.06654), made on the spot for any tokenizer and length."""

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

from wonderwords import RandomWord

from .example import Item, chat, counted, filled, sentences

NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# RULER asks in the singular where one value is asked for.
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class Needles:
    """A needle-in-a-haystack task: haystack `noise`, `prose` or other `needles`; kinds of keys and values; numbers of
    keys, of values a key, and of queried keys."""

    haystack: str = "prose"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_kind="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", "uuids", "uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}
ANSWER_TOKENS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50}
TASKS = tuple(ANSWER_TOKENS)


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Adjectives and nouns that keys are made of."""
    source = RandomWord()
    found = (source.filter(include_categories=[kind]) for kind in ("adjective", "noun"))
    adjectives, nouns = ([word for word in words if word.isalpha()] for words in found)
    return adjectives, nouns


def _token(kind: str, rng: random.Random) -> str:
    """A key or a value of a kind."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(rng.choice(words) for words in vocabulary())


def _different(kind: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_token(kind, rng)] = None
    return list(found)


def items(
    task: str,
    tokenizer: Any,
    prose: str,
    length: int,
    count: int,
    seed: int,
    answer_tokens: int | None = None,
    needles: Needles | None = None,
) -> list[Item]:
    """`count` prompts of a task, each of at most `length` tokens, answer included.

    Args:
        task: one of `TASKS`; any name with `needles`.
        prose: haystack of the tasks that hide needles in prose; repeated if it is too short for `length`.
        seed: equal seeds, equal items; every length has its own.
        answer_tokens: the answer's share of the length, by default the benchmark's.
        needles: a needle task of one's own.
    """
    needles = needles or NEEDLES.get(task)
    make: Callable[..., Item]
    if needles is not None:
        haystack = sentences(prose) if needles.haystack == "prose" else NOISE
        make = partial(_needles, needles, haystack)
    else:
        make = {"vt": _variables, "cwe": _common_words, "fwe": _frequent_words}[task]
    answer = answer_tokens or ANSWER_TOKENS[task]
    return [
        make(task, index, tokenizer, length, answer, random.Random(f"{task} {needles} {length} {seed} {index}"))
        for index in range(count)
    ]


def _item(task: str, index: int, tokenizer: Any, text: str, limit: int, answer: int, **more: Any) -> Item:
    tokens = counted(task, tokenizer, text, limit, answer)
    return Item(task, index, text, tokens=tokens, limit=limit, answer_tokens=answer, **more)


def _needles(
    needles: Needles,
    haystack: list[str],
    task: str,
    index: int,
    tokenizer: Any,
    limit: int,
    answer: int,
    rng: random.Random,
) -> Item:
    keys = _different(needles.key_kind, needles.keys, rng)
    values = dict(
        zip(keys, _chunks(_different(needles.value_kind, needles.keys * needles.values, rng), keys), strict=True)
    )

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(kind=needles.value_kind, key=key, value=value)

    hidden = [needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    asked = rng.sample(keys, needles.queries)
    query = ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]
    one = needles.queries * needles.values == 1
    template, prefix = (NIAH_ONE, NIAH_ONE_PREFIX) if one else (NIAH, NIAH_PREFIX)
    kind = needles.value_kind.removesuffix("s") if one else needles.value_kind
    prefix = prefix.format(kind=kind, query=query)
    offset = rng.randrange(len(haystack)) if needles.haystack == "prose" else 0
    depths = sorted(rng.random() for _ in hidden)
    others: list[str] = []  # a haystack of needles grows as it is asked for; no key or value is given twice
    used = {*keys, *(value for made in values.values() for value in made)}

    def unit(number: int) -> str:
        if needles.haystack != "needles":
            return haystack[(offset + number) % len(haystack)]
        while len(others) <= number:
            key, value = _token(needles.key_kind, rng), _token(needles.value_kind, rng)
            if not {key, value} & used:
                used.update((key, value))
                others.append(needle(key, value))
        return others[number]

    def build(size: int, rest: str) -> str:
        text = [unit(i) for i in range(size)]
        for depth, line in sorted(zip(depths, hidden, strict=True), reverse=True):
            text.insert(round(depth * size), line)
        context = " ".join([*text, rest] if rest else text)
        return chat(tokenizer, template.format(kind=kind, context=context, query=query), prefix)

    text = filled(build, unit, tokenizer, limit - answer)
    outputs = [value for key in asked for value in values[key]]
    depth = depths[0] if len(hidden) == 1 else None
    return _item(task, index, tokenizer, text, limit, answer, outputs=outputs, answer_prefix=prefix, depth=depth)


def _chunks(values: list[str], keys: list[str]) -> list[list[str]]:
    size = len(values) // len(keys)
    return [values[i * size : (i + 1) * size] for i in range(len(keys))]


def _variables(task: str, index: int, tokenizer: Any, limit: int, answer: int, rng: random.Random) -> Item:
    """One chain of five variables: the first gets the value, each further one the variable before it."""
    names: dict[str, None] = {}
    while len(names) < 5:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    chain, value = list(names), str(rng.randint(10_000, 99_999))
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {after} = VAR {before}" for before, after in pairwise(chain)]
    depths = sorted(rng.random() for _ in lines)
    prefix = VT_PREFIX.format(count=len(chain), query=value)

    def build(size: int, rest: str) -> str:
        text = [NOISE[i % len(NOISE)] for i in range(size)]
        for depth, line in reversed(list(zip(depths, lines, strict=True))):
            text.insert(round(depth * size), line + ".")
        context = " ".join([*text, rest] if rest else text)
        return chat(tokenizer, VT.format(context=context, query=value), prefix)

    text = filled(build, lambda i: NOISE[i % len(NOISE)], tokenizer, limit - answer)
    return _item(task, index, tokenizer, text, limit, answer, outputs=chain, answer_prefix=prefix)


def _common_words(task: str, index: int, tokenizer: Any, limit: int, answer: int, rng: random.Random) -> Item:
    """Ten words thirty times each among words that come three times, in a shuffled numbered list."""
    pool = sorted({word for words in vocabulary() for word in words})
    rng.shuffle(pool)
    common, others = pool[:10], pool[10:]
    order = random.Random(rng.random())
    ranks = [order.random() for _ in range(limit)]  # the same shuffle at every size, so that sizes nest

    def build(size: int, rest: str) -> str:
        listed = common * 30 + [others[i // 3 % len(others)] for i in range(3 * (size - 1))]
        shuffled = [word for _, word in sorted(zip(ranks, listed, strict=False))]
        context = " ".join(f"{i}. {word}" for i, word in enumerate(shuffled, 1))
        return chat(tokenizer, CWE.format(context=context), CWE_PREFIX)

    text = filled(build, lambda _: "", tokenizer, limit - answer)
    return _item(task, index, tokenizer, text, limit, answer, outputs=common, answer_prefix=CWE_PREFIX)


def _frequent_words(task: str, index: int, tokenizer: Any, limit: int, answer: int, rng: random.Random) -> Item:
    """Coded words whose counts fall as 1 / rank^2; the most frequent "word" is dots, the answer ranks 2 to 4."""
    words: dict[str, None] = {}
    while len(words) < 2000:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded = ["...", *words]
    weights = [rank**-2.0 for rank in range(1, len(coded) + 1)]
    scale = 1 / sum(weights)
    ranks = [rng.random() for _ in range(2 * limit)]

    def build(size: int, rest: str) -> str:
        counts = [int(size * weight * scale) for weight in weights]
        listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        shuffled = [word for _, word in sorted(zip(ranks, listed, strict=False))]
        return chat(tokenizer, FWE.format(context=" ".join(shuffled)), FWE_PREFIX)

    text = filled(build, lambda _: "", tokenizer, limit - answer)
    return _item(task, index, tokenizer, text, limit, answer, outputs=coded[1:4], answer_prefix=FWE_PREFIX)
