"""Prompts that look like use: retrieval, facts to be put together, and free answers about a document."""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tqdm import tqdm

from ..recipe import SearchSection
from ..tasks import agreement, ruler, synthetic
from ..tasks.example import Example, ask_about, sentences
from ..utils.distributed import Ranks
from ..utils.errors import UserError

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


def kind_of(item: Example, kinds: Sequence[str]) -> str:
    """Which of `kinds` an item was made for."""
    if item.task == agreement.TASK:
        return "free"
    return next((kind for kind in kinds if kind == item.task or item.task in GROUPS.get(kind, ())), item.task)


def _free(tokenizer: Any, prose: str, length: int, index: int, tokens: int, seed: int) -> Example:
    """A question about a stretch of `prose` from a random place."""
    rng, parts = random.Random(f"{seed} {index} {length}"), sentences(prose)
    start = rng.randrange(len(parts))
    words = [word.strip(".,;:()'\"") for word in " ".join(parts[start : start + 40]).split()]
    term = rng.choice([word for word in words if len(word) > 6] or words)
    question = FREE[index % len(FREE)].replace("{term}", term)
    return ask_about(agreement.TASK, index, tokenizer, parts, start, question, length, tokens)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a search, lengths and kinds in turn: half of them to search on, half to confirm."""

    section: SearchSection
    tokenizer: Any
    prose: str
    items: tuple[Example, ...] = ()

    def make(self, number: int, attempt: int = 0) -> Example:
        """The prompt `number`; each `attempt` gives another one of the same task and length.

        Raises:
            UserError: if its task does not fit into its length.
        """
        section, text = self.section, (self.tokenizer, self.prose)
        slots = product((section.seed, section.seed + 1), range(section.prompts), section.kinds, section.lengths)
        seed, index, kind, length = list(slots)[number]
        if kind == "free":
            return _free(*text, length, index, section.answer_tokens, seed)
        tasks = GROUPS.get(kind, (kind,))
        task, seed = tasks[(index + seed) % len(tasks)], seed * 1000 + index + attempt * 1_000_000
        if task in ruler.TASKS:
            return ruler.examples(task, *text, length, 1, seed, section.answer_tokens)[0]
        return synthetic.examples(task, *text, length, 1, seed)[0]

    def attempt(self, number: int, attempt: int) -> Example:
        """The prompt `number`, or a later attempt at it; where that does not fit, which is a matter of a few tokens,
        the first one again."""
        if attempt:
            with suppress(UserError):
                return self.make(number, attempt)
        return self.items[number]

    def filled(self, ranks: Ranks) -> "PromptSet":
        """With the `items` that are tried first, which all of `ranks` make together."""
        shard = tqdm(ranks.shard(range(2 * self.section.num_prompts)), desc="prompts", unit="prompt")
        return replace(self, items=tuple(ranks.all_gather([self.make(number) for number in shard])))
