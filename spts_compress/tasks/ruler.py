"""RULER's tasks (arXiv 2404.06654) but its two of questions, made on the spot for any tokenizer and length."""

import random
import string
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from typing import Any

from wonderwords import RandomWord

from ..utils.errors import UserError
from .example import Example, chat, fit_example, hide, longest, sentences

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
# RULER asks in the singular where one value is asked for.
NIAH_ONE, NIAH_ONE_PREFIX = (
    text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (NIAH, NIAH_PREFIX)
)
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
    """A needle-in-a-haystack task: haystack `prose`, or lines of `noise` or of other `needles`; kinds of keys and
    values; numbers of keys, of values a key, and of queried keys."""

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
def vocabulary() -> tuple[list[str], list[str], list[str]]:
    """Adjectives and nouns, of which keys are made, and verbs."""
    source = RandomWord()
    kinds = (source.filter(include_categories=[kind]) for kind in ("adjective", "noun", "verb"))
    adjectives, nouns, verbs = ([word for word in words if word.isalpha()] for words in kinds)
    return adjectives, nouns, verbs


def _token(kind: str, rng: random.Random) -> str:
    """A key or a value of a kind."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(rng.choice(words) for words in vocabulary()[:2])


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def _letters(alphabet: str, count: int, rng: random.Random) -> str:
    return "".join(rng.choices(alphabet, k=count))


def examples(
    task: str,
    tokenizer: Any,
    haystack: str,
    length: int,
    count: int,
    seed: int,
    answer_tokens: int | None = None,
    needles: Needles | None = None,
) -> list[Example]:
    """`count` prompts of a task, each of at most `length` tokens, answer included.

    Args:
        task: one of `TASKS`; any name with `needles`.
        haystack: text of the tasks that hide needles in prose; repeated if it is too short for `length`.
        seed: equal seeds, equal examples; every length has its own.
        answer_tokens: the answer's share of the length, by default the benchmark's.
        needles: a needle task of one's own.

    Raises:
        UserError: if the task does not fit into `length`.
    """
    needles = needles or NEEDLES.get(task)
    make: Callable[..., Example]
    if needles is not None:
        units = sentences(haystack) if needles.haystack == "prose" else [NOISE]
        make = partial(_needles, needles, units)
    else:
        make = MAKERS[task]
    answer_tokens = answer_tokens or ANSWER_TOKENS[task]
    result = []
    for index in range(count):
        rng = random.Random(f"{task} {needles} {length} {seed} {index}")
        fit = partial(fit_example, task, index, tokenizer, limit=length, answer_tokens=answer_tokens)
        result.append(make(fit, tokenizer, length, rng))
    return result


Fit = Callable[..., Example]  # `fit_example` for one task and length


def _needles(
    needles: Needles, haystack: list[str], fit: Fit, tokenizer: Any, limit: int, rng: random.Random
) -> Example:
    keys = _distinct(needles.keys, partial(_token, needles.key_kind, rng))
    drawn = iter(_distinct(needles.keys * needles.values, partial(_token, needles.value_kind, rng)))
    values = {key: list(islice(drawn, needles.values)) for key in keys}

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
    between = " " if needles.haystack == "prose" else "\n"
    others: list[str] = []  # a haystack of needles grows as it is asked for; no key or value is given twice
    used = {*keys, *(value for of_key in values.values() for value in of_key)}

    def unit(number: int) -> str:
        if needles.haystack != "needles":
            return haystack[(offset + number) % len(haystack)]
        while len(others) <= number:
            key, value = _token(needles.key_kind, rng), _token(needles.value_kind, rng)
            if not {key, value} & used:
                used.update((key, value))
                others.append(needle(key, value))
        return others[number]

    def build(count: int, rest: str) -> str:
        text = hide(hidden, depths, [unit(i) for i in range(count)])
        context = between.join([*text, rest] if rest else text)
        return chat(tokenizer, template.format(kind=kind, context=context, query=query), prefix)

    outputs = [value for key in asked for value in values[key]]
    depth = depths[0] if len(hidden) == 1 else None
    return fit(build, filler=unit, outputs=outputs, answer_prefix=prefix, depth=depth)


def _chain(letters: int, value: str, rng: random.Random) -> tuple[list[str], Callable[..., str]]:
    """The names of five variables, of so many letters, and the question for them, made of a number of lines of noise
    and a rest. The first variable gets the value, each further one the variable before it."""
    names = _distinct(5, partial(_letters, string.ascii_uppercase, letters, rng))
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {after} = VAR {before} " for before, after in pairwise(names))]
    depths = sorted(rng.random() for _ in lines)

    def question(count: int, rest: str = "") -> str:
        text = hide(lines, depths, [NOISE] * count)
        return VT.format(context="\n".join([*text, rest] if rest else text), query=value)

    return names, question


def _variables(fit: Fit, tokenizer: Any, limit: int, rng: random.Random) -> Example:
    """A chain to be found, after a solved one of at most 500 tokens, or half the prompt."""
    value, known = _distinct(2, lambda: str(rng.randint(10_000, 99_999)))
    names, solved = _chain(3, known, rng)
    chain, question = _chain(5, value, rng)
    prefix, solution = (VT_PREFIX.format(count=5, query=query) for query in (value, known))

    def shown(count: int) -> str:
        return solved(count) + solution

    lines = longest(shown, tokenizer, min(500, limit // 2), most=100)
    example = f"{shown(lines)} {' '.join(names)}\n\n"

    def build(count: int, rest: str) -> str:
        return chat(tokenizer, example + question(count, rest), prefix)

    return fit(build, filler=lambda number: NOISE, outputs=chain, answer_prefix=prefix)


def _word_list(words: list[str], ranks: list[float]) -> str:
    """The question for the words in the order of their ranks; the same ranks at every size, so that sizes nest."""
    shuffled = [word for _, word in sorted(zip(ranks, words, strict=False))]
    return CWE.format(context=_numbered(shuffled))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _common_words(fit: Fit, tokenizer: Any, limit: int, rng: random.Random) -> Example:
    """Ten words `often` among words that come `seldom`, after a solved list of `known` words."""
    often, seldom, known, known_often, known_seldom = (30, 3, 40, 10, 3) if limit >= 4096 else (6, 1, 20, 3, 1)
    pool = sorted({word for words in vocabulary() for word in words})
    rng.shuffle(pool)
    common, others = pool[:10], pool[10:]
    ranks, seed = [rng.random() for _ in range(limit)], rng.random()
    sample = rng.sample(pool, known)
    solved = _word_list(sample[:10] * known_often + sample[10:] * known_seldom, ranks[::-1])
    example = f"{solved}{CWE_PREFIX} {_numbered(sample[:10])}\n"

    def build(count: int, rest: str) -> str:
        # once there are no more words, pairs of them
        pairs = _distinct(count - len(others), partial(_token, "words", random.Random(seed)))
        rare = [word for word in [*others[:count], *pairs] for _ in range(seldom)]
        return chat(tokenizer, example + _word_list(common * often + rare, ranks), CWE_PREFIX)

    return fit(build, outputs=common, answer_prefix=CWE_PREFIX)


def _frequent_words(fit: Fit, tokenizer: Any, limit: int, rng: random.Random) -> Example:
    """Coded words whose counts fall as 1 / rank^2; the most frequent "word" is dots, the answer ranks 2 to 4."""
    coded = ["...", *_distinct(2000, partial(_letters, string.ascii_lowercase, 6, rng))]
    weights = [rank**-2.0 for rank in range(1, len(coded) + 1)]
    scale = 1 / sum(weights)
    ranks = [rng.random() for _ in range(2 * limit)]

    def build(count: int, rest: str) -> str:
        counts = [int(count * weight * scale) for weight in weights]
        listed = [word for word, number in zip(coded, counts, strict=True) for _ in range(number)]
        shuffled = [word for _, word in sorted(zip(ranks, listed, strict=False))]
        return chat(tokenizer, FWE.format(context=" ".join(shuffled)), FWE_PREFIX)

    example = fit(build, outputs=coded[1:4], answer_prefix=FWE_PREFIX)
    words = Counter(example.text.split())
    if words[coded[3]] == words[coded[4]]:
        raise UserError(f"fwe: in {limit} tokens the third and fourth most frequent words are as frequent; take more")
    return example


MAKERS: dict[str, Callable[..., Example]] = {"vt": _variables, "cwe": _common_words, "fwe": _frequent_words}
