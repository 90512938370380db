"""A candidate of the search, and how its parameters are scaled to the cost that is wanted."""

from dataclasses import asdict, dataclass
from typing import Any

from ..cost import predicted
from ..modeling.configuration_spts import Proxy, Schedule
from ..recipe import ScheduleParams
from ..timing.latency_table import Prices
from .evaluator import Rows, by_kind, loss
from .space import Heads, scale_to_cost


@dataclass(frozen=True)
class Candidate:
    """Parameters scaled to the wanted cost, what that costs, and the rows of the prompts it was tried on."""

    params: ScheduleParams
    schedule: Schedule
    cost: dict[str, float]
    rows: Rows

    @property
    def loss(self) -> float:
        return loss(self.rows)

    def plain(self) -> dict[str, Any]:
        return {
            "params": asdict(self.params),
            "schedule": self.schedule.to_dict(),
            "cost": self.cost,
            "loss": self.loss,
            "prompts": len(self.rows),
            "kinds": by_kind(self.rows),
        }


@dataclass(frozen=True)
class Costs:
    """What schedules cost for a prompt of `length` tokens: counted, with the speed-up by the measured `latencies` if
    there are any. `proxies`, `heads`: see `space.schedule`."""

    config: Any
    length: int
    proxies: dict[int, Proxy]
    heads: Heads | None = None
    latencies: Prices | None = None

    def of(self, schedule: Schedule) -> dict[str, float]:
        """See `predicted`; where latencies are measured, `flop_speedup` is the counted one."""
        cost = predicted(self.config, schedule, self.length)
        if self.latencies is None:
            return cost
        measured = self.latencies.speedup(self.config, schedule, self.length)
        return {**cost, "speedup": measured, "flop_speedup": cost["speedup"]}

    def scaled(self, name: str, target: float, params: ScheduleParams) -> Candidate | None:
        """The candidate whose budgets make its `name` (speedup or kv_share) the `target`; None if none do."""
        sign = 1 if name == "speedup" else -1  # a smaller KV share costs less
        schedule = scale_to_cost(params, lambda s: sign * self.of(s)[name], sign * target, self.proxies, self.heads)
        return None if schedule is None else Candidate(params, schedule, self.of(schedule), [])
