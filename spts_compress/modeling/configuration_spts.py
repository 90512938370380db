"""What a skip-ready checkpoint's `config.json` says about skipping: the `spts` block, read and checked.

Self-Predictive Token Skipping (SPTS), arXiv 2601.13155. This file travels with every exported checkpoint and imports
neither torch nor spts_compress.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

HEAD_REDUCTIONS = ("mean", "max")
FEED_FORWARD_CHOICES = ("proxy", "relative", "attention", "all")


@dataclass(frozen=True)
class Amount:
    """A number of tokens that may grow with the prompt: `clip(round(fraction * n), floor, cap)`."""

    fraction: float = 0.0
    floor: int = 0
    cap: int | None = None

    def plain(self) -> int | dict[str, Any]:
        """As the `spts` block says it."""
        if not self.fraction and self.cap is None:
            return self.floor
        given = {"fraction": self.fraction, "floor": self.floor or None, "cap": self.cap}
        return {name: value for name, value in given.items() if value is not None}

    def at(self, length: int) -> int:
        """Tokens for a prompt of `length` tokens (its own length, without padding)."""
        tokens = max(round(self.fraction * length), self.floor)
        return tokens if self.cap is None else min(tokens, self.cap)

    def covers(self, other: "Amount") -> bool:
        """Whether this amount is at least `other` at every prompt length."""
        mine, others = self.limit(), other.limit()
        return self.fraction >= other.fraction and self.floor >= other.floor and mine >= others

    def limit(self) -> float:
        """The most tokens this amount can stand for."""
        if self.cap is not None:
            return self.cap
        return float("inf") if self.fraction else self.floor


@dataclass(frozen=True)
class Stage:
    """Layers that share one candidate set, up to layer `end` (inclusive).

    `budget`: tokens active in each of the stage's layers, in attention and (unless there is an `ffn_budget`) in the
    feed-forward network. `prune_to`: candidates left after layer `end` (None: all).
    """

    end: int
    budget: Amount
    prune_to: Amount | None = None
    ffn_budget: Amount | None = None

    def amounts(self) -> list[tuple[str, Amount | None]]:
        """Every amount with its name."""
        return [("budget", self.budget), ("prune_to", self.prune_to), ("ffn_budget", self.ffn_budget)]

    @property
    def changed(self) -> Amount:
        """Tokens that the feed-forward network runs on."""
        return self.budget if self.ffn_budget is None else self.ffn_budget


@dataclass(frozen=True)
class Probe:
    """Partial Attention Probing: how the last queries score the candidates.

    `queries`: number of last queries (the paper's: 1). `heads`: how the heads' scores are reduced, "mean" or "max"; or
    which ones alone score, as (layer, head) pairs (in the block, lists of heads by layer): a layer's score is the mean
    of its own, and one without any goes by what is carried. `carry`: how much of the skipping layers' scores before is
    added to a layer's own, as S + carry * (the sum carried so far): some layers rank badly. `pool`: width of the
    max-pooling over neighbouring candidates (odd; 1: none).
    """

    queries: int = 1
    heads: str | tuple[tuple[int, int], ...] = "mean"
    carry: float = 0.0
    pool: int = 1

    @property
    def carries(self) -> bool:
        """Whether a layer's scores count in later layers, too."""
        return self.carry > 0 or not isinstance(self.heads, str)

    def heads_of(self, layer: int) -> str | tuple[int, ...]:
        """How the heads of `layer` are reduced, or which of them score."""
        if isinstance(self.heads, str):
            return self.heads
        return tuple(head for place, head in self.heads if place == layer)


@dataclass(frozen=True)
class Proxy:
    """Size of a layer's proxy, which predicts the feed-forward norm: `channels` is D_low, `rank` is r; with rank 0 the
    prediction is a mere regression."""

    channels: int
    rank: int


class Counts(NamedTuple):
    """Tokens of a layer: candidates coming in, active ones in attention and in the feed-forward network, candidates
    going on."""

    entering: int
    active: int
    changed: int
    leaving: int


@dataclass(frozen=True)
class Schedule:
    """Which layers skip which tokens. `start` is the first skipping layer, or scores without skipping in a first stage
    that keeps all; layers are numbered from 0.

    `keep_first` and `keep_last` tokens are always active, inside the budgets; the probe's queries always are too.
    `proxy` holds one size for every skipping layer, or one for each.
    `feed_forward` says which candidates the feed-forward network runs on: those with the highest attention score times
    predicted norm ("proxy", the paper's LTP) or predicted norm over the state's own ("relative"), those that the
    "attention" score alone ranks highest, or "all". Prompts shorter than `min_length` run dense, and all do if
    `enabled` is false.
    """

    start: int
    stages: tuple[Stage, ...]
    proxy: tuple[Proxy, ...]
    probe: Probe = Probe()
    keep_first: int = 0
    keep_last: int = 1
    feed_forward: str = "proxy"
    min_length: int = 0
    enabled: bool = True

    @property
    def always_last(self) -> int:
        return max(self.keep_last, self.probe.queries)

    def proxy_of(self, layer: int) -> Proxy:
        """Size of the proxy of a skipping layer."""
        return self.proxy[0] if len(self.proxy) == 1 else self.proxy[layer - self.start]

    def stage_of(self, layer: int) -> int:
        """Index of the stage that `layer` belongs to; layers after the last stage end belong to the last stage."""
        return next((i for i, stage in enumerate(self.stages) if layer <= stage.end), len(self.stages) - 1)

    def tokens(self, amount: Amount, length: int) -> int:
        """Tokens `amount` stands for in a prompt of `length` tokens; never fewer than the always active ones."""
        return min(length, max(amount.at(length), self.keep_first + self.always_last))

    def counts(self, layer: int, length: int) -> Counts:
        """Tokens of `layer` for a prompt of `length` tokens."""
        entering = length
        if layer < self.start or not self.skips(length):
            return Counts(length, length, length, length)
        number = self.stage_of(layer)
        for stage in self.stages[:number]:
            if stage.prune_to is not None:
                entering = min(entering, self.tokens(stage.prune_to, length))
        stage = self.stages[number]
        active = min(entering, self.tokens(stage.budget, length))
        changed = entering if self.feed_forward == "all" else min(entering, self.tokens(stage.changed, length))
        leaving = entering
        if layer == stage.end and stage.prune_to is not None:
            leaving = min(entering, self.tokens(stage.prune_to, length))
        return Counts(entering, active, changed, leaving)

    def skips(self, length: int) -> bool:
        """Whether a prompt of `length` tokens has any token to skip."""
        if not self.enabled or length < self.min_length:
            return False
        kept = (min(self.tokens(a, length) for a in (stage.budget, stage.changed)) for stage in self.stages)
        return min(kept) < length

    def to_dict(self) -> dict[str, Any]:
        """The `spts` block: plain numbers where an amount is a plain count, and nothing that says nothing."""
        block = asdict(self)
        block["stages"] = [
            {"end": stage.end} | {name: amount.plain() for name, amount in stage.amounts() if amount is not None}
            for stage in self.stages
        ]
        block["proxy"] = block["proxy"][0] if len(self.proxy) == 1 else list(block["proxy"])
        if not isinstance(self.probe.heads, str):
            layers = dict.fromkeys(layer for layer, _ in self.probe.heads)
            block["probe"]["heads"] = {str(layer): list(self.probe.heads_of(layer)) for layer in layers}
        return block

    @classmethod
    def from_dict(cls, block: dict[str, Any], num_layers: int, num_heads: int | None = None) -> "Schedule":
        """Read and check an `spts` block of a model with `num_layers` layers of `num_heads` heads each.

        Raises:
            ValueError: with one argument for each fault found in `block`.
        """
        faults: list[str] = []
        schedule = _read(cls, block, "spts", faults)
        if schedule is not None and not faults:
            faults += schedule.faults(num_layers, num_heads)
        if faults or schedule is None:
            raise ValueError(*faults)
        return schedule

    def faults(self, num_layers: int, num_heads: int | None = None) -> list[str]:
        """Everything that is out of range or contradictory, each with what would be right; empty if all is well."""
        found = []

        def check(fine: bool, message: str) -> None:
            if not fine:
                found.append(message)

        check(1 <= self.start < num_layers, f"start is {self.start}; it must be 1 to {num_layers - 1}")
        check(len(self.stages) > 0, "stages is empty; there must be at least one")
        previous = self.start - 1
        for i, stage in enumerate(self.stages):
            where = f"stages[{i}]"
            check(
                previous < stage.end < num_layers,
                f"{where}.end is {stage.end}; it must be {previous + 1} to {num_layers - 1}",
            )
            previous = stage.end
            for name, amount in stage.amounts():
                if amount is not None:
                    check(0 <= amount.fraction <= 1, f"{where}.{name}.fraction is {amount.fraction}; it must be 0 to 1")
                    check(amount.floor >= 0, f"{where}.{name}.floor is {amount.floor}; it must not be negative")
                    check(amount.fraction > 0 or amount.floor > 0, f"{where}.{name} is 0; it must keep some tokens")
                    check(
                        amount.cap is None or amount.cap >= max(1, amount.floor),
                        f"{where}.{name}.cap is {amount.cap}; it must be at least the floor",
                    )
            if i + 1 < len(self.stages):
                for name in ("budget", "ffn_budget"):
                    following = getattr(self.stages[i + 1], name)
                    check(
                        stage.prune_to is None or following is None or stage.prune_to.covers(following),
                        f"{where}.prune_to is less than stages[{i + 1}].{name}; it must be at least that",
                    )
            else:
                check(stage.prune_to is None, f"{where}.prune_to is set; nothing is pruned after the last stage")
        check(self.probe.queries >= 1, f"probe.queries is {self.probe.queries}; it must be at least 1")
        heads = self.probe.heads
        if isinstance(heads, str):
            check(
                heads in HEAD_REDUCTIONS, f"probe.heads is {heads!r}; it must be mean, max, or lists of heads by layer"
            )
        else:
            for layer, head in heads:
                there = head >= 0 and (num_heads is None or head < num_heads)
                check(
                    there and self.start <= layer < num_layers,
                    f"probe.heads has head {head} of layer {layer}; no skipping layer has such a head",
                )
            check(len(set(heads)) == len(heads), "probe.heads has a head twice")
            first = any(layer == self.start for layer, _ in heads)
            check(first, f"probe.heads has none in layer {self.start}, which skips with nothing carried to it")
        check(0 <= self.probe.carry <= 1, f"probe.carry is {self.probe.carry}; it must be 0 to 1")
        check(
            self.probe.pool >= 1 and self.probe.pool % 2 == 1,
            f"probe.pool is {self.probe.pool}; it must be odd and at least 1",
        )
        choices = ", ".join(FEED_FORWARD_CHOICES)
        check(
            self.feed_forward in FEED_FORWARD_CHOICES,
            f"feed_forward is {self.feed_forward!r}; it must be one of {choices}",
        )
        check(self.keep_first >= 0, f"keep_first is {self.keep_first}; it must not be negative")
        check(self.keep_last >= 1, f"keep_last is {self.keep_last}; the last token is always active")
        check(self.min_length >= 0, f"min_length is {self.min_length}; it must not be negative")
        layers = num_layers - self.start
        check(len(self.proxy) in (1, layers), f"proxy has {len(self.proxy)} sizes for {layers} skipping layers")
        for size in self.proxy:
            check(size.channels >= 1, f"proxy.channels is {size.channels}; it must be at least 1")
            check(size.rank >= 0, f"proxy.rank is {size.rank}; it must not be negative")
        return found


def are_heads(value: Any) -> bool:
    """Whether plain data has the form of lists of heads by layer; JSON makes text of the layers' numbers."""
    if not isinstance(value, dict) or not all(str(layer).isdecimal() for layer in value):
        return False
    return all(isinstance(own, list) and all(type(head) is int for head in own) for own in value.values())


def _read(kind: type, value: Any, where: str, faults: list[str]) -> Any:
    """Build dataclass `kind` from plain data, collecting faults instead of raising."""
    if kind is Amount and isinstance(value, int) and not isinstance(value, bool):
        return Amount(floor=value)
    if not isinstance(value, dict):
        faults.append(f"{where} is {value!r}; it must be a mapping")
        return None
    known = {f.name: f for f in fields(kind)}
    faults += [f"{where}.{key} is unknown; known are {', '.join(known)}" for key in value if key not in known]
    nested = {"budget": Amount, "prune_to": Amount, "ffn_budget": Amount, "probe": Probe}
    lists = {"stages": Stage, "proxy": Proxy}
    built = {}
    for key in known:
        if key not in value:
            continue
        item = value[key]
        if key in lists and isinstance(item, list | tuple):
            built[key] = tuple(_read(lists[key], part, f"{where}.{key}[{i}]", faults) for i, part in enumerate(item))
        elif key == "proxy":
            built[key] = (_read(Proxy, item, f"{where}.{key}", faults),)
        elif key in nested and not (item is None and key in ("prune_to", "ffn_budget")):
            built[key] = _read(nested[key], item, f"{where}.{key}", faults)
        else:
            number = isinstance(item, int | float) and not isinstance(item, bool)
            whole = isinstance(item, int) and not isinstance(item, bool)
            text, flag = isinstance(item, str), isinstance(item, bool)
            heads = key == "heads" and are_heads(item)
            kinds = {"fraction": number, "carry": number, "heads": text or heads, "feed_forward": text, "enabled": flag}
            fits = kinds.get(key, whole)
            if not fits and not (item is None and key in ("cap", "prune_to")):
                faults.append(f"{where}.{key} is {item!r}, which is not of the right type")
            if heads:
                item = tuple(sorted((int(layer), head) for layer, own in item.items() for head in own))
            built[key] = item
    try:
        return kind(**built)
    except TypeError:
        required = {Stage: ("end", "budget"), Proxy: ("channels", "rank"), Schedule: ("start", "stages", "proxy")}
        faults += [f"{where}.{key} is missing" for key in required.get(kind, ()) if key not in built]
        return None


class SptsConfigMixin:
    """Adds the `spts` block to a stock configuration class."""

    spts: dict | None = None

    def schedule(self, **changes: Any) -> Schedule:
        """The skipping schedule, with top-level keys of the block replaced by `changes` for one use.

        Raises:
            ValueError: if the block or a change is not valid.
        """
        sizes = self.num_hidden_layers, self.num_attention_heads  # type: ignore[attr-defined]
        return Schedule.from_dict({**(self.spts or {}), **changes}, *sizes)
