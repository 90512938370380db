"""What each stage of a run costs: time and memory, for the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .pairs import peak_memory


@dataclass
class Stages:
    """`found`: by stage, its `seconds`, and its `peak_bytes` above what was held before (of the device, on a CPU of the
    process). Finished work that was found is not done again and costs next to nothing."""

    device: str
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        with peak_memory(torch.device(self.device)) as peak:
            yield
        self.found[name] = {"seconds": time.monotonic() - begin, "peak_bytes": peak()}
