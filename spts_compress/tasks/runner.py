"""Running items through a model, dense and skipping, and keeping every answer at once as a line of JSON."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint.families import switch_of
from ..timing.pairs import GREEDY, Way
from ..utils.errors import UserError
from ..utils.store import fingerprint, full_disk_named
from .example import Example, token_ids

MODES = ("dense", "spts")
BEGIN = b'{"key": "'  # of every line


def own_file(path: Path, rank: int) -> Path:
    """Where the process `rank` of several adds to the `Answers` in `path`."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


class Answers:
    """Answers in a file of JSON lines, found again by what they depend on. A line that a kill cut short is dropped.
    Each of several processes adds to a file of its own and has read those of all.

    Args:
        made: what is noted beside every answer of how it came to be.

    Raises:
        UserError: if the file holds anything else.
    """

    def __init__(self, path: Path, rank: int = 0, made: dict[str, Any] | None = None):
        self.path, self.made = own_file(path, rank), {"made": made} if made else {}
        self.rows: dict[str, dict] = {}
        self.check: Callable[[], None] = lambda: None  # raises if what was just answered must not be kept
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [p for p in path.parent.glob(f"{path.stem}.*{path.suffix}") if p.suffixes[-2][1:].isdigit()]
        for file in sorted({path, self.path, *others}):
            if file.exists():
                self._read(file)

    def _read(self, file: Path) -> None:
        lines = file.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                if number < len(lines) or line.endswith(b"\n") or not line.startswith(BEGIN[: len(line)]):
                    raise UserError(f"{file}:{number}: no answer; give another folder, or delete this line") from None
                if file == self.path:
                    with file.open("r+b") as stream:
                        stream.truncate(file.stat().st_size - len(line))
                return
        if lines and not lines[-1].endswith(b"\n") and file == self.path:
            with file.open("ab") as stream:
                stream.write(b"\n")

    def add(self, row: dict) -> None:
        self.check()
        row = {**row, **self.made}
        with full_disk_named(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows[row["key"]] = row


def ways_of(model: Any) -> dict[str, Way]:
    """Both modes of a skipping model; dense is the stock model bit for bit."""
    return {"dense": (model, {"spts": False}), "spts": (model, {})}


def answer_key(mode_key: str, example: Example) -> str:
    """Where an answer is kept; `mode_key` is what it depends on beside the prompt."""
    return fingerprint(mode_key, example.text, example.follow_up, example.answer_tokens)


def encode(tokenizer: Any, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and mask of prompts that already carry their chat template, padded on the left: by hand, since a
    tokenizer may have no token for it."""
    rows = [token_ids(tokenizer, text) for text in texts]
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return padded(rows, pad, device)


def padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids of prompts, padded on the left, and mask, as tensors (B, n)."""
    spare = [max(map(len, rows)) - len(row) for row in rows]
    ids = [[pad] * count + row for count, row in zip(spare, rows, strict=True)]
    mask = [[0] * count + [1] * len(row) for count, row in zip(spare, rows, strict=True)]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def until_switch(config: Any, prompt: int, tokens: int) -> int:
    """New tokens, of so many, up to where a model reads its text in another way, so that what is along an answer is all
    of one."""
    switch = switch_of(config)
    return tokens if switch is None or prompt > switch else min(tokens, switch - prompt + 1)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, batch: list[Example], **options: Any) -> list[str]:
    """Greedy answers of examples that have no further turn (or of one that has: its second answer).

    Args:
        options: of `generate`, such as `spts`.
    """
    inputs = encode(tokenizer, [example.text for example in batch], model.device)
    ends = stops(model)
    settings = {**GREEDY, "max_new_tokens": max(example.answer_tokens for example in batch), **options}
    out = model.generate(**inputs, **settings)
    if (follow := batch[0].follow_up) is not None:
        later = tokenizer(follow, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        ended = out.sequences[0].tolist()
        if ended[-1] in ends:  # the template's own end of turn follows
            ended = ended[:-1]
        ids = torch.cat([torch.tensor([ended], device=model.device), later], dim=1)
        if (surplus := out.past_key_values.get_seq_length() - len(ended)) > 0:
            out.past_key_values.crop(-surplus)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = model.generate(**inputs, past_key_values=out.past_key_values, **settings)
    made = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        tokenizer.decode(until_end(row[: example.answer_tokens], ends), skip_special_tokens=True)
        for example, row in zip(batch, made, strict=True)
    ]


def stops(model: Any) -> list[int]:
    """The tokens that end an answer."""
    stop = model.generation_config.eos_token_id
    return stop if isinstance(stop, list) else [stop]


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """An answer without what pads it to the length of others of its batch."""
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in ends), None)]


def run(
    ways: Mapping[str, Way],
    tokenizer: Any,
    examples: Iterable[Example],
    keys: Mapping[str, str],
    done: Answers,
    batch: int = 1,
) -> Iterator[dict]:
    """Answers of every way to every example, as rows; what is in `done` is not run again.

    Args:
        keys: for each way, what its answers depend on beside the prompt.
        batch: prompts at a time.
    """
    examples = list(examples)
    with tqdm(total=len(examples) * len(ways), desc="answering", unit="answer", disable=not examples) as progress:
        for group in _groups(examples, batch):
            for mode, (model, options) in ways.items():
                by_key = {answer_key(keys[mode], example): example for example in group}
                missing = {key: example for key, example in by_key.items() if key not in done.rows}
                if missing:
                    texts = answers(model, tokenizer, list(missing.values()), **options)
                    for (key, example), answer in zip(missing.items(), texts, strict=True):
                        done.add({"key": key, "mode": mode, **example.to_row(), "answer": answer})
                for example in group:
                    yield {**done.rows[answer_key(keys[mode], example)], **example.to_row(), "mode": mode}
                progress.update(len(group))


def _groups(examples: list[Example], batch: int) -> Iterator[list[Example]]:
    """Examples of one task at a time, at most `batch` together; those with a further turn alone."""

    def together(example: Example) -> tuple:
        return example.task, example.limit, None if example.follow_up is None else example.index

    for _, run_of in groupby(examples, key=together):
        group = list(run_of)
        yield from (group[i : i + batch] for i in range(0, len(group), batch))
