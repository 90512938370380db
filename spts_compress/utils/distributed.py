"""One run spread over several processes, as `torchrun` or `accelerate launch` start them; or a single one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size` ones. They share the work folder, and exchange what they made over gloo. All
    of them call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share."""
        return list(items[self.rank :: self.size])

    def all(self, made: list[T]) -> list[T]:
        """What all made of their shares, in the order of the whole."""
        if self.size == 1:
            return made
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, made)
        return _in_order(parts)

    def to(self, owner: int, made: list[T]) -> list[T] | None:
        """As `all`, for the process `owner` only; None for the others."""
        if self.size == 1:
            return made
        parts: list[Any] | None = [None] * self.size if self.rank == owner else None
        dist.gather_object(made, parts, dst=owner)
        return None if parts is None else _in_order(parts)

    def agree(self, value: T) -> T:
        """The leader's value."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            return box[0]
        return value

    def wait(self) -> None:
        """For all to come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs the block, then all others do."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


ALONE = Ranks()


def _in_order(parts: list[list[T]]) -> list[T]:
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that this one was started with."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # whoever started us ends us all if one fails
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
