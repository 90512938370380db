"""How far a schedule's next tokens are from the dense model's, prompt by prompt and over all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.calls import SkipRequest
from ..modeling.configuration_spts import Schedule
from ..tasks.agreement import agreement
from ..tasks.example import Example
from ..tasks.recovery import interval
from ..tasks.runner import Answers
from ..utils.distributed import SINGLE_PROCESS, Ranks
from ..utils.store import fingerprint
from .dense_reference import DenseReference, References
from .prompts import kind_of

Rows = list[dict[str, Any]]


@torch.no_grad()
def compare(model: Any, schedule: Schedule, reference: DenseReference) -> dict[str, Any]:
    """The `agreement` of SPTS with dense along the dense model's own answer, teacher-forced after a prefill by
    `schedule`, and `same`: whether they agree on all tokens, so that the greedy answer is the dense one.

    Args:
        model: the skipping model, with proxies in all layers from the schedule's start on.
    """
    device, count = model.lm_head.weight.device, len(reference.answer)
    request = SkipRequest(schedule, last=count)
    layer, states = reference.states_before(schedule.start)
    options = {"use_cache": True, "logits_to_keep": count}
    logits = model(inputs_embeds=states.to(device), first_layer=layer, spts=request, **options).logits[0]
    dense = model.lm_head(reference.final.to(device))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        dense = torch.tanh(dense / cap) * cap
    measures = agreement(torch.log_softmax(dense.float(), dim=-1), torch.log_softmax(logits.float(), dim=-1))
    return {**measures, "same": measures["top1"] == 1}


@dataclass
class Evaluator:
    """Evaluates schedules on prompts whose dense work is done; every figure is kept at once.

    `model`: the skipping model, with proxies in all layers from the earliest start on. `key`: what figures depend on
    beside schedule and prompt. `used`: the keys of all figures asked for, kept or made now.
    """

    model: Any
    kept: Answers
    key: str
    progress: Any
    kinds: Sequence[str]
    ranks: Ranks = SINGLE_PROCESS
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ranks.barrier()  # for all to have read what was kept, before anyone adds to it

    def rows(self, schedules: Sequence[Schedule], references: References) -> list[Rows]:
        """For each schedule see `compare`; with `kind`, `task` and `length` of each prompt. Several at once, for
        processes to share them evenly."""
        keys = [[fingerprint(self.key, s.to_dict(), reference.key) for reference in references] for s in schedules]
        wanted = {
            key: (key, schedule, reference)
            for schedule, each in zip(schedules, keys, strict=True)
            for key, reference in zip(each, references, strict=True)
        }
        missing = [each for key, each in wanted.items() if key not in self.kept.rows]
        missing.sort(key=lambda each: each[2].item.limit)  # or a process would have the long ones
        added = [self._add(*each) for each in self.ranks.shard(missing)]
        self.kept.rows.update({row["key"]: row for row in self.ranks.all_gather(added)})
        self.used.update(wanted)
        # a name is this search's: a kept row may be that of one with other kinds
        names = [self._named(reference.item) for reference in references]
        return [[{**self.kept.rows[key], **name} for key, name in zip(each, names, strict=True)] for each in keys]

    def _named(self, item: Example) -> dict[str, Any]:
        return {"kind": kind_of(item, self.kinds), "task": item.task, "length": item.limit}

    def _add(self, key: str, schedule: Schedule, reference: DenseReference) -> dict[str, Any]:
        row = {"key": key, **self._named(reference.item), **compare(self.model, schedule, reference)}
        self.kept.add(row)
        self.progress.update()
        return row


def by_kind(rows: Rows) -> dict[str, dict[str, float]]:
    """Means of each measure for each kind of prompt."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return {
        kind: {name: sum(row[name] for row in group) / len(group) for name in ("kl", "top1", "same")}
        for kind, group in groups.items()
    }


def loss(rows: Rows) -> float:
    """Mean over the kinds of their mean KL, and the worst kind's, in equal parts: nats. Infinite where a model gave
    values that are not finite: NaN would be neither more nor less than another loss, and so might win."""
    kl = [kind["kl"] for kind in by_kind(rows).values()]
    return (sum(kl) / len(kl) + max(kl)) / 2 if all(map(math.isfinite, kl)) else math.inf


def quality(rows: Rows) -> tuple[float, tuple[float, float] | None]:
    """Mean top-1 agreement with dense, and its 95% interval (percentile bootstrap over prompts, 2000 resamples; None
    for fewer than two)."""
    top1 = [row["top1"] for row in rows]
    return sum(top1) / len(top1), interval([1.0] * len(top1), top1)
