"""LongBench (arXiv 2308.14508) in its own format, from a folder."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.layout import read_json
from ..utils.errors import UserError, reason
from .example import Example, chat, plain, token_count

SCORER = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), "f1"),
    "multifieldqa_zh": "f1_chinese",
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge"),
    **dict.fromkeys(("dureader", "vcsum"), "rouge_chinese"),
    **dict.fromkeys(("trec", "lsht"), "classification"),
    "passage_count": "count",
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), "paragraph"),
    **dict.fromkeys(("lcc", "repobench-p"), "code"),
}
TASKS = tuple(SCORER)
WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # few-shot and code completion
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
LINE = "input and context (texts), answers (a list of texts, one or more), all_classes (a list of texts, or null)"


class LongBench:
    """Where the data is: `source` is a folder with `TASK.jsonl` files and the benchmark's `dataset2prompt.json` and
    `dataset2maxlen.json`.

    Raises:
        UserError: if something is missing or not in the format, naming it.
    """

    def __init__(self, source: str):
        self.folder = Path(source)
        if not self.folder.is_dir():
            raise UserError(
                f"{source}: not a folder; give the one that holds {PROMPTS} and files such as {TASKS[0]}.jsonl"
            )
        self.prompts, self.lengths = _mapping(self.folder / PROMPTS), _mapping(self.folder / LENGTHS)

    def tasks(self) -> list[str]:
        """The tasks that are there."""
        there = [name for name in TASKS if os.path.lexists(self.folder / f"{name}.jsonl")]
        if not there:
            raise UserError(f"{self.folder}: no LongBench file such as {TASKS[0]}.jsonl in this folder")
        return there

    def examples(
        self, task: str, tokenizer: Any, length: int, count: int, answer_tokens: int | None = None
    ) -> list[Example]:
        """The first `count` examples of a task, cut in the middle to at most `length` tokens, answer included, which
        has `answer_tokens` (by default as many as the task says)."""
        if task not in self.tasks():
            raise UserError(f"{task} is not in {self.folder}; it has {', '.join(self.tasks())}")
        how, template, room = SCORER[task], self.prompts.get(task), self.lengths.get(task)
        made: dict[str, Example] = {}
        if not isinstance(template, str) or "{context}" not in template:
            raise UserError(f"{self.folder / PROMPTS}: no text for {task}; give its prompt, with {{context}} in it")
        if not isinstance(room, int) or room < 1:
            raise UserError(f"{self.folder / LENGTHS}: no number for {task}; give how many tokens its answers have")
        room = answer_tokens or room
        for index, row in zip(range(count), self._rows(task), strict=False):
            try:
                prompt = template.format(**row)
            except (LookupError, ValueError, AttributeError) as error:
                raise UserError(f"{self.folder / PROMPTS}: {task} can't be filled in: {reason(error)}") from None
            text = _cut(prompt, tokenizer, length - room, task not in WITHOUT_CHAT)
            tokens, names = token_count(tokenizer, text), row["all_classes"] or []
            example = Example(task, index, text, row["answers"], tokens, length, room, scorer=how, classes=names)
            made.setdefault(text, example)  # equal lines count once
        return list(made.values())

    def documents(self, task: str, count: int) -> list[str]:
        """What the first `count` examples of a task are about."""
        return [row["context"] for _, row in zip(range(count), self._rows(task), strict=False)]

    def _rows(self, task: str) -> Iterator[dict]:
        path = self.folder / f"{task}.jsonl"
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:  # or no UTF-8
                    row = None
                yield _checked(row, task, f"{path}:{number}")


def _checked(row: Any, task: str, where: str) -> dict:
    """A line of a task, which `where` names, if it is in LongBench's format."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    answers, classes = row.get("answers"), row.get("all_classes", ())
    whole = {name: isinstance(row.get(name), str) for name in ("input", "context")}
    whole["answers"] = _are_texts(answers) and answers != []
    whole["all_classes"] = classes is None or _are_texts(classes)
    if bad := [name for name, good in whole.items() if not good]:
        raise UserError(f"{where}: no usable {', '.join(bad)}; a LongBench line has {LINE}")
    if SCORER[task] == "classification" and not set(row["answers"]) & set(classes or ()):
        raise UserError(f"{where}: no answer of {task} is among all_classes, so none could be right")
    if SCORER[task] == "paragraph" and not all(re.search(r"\d", answer) for answer in row["answers"]):
        raise UserError(f"{where}: an answer without a number; those of {task} are such as Paragraph 3")
    return row


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def judged_part(task: str, answer: str) -> str:
    """The part of an answer that counts."""
    return answer.lstrip("\n").split("\n")[0] if task in FIRST_LINE else answer


def _cut(prompt: str, tokenizer: Any, limit: int, template: bool) -> str:
    """The prompt, its middle left out if it is too long, in the chat template if the task has one."""

    def dressed(text: str) -> str:
        return chat(tokenizer, text) if template else plain(tokenizer, text)

    spare = limit - token_count(tokenizer, dressed(prompt))
    if spare >= 0:
        return dressed(prompt)
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    room = len(ids) + spare
    while room > 1:
        head, tail = ids[: room // 2], ids[len(ids) - room // 2 :]
        text = dressed(
            tokenizer.decode(head, skip_special_tokens=True) + tokenizer.decode(tail, skip_special_tokens=True)
        )
        over = token_count(tokenizer, text) - limit
        if over <= 0:
            return text
        room -= over  # a cut inside a word can cost a token more
    raise UserError(f"a limit of {limit} tokens leaves no room for the prompt")


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; it comes with LongBench")
    return read_json(path)
