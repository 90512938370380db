"""One run spread over several processes, as `torchrun` or `accelerate launch` start them; or a single one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch.distributed as dist

from .launch import world_size

T = TypeVar("T")
ABSENT = object()


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size` ones, which share the work folder and exchange objects over gloo. All of them
    call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's share."""
        return list(items[self.rank :: self.size])

    def all_gather(self, items: list[T]) -> list[T]:
        """The items of all processes' shards, in the order of the whole."""
        parts: list[Any] = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, items)
        return interleaved(parts)

    def gather(self, items: list[T], to: int) -> list[T] | None:
        """As `all_gather`, for the process `to` only; None for the others."""
        parts: list[Any] | None = [items] * self.size if self.rank == to else None
        if self.size > 1:
            dist.gather_object(items, parts, dst=to)
        return None if parts is None else interleaved(parts)

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all to come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block, then all others do."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


SINGLE_PROCESS = Ranks()


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """What shards were taken from."""
    return [item for item in chain(*zip_longest(*parts, fillvalue=ABSENT)) if item is not ABSENT]  # type: ignore[misc]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that this one was started with."""
    if world_size() == 1:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # whoever started us ends us all if one fails
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
