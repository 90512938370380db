"""Running items through a model, dense and skipping, and keeping every answer at once as a line of JSON."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.store import fingerprint
from .example import Item

MODES: dict[str, Any] = {"dense": False, "spts": None}  # the `spts` argument; dense is the stock model bit for bit

BEGIN = b'{"key": "'  # of every line


class Answers:
    """Answers in a file of JSON lines, found again by what they depend on. A line that a kill cut short is dropped.
    Each of several processes adds to a file of its own and has read those of all.

    Raises:
        UserError: if the file holds anything else.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.path = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self.rows: dict[str, dict] = {}
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
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows[row["key"]] = row


def answer_key(mode_key: str, item: Item) -> str:
    """Where an item's answer is kept; `mode_key` is what the answer depends on beside the prompt."""
    return fingerprint(mode_key, item.text, item.follow_up, item.answer_tokens)


def encode(tokenizer: Any, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and mask of prompts that already carry their chat template, padded on the left."""
    special = not getattr(tokenizer, "chat_template", None)
    if len(texts) > 1:
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=special, verbose=False)
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, batch: list[Item], spts: Any) -> list[str]:
    """Greedy answers of items that have no further turn (or of one that has: its second answer).

    Args:
        spts: the model's `spts` argument; left out if None, so that a stock model works too.
    """
    extra = {} if spts is None else {"spts": spts}
    inputs = encode(tokenizer, [item.text for item in batch], model.device)
    width = inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "max_new_tokens": max(item.answer_tokens for item in batch), **extra}
    follow = batch[0].follow_up
    out = model.generate(**inputs, **settings, return_dict_in_generate=True)
    if follow is not None:
        later = tokenizer(follow, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        ended = out.sequences[0].tolist()
        stop = model.generation_config.eos_token_id
        if ended[-1] in (stop if isinstance(stop, list) else [stop]):  # the template's own end of turn follows
            ended = ended[:-1]
        ids = torch.cat([torch.tensor([ended], device=model.device), later], dim=1)
        cache = out.past_key_values
        surplus = cache.get_seq_length() - len(ended)
        if surplus > 0:
            cache.crop(-surplus)
        width = ids.shape[1]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, return_dict_in_generate=True, **settings
        )
    found = []
    for item, row in zip(batch, out.sequences, strict=True):
        new = row[width : width + item.answer_tokens]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


def run(
    model: Any,
    tokenizer: Any,
    items: Iterable[Item],
    keys: dict[str, str],
    kept: Answers,
    batch: int = 1,
    modes: dict[str, Any] = MODES,
) -> Iterator[dict]:
    """Answers of every mode for every item, as rows; what is in `kept` is not run again.

    Args:
        keys: for each mode, what its answers depend on beside the prompt.
        batch: prompts at a time.
    """
    items = list(items)
    with tqdm(total=len(items) * len(modes), desc="answering", unit="answer", disable=not items) as progress:
        for group in _groups(items, batch):
            for mode, spts in modes.items():
                unit = {answer_key(keys[mode], item): item for item in group}
                missing = {key: item for key, item in unit.items() if key not in kept.rows}
                if missing:
                    made = answers(model, tokenizer, list(missing.values()), spts)
                    for (key, item), answer in zip(missing.items(), made, strict=True):
                        kept.add({"key": key, "mode": mode, **item.plain(), "answer": answer})
                for key, item in unit.items():
                    yield {**kept.rows[key], **item.plain(), "mode": mode}
                progress.update(len(group))


def _groups(items: list[Item], batch: int) -> Iterator[list[Item]]:
    """Items of one task at a time, at most `batch` together; those with a further turn alone."""
    group: list[Item] = []
    for item in items:
        alone = item.follow_up is not None
        if group and (alone or len(group) == batch or group[0].task != item.task or group[0].limit != item.limit):
            yield group
            group = []
        group.append(item)
        if alone:
            yield group
            group = []
    if group:
        yield group
