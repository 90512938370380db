"""Prompts that look like use: retrieval, facts to be put together, and free answers about a document."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from tqdm import tqdm

from ..recipe import SearchSection
from ..tasks import agreement, ruler, synthetic
from ..tasks.example import Example, different, is_shorter, sentences, text_notes
from ..utils.distributed import Ranks
from ..utils.errors import UserError

# What is asked, by kind; prompts of a kind take these in turn.
RETRIEVAL = (
    "niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_single_3", "niah_multikey_2", "niah_multiquery",
    "niah_multikey_3",
)  # fmt: skip
MULTI_HOP = ("vt", "multi_hop", "repository", "arithmetic")
GROUPS = {"retrieval": RETRIEVAL, "multi-hop": MULTI_HOP}


def tasks_of(kind: str, kinds: Sequence[str]) -> list[str]:
    """The tasks that prompts of one of `kinds` take in turn: of a group, those that are no kind of their own."""
    return [task for task in GROUPS[kind] if task not in kinds] if kind in GROUPS else [kind]


def kind_of(item: Example, kinds: Sequence[str]) -> str:
    """Which of `kinds` an item was made for."""
    if item.task == agreement.TASK:
        return "free"
    return next((kind for kind in kinds if item.task in tasks_of(kind, kinds)), item.task)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a search, lengths and kinds in turn: half of them to search on, half to confirm, each of a half of
    the text of its own, since prompts that share text confirm what was found on it."""

    section: SearchSection
    tokenizer: Any
    prose: str
    items: tuple[Example, ...] = ()

    @cached_property
    def halves(self) -> tuple[str, str]:
        """The text of prompts to search on, and of those that confirm; the same where it is one sentence."""
        parts = sentences(self.prose)
        middle = len(parts) // 2
        return " ".join(parts[:middle] or parts), " ".join(parts[middle:])

    @cached_property
    def notes(self) -> list[str]:
        """What has to be said of the text, if anything: see `text_notes`, and whether prompts share parts of it."""
        lengths, shorter = self.section.lengths, min(self.halves, key=len)
        notes = text_notes(self.prose, lengths, self.tokenizer, shorter)
        if is_shorter(shorter, self.section.prompts * sum(lengths), self.tokenizer):
            notes.append(
                "Each half of the text is shorter than a kind's prompts that are made of it, together, so that they "
                "share parts of it, and intervals are narrower than those of as many different texts."
            )
        return notes

    def make(self, number: int, attempt: int = 0) -> Example:
        """The prompt `number`; each `attempt` gives another one of the same task and length.

        Raises:
            UserError: if its task does not fit into its length.
        """
        section = self.section
        slots = product((0, 1), range(section.prompts), section.kinds, section.lengths)
        half, index, kind, length = list(slots)[number]
        text = self.tokenizer, self.halves[half]
        if kind == "free":
            index, count = half * section.prompts + index, section.prompts
            return agreement.question(*text, length, index, count, section.answer_tokens, section.seed)
        if not (tasks := tasks_of(kind, section.kinds)):
            raise UserError(f"search.kinds: {kind} is nothing but tasks that are kinds of their own; leave it out")
        seed = section.seed + half
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
        """With the `items` that are tried first, which all of `ranks` make together.

        Raises:
            UserError: if one does not fit into its length, or two are the same, so that what confirms was searched on.
        """
        shard = tqdm(ranks.shard(range(2 * self.section.num_prompts)), desc="prompts", unit="prompt")
        items = ranks.all_gather([self.make(number) for number in shard])
        return replace(self, items=tuple(different("search.text", items)))
