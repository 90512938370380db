"""Tasks unlike needles, made on the spot: what is asked for lies in many places, or is only known by computing.

- `multi_hop`: documents about people and places; the answer is two documents away from the one that is named.
- `repository`: a generated package of modules; a constant is defined far from the function that uses it.
- `arithmetic`: amounts spread over the text, to be added.
- `counting`: how many of the reports in the text name a colour.
- `multi_turn`: two numbers hidden in one text; the second is asked for in a later turn on the same cache.
"""

import random
from typing import Any, NamedTuple

from .example import Example, chat, fit_example, hide, rendered, sentences, token_count
from .ruler import vocabulary

COLOURS = ("red", "blue", "green", "white", "black", "yellow")


class Puzzle(NamedTuple):
    """What is said first, the facts in the order of the text, the question with the start of its answer, the answer,
    and a later question, which then is the one with that answer."""

    instruction: str
    facts: list[str]
    question: str
    answer_prefix: str
    answer: str
    later: str | None = None


def _names(count: int, rng: random.Random) -> list[str]:
    """Different capitalised made-up names."""
    nouns = rng.sample(vocabulary()[1], 2 * count)
    return [f"{a.capitalize()}{b.lower()}" for a, b in zip(nouns[::2], nouns[1::2], strict=True)]


def _multi_hop(rng: random.Random) -> Puzzle:
    people, towns, rivers = (_names(6, rng) for _ in range(3))
    facts = []
    for person, town, river in zip(people, towns, rivers, strict=True):
        facts += [f"Document about {person}: {person} lives in the town of {town}."]
        facts += [f"Document about {town}: the town of {town} lies on the river {river}."]
    rng.shuffle(facts)
    who = rng.randrange(len(people))
    question = f"Which river does the town lie on in which {people[who]} lives? Answer with the name of the river only."
    return Puzzle("Read the documents.", facts, question, " The river is", rivers[who])


def _arithmetic(rng: random.Random) -> Puzzle:
    names = _names(8, rng)
    amounts = [rng.randint(2, 40) for _ in names]
    facts = [f"The shop sold {amount} boxes to {name}." for name, amount in zip(names, amounts, strict=True)]
    first, second = rng.sample(range(len(names)), 2)
    question = (
        f"How many boxes did the shop sell to {names[first]} and to {names[second]} together? Answer with the sum only."
    )
    prefix = f" The shop sold {names[first]} and {names[second]} together this number of boxes:"
    return Puzzle("Remember what the shop sold.", facts, question, prefix, str(amounts[first] + amounts[second]))


def _counting(rng: random.Random) -> Puzzle:
    colour, other = rng.sample(COLOURS, 2)
    many, few = rng.randint(3, 9), rng.randint(3, 9)
    facts = [f"Report: a {colour} car passed the gate."] * many + [f"Report: a {other} car passed the gate."] * few
    rng.shuffle(facts)
    question = f"How many reports in the text say that a {colour} car passed the gate? Answer with the number only."
    prefix = f" The number of reports of a {colour} car is"
    return Puzzle("Watch for the reports in the text.", facts, question, prefix, str(many))


def _multi_turn(rng: random.Random) -> Puzzle:
    names = _names(2, rng)
    codes = [str(rng.randint(1_000_000, 9_999_999)) for _ in names]
    facts = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    question = f"What is the code of {names[0]} mentioned in the text? Answer with the number only."
    later = f"What is the code of {names[1]} mentioned in the text? Answer with the number only."
    return Puzzle("Remember the codes in the text.", facts, question, f" The code of {names[0]} is", codes[1], later)


def _repository(rng: random.Random) -> Puzzle:
    names = [name.lower() for name in _names(24, rng)]
    values = rng.sample(range(100, 1000), len(names))
    modules = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        user = names[(i + 1) % len(names)]
        modules.append(
            f"# file: {name}.py\nfrom {user} import LIMIT_{user.upper()}\n\nLIMIT_{name.upper()} = {value}\n\n\n"
            f"def check_{name}(amount):\n    return amount <= LIMIT_{user.upper()}\n"
        )
    which = rng.randrange(len(names))
    used = (which + 1) % len(names)
    question = (
        f"In this repository, what is the largest integer for which check_{names[which]} returns True? "
        "Answer with the number only."
    )
    return Puzzle("Read this repository.", modules, question, " The largest integer is", str(values[used]))


MAKERS = {
    "multi_hop": _multi_hop,
    "repository": _repository,
    "arithmetic": _arithmetic,
    "counting": _counting,
    "multi_turn": _multi_turn,
}
TASKS = tuple(MAKERS)
ANSWER_TOKENS = 32


def examples(task: str, tokenizer: Any, haystack: str, length: int, count: int, seed: int) -> list[Example]:
    """`count` prompts of a task of at most `length` tokens, answers included.

    Args:
        haystack: text between the facts (`repository` has code of its own instead).
    """
    filling = sentences(haystack)
    return [_make(task, index, tokenizer, filling, length, seed) for index in range(count)]


def _make(task: str, index: int, tokenizer: Any, filling: list[str], length: int, seed: int) -> Example:
    rng = random.Random(f"{task} {length} {seed} {index}")
    puzzle = MAKERS[task](rng)
    offset, depths = rng.randrange(len(filling)), sorted(rng.random() for _ in puzzle.facts)
    code = task == "repository"

    def unit(number: int) -> str:
        if not code:
            return filling[(offset + number) % len(filling)]
        name = f"helper_{number:04}"
        return f"# file: {name}.py\ndef {name}(items):\n    return [item + {number % 97} for item in items]\n"

    def build(count: int, rest: str) -> str:
        text = hide(puzzle.facts, depths, [unit(i) for i in range(count)])
        if rest:
            text.append(f"# {rest}" if code else rest)
        context = ("\n\n" if code else " ").join(text)
        return chat(tokenizer, f"{puzzle.instruction}\n\n{context}\n\n{puzzle.question}", puzzle.answer_prefix)

    follow_up, room = None, ANSWER_TOKENS
    if puzzle.later is not None:  # a later turn and two answers must fit as well
        follow_up = further_turn(tokenizer, puzzle.later)
        room = 2 * ANSWER_TOKENS + token_count(tokenizer, follow_up)
    return fit_example(
        task, index, tokenizer, build, length, ANSWER_TOKENS, unit, room,
        outputs=[puzzle.answer], answer_prefix=puzzle.answer_prefix, follow_up=follow_up,
        scorer="number" if puzzle.answer.isdigit() else "contains",
    )  # fmt: skip


def further_turn(tokenizer: Any, question: str) -> str:
    """What follows an answer when the user asks again: the template's end of the turn, the question, a new answer."""
    if not getattr(tokenizer, "chat_template", None):
        return f"\n\n{question}\n"
    mark = "ANSWER-6d1f0c"  # which no template and no question says itself
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    more = [*turns, {"role": "user", "content": question}]
    return rendered(tokenizer, more).split(mark, 1)[1]
