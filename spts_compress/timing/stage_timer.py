"""What each stage of a run costs: time and memory, for the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .pairs import peak_memory


@dataclass
class StageTimer:
    """`costs`: by stage, its `seconds`, and its `peak_bytes` above what was held before (of the device, on a CPU of the
    process). Work that was finished by an earlier run is not done again and costs next to nothing."""

    device: str
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        with peak_memory(torch.device(self.device)) as peak:
            yield
        self.costs[name] = {"seconds": time.monotonic() - begin, "peak_bytes": peak()}
