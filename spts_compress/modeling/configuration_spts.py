"""What a skip-ready checkpoint's `config.json` says about skipping: the `spts` block.

Self-Predictive Token Skipping (SPTS), arXiv 2601.13155. This file travels with every exported checkpoint and imports
neither torch nor spts_compress, which names every fault of a block at once; here the first one is an error.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

HEAD_REDUCTIONS = ("mean", "max")
FFN_SELECTIONS = ("proxy", "relative", "attention", "all")


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

    def amounts(self) -> dict[str, Amount]:
        """Every amount that is set, by its name."""
        named = {"budget": self.budget, "prune_to": self.prune_to, "ffn_budget": self.ffn_budget}
        return {name: amount for name, amount in named.items() if amount is not None}

    @property
    def ffn_tokens(self) -> Amount:
        """Tokens that the feed-forward network runs on."""
        return self.budget if self.ffn_budget is None else self.ffn_budget


@dataclass(frozen=True)
class Probe:
    """Partial Attention Probing: how the last queries score the candidates.

    `window_size`: number of last queries (the paper's: 1). `heads`: how the heads' scores are reduced, "mean" or "max";
    or which ones alone score, as (layer, head) pairs (in the block, lists of heads by layer): a layer's score is the
    mean of its own, and one without any goes by what is carried. `score_carry`: how much of the skipping layers' scores
    before is added to a layer's own, as S + score_carry * (the sum carried so far): some layers rank badly.
    `kernel_size`: width of the max-pooling over neighbouring candidates (odd; 1: none).
    """

    window_size: int = 1
    heads: str | tuple[tuple[int, int], ...] = "mean"
    score_carry: float = 0.0
    kernel_size: int = 1

    @property
    def carries(self) -> bool:
        """Whether a layer's scores count in later layers, too."""
        return self.score_carry > 0 or not isinstance(self.heads, str)

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

    candidates_in: int
    active: int
    ffn_tokens: int
    candidates_out: int


@dataclass(frozen=True)
class Schedule:
    """Which layers skip which tokens. `start` is the first skipping layer, or scores without skipping in a first stage
    that keeps all; layers are numbered from 0.

    The first `sink_tokens` and the last `recent_tokens` are always active, inside the budgets, as are the probe's
    queries. `proxy` holds one size for every skipping layer, or one for each. `ffn_selection` says which candidates the
    feed-forward network runs on: those with the highest attention score times predicted norm ("proxy", the paper's LTP)
    or predicted norm over the state's own ("relative"), those that the "attention" score alone ranks highest, or "all".
    Prompts shorter than `min_length` run dense, and all do if `enabled` is false.
    """

    start: int
    stages: tuple[Stage, ...]
    proxy: tuple[Proxy, ...]
    probe: Probe = Probe()
    sink_tokens: int = 0
    recent_tokens: int = 1
    ffn_selection: str = "proxy"
    min_length: int = 0
    enabled: bool = True

    @property
    def always_last(self) -> int:
        return max(self.recent_tokens, self.probe.window_size)

    def proxy_of(self, layer: int) -> Proxy:
        """Size of the proxy of a skipping layer."""
        return self.proxy[0] if len(self.proxy) == 1 else self.proxy[layer - self.start]

    def stage_of(self, layer: int) -> int:
        """Index of the stage that `layer` belongs to; layers after the last stage end belong to the last stage."""
        return next((i for i, stage in enumerate(self.stages) if layer <= stage.end), len(self.stages) - 1)

    def tokens(self, amount: Amount, length: int) -> int:
        """Tokens `amount` stands for in a prompt of `length` tokens; never fewer than the always active ones."""
        return min(length, max(amount.at(length), self.sink_tokens + self.always_last))

    def counts(self, layer: int, length: int) -> Counts:
        """Tokens of `layer` for a prompt of `length` tokens."""
        if layer < self.start or not self.skips(length):
            return Counts(length, length, length, length)
        number, candidates = self.stage_of(layer), length
        for before in self.stages[:number]:
            if before.prune_to is not None:
                candidates = min(candidates, self.tokens(before.prune_to, length))
        stage, left = self.stages[number], candidates
        active, ffn = (min(candidates, self.tokens(amount, length)) for amount in (stage.budget, stage.ffn_tokens))
        if layer == stage.end and stage.prune_to is not None:
            left = min(candidates, self.tokens(stage.prune_to, length))
        return Counts(candidates, active, candidates if self.ffn_selection == "all" else ffn, left)

    def skips(self, length: int) -> bool:
        """Whether a prompt of `length` tokens has any token to skip."""
        if not self.enabled or length < self.min_length:
            return False
        kept = (min(self.tokens(a, length) for a in (stage.budget, stage.ffn_tokens)) for stage in self.stages)
        return min(kept) < length

    def to_dict(self) -> dict[str, Any]:
        """The `spts` block: plain numbers where an amount is a plain count, and nothing that says nothing."""
        block = asdict(self)
        amounts = [{name: amount.plain() for name, amount in stage.amounts().items()} for stage in self.stages]
        block["stages"] = [{"end": stage.end, **named} for stage, named in zip(self.stages, amounts, strict=True)]
        block["proxy"] = block["proxy"][0] if len(self.proxy) == 1 else list(block["proxy"])
        if not isinstance(self.probe.heads, str):
            layers = dict.fromkeys(layer for layer, _ in self.probe.heads)
            block["probe"]["heads"] = {str(layer): list(self.probe.heads_of(layer)) for layer in layers}
        return block

    @classmethod
    def from_dict(cls, block: dict[str, Any], num_layers: int | None) -> "Schedule":
        """Read the `spts` block of a model with `num_layers` layers (None: as it is, unchecked).

        Raises:
            ValueError: naming a fault of `block`.
        """

        def amount(value: Any) -> Amount:
            return Amount(floor=value) if isinstance(value, int) else Amount(**value)

        def stage(end: int, **amounts: Any) -> Stage:
            return Stage(end, **{name: amount(value) for name, value in amounts.items() if value is not None})

        try:
            values = {**block, "stages": tuple(stage(**each) for each in block["stages"])}
            sizes = values["proxy"] if isinstance(values["proxy"], list | tuple) else [values["proxy"]]
            probe = {**block.get("probe", {})}
            if isinstance(probe.get("heads"), dict):
                pairs = ((int(layer), head) for layer, heads in probe["heads"].items() for head in heads)
                probe["heads"] = tuple(sorted(pairs))
            schedule = cls(**{**values, "proxy": tuple(Proxy(**size) for size in sizes), "probe": Probe(**probe)})
            if num_layers is not None:
                schedule.check(num_layers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fault = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"this model's spts block can't be used: {fault}") from error
        return schedule

    def check(self, num_layers: int) -> None:
        """Raises ValueError if a value is out of range: what would otherwise be a wrong answer or an odd error."""
        ends = [self.start - 1, *(stage.end for stage in self.stages)]
        amounts = [amount for stage in self.stages for amount in stage.amounts().values()]
        numbers = [*ends, self.sink_tokens, self.recent_tokens, self.probe.window_size, self.probe.kernel_size]
        heads = self.probe.heads
        fine_heads = heads in HEAD_REDUCTIONS if isinstance(heads, str) else heads[:1] and heads[0][0] == self.start
        for fine, what in (
            (all(type(number) is int for number in numbers + [a.floor for a in amounts]), "a number of tokens"),
            (0 <= ends[0] < num_layers - 1, "start"),
            (len(ends) > 1 and ends == sorted(set(ends)) and ends[-1] < num_layers, "the stages' ends"),
            (all(0 <= a.fraction <= 1 and a.floor >= 0 and (a.fraction or a.floor) for a in amounts), "a budget"),
            (all(a.cap is None or a.cap >= max(1, a.floor) for a in amounts), "a cap"),
            (self.sink_tokens >= 0 and self.recent_tokens >= 1, "sink_tokens or recent_tokens"),
            (self.probe.window_size >= 1, "probe.window_size"),
            (self.probe.kernel_size >= 1 and self.probe.kernel_size % 2 == 1, "probe.kernel_size"),
            (0 <= self.probe.score_carry <= 1, "probe.score_carry"),
            (self.ffn_selection in FFN_SELECTIONS, "ffn_selection"),
            (fine_heads, "probe.heads"),
            (len(self.proxy) in (1, num_layers - self.start), "the number of proxies"),
        ):
            if not fine:
                raise ValueError(f"{what} is out of range")


class SptsConfigMixin:
    """Adds the `spts` block to a stock configuration class."""

    spts: dict | None = None
    num_hidden_layers: int

    def schedule(self, **changes: Any) -> Schedule:
        """The skipping schedule, with top-level keys of the block replaced by `changes` for one use.

        Raises:
            ValueError: if the block or a change is not valid.
        """
        return Schedule.from_dict({**(self.spts or {}), **changes}, self.num_hidden_layers)
