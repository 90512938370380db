"""Which layers skip how many tokens: what the `spts` block of a skip-ready checkpoint's `config.json` says.

Self-Predictive Token Skipping (SPTS), arXiv 2601.13155.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .spts_block import SptsBlock


@dataclass(frozen=True)
class Amount:
    """A number of tokens that may grow with the prompt: `clip(round(fraction * n), floor, cap)`."""

    fraction: float = 0.0
    floor: int = 0
    cap: int | None = None

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
    mean of its own, and one without any goes by what is carried. `score_carry`: weight of the accumulated scores of
    earlier skipping layers, as S + score_carry * (the sum carried so far); some layers alone rank badly.
    `kernel_size`: width of the max-pooling over neighbouring candidates (odd; 1: none). `rank`: of what was fitted to
    be added to the last tokens' normed states, so that their queries score what the answer will attend to; 0: nothing.
    """

    window_size: int = 1
    heads: str | tuple[tuple[int, int], ...] = "mean"
    score_carry: float = 0.0
    kernel_size: int = 1
    rank: int = 0

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


@dataclass(frozen=True)
class Update:
    """Ranks of a layer's two estimates of what it adds to a token that it skips: of its attention and of its
    feed-forward network, see `LowRankUpdate`. With rank 0 an estimate is a mere mean."""

    attention_rank: int
    ffn_rank: int


class Counts(NamedTuple):
    """Tokens of a layer: candidates coming in, active ones in attention and in the feed-forward network, candidates
    going on, and those whose keys and values are cached."""

    candidates_in: int
    active: int
    ffn_tokens: int
    candidates_out: int
    cached: int


@dataclass(frozen=True)
class Schedule(SptsBlock):
    """Which layers skip which tokens. `start` is the first skipping layer (in a first stage that keeps all, it only
    scores); layers are numbered from 0, whose cache tells transformers the text's length, so `start` is at least 1.

    The first `sink_tokens` and the last `recent_tokens` are always active, inside the budgets, as are the probe's
    queries. `proxy` holds one size for every skipping layer, or one for each; none if no layer has a proxy.
    `ffn_selection` says which candidates the feed-forward network runs on: those with the highest attention score times
    predicted norm ("proxy", the paper's LTP), or times predicted norm over the state's own ("relative"); those that the
    "attention" score alone ranks highest; or "all". Prompts shorter than `min_length` run dense, and all do if
    `enabled` is false.

    Beyond the paper, `update` holds one pair of ranks for every skipping layer, or one for each: skipped candidates get
    estimates of what the layer would have added. `kv` is the share of a prompt's tokens whose keys and values a layer
    caches, those of the highest scores among its candidates, and never fewer than the active ones, which None stands
    for. Without `update` it does harm: what is cached of skipped tokens is then stale.
    """

    start: int
    stages: tuple[Stage, ...]
    proxy: tuple[Proxy, ...] = ()
    probe: Probe = Probe()
    sink_tokens: int = 0
    recent_tokens: int = 1
    ffn_selection: str = "proxy"
    update: tuple[Update, ...] = ()
    kv: float | None = None
    min_length: int = 0
    enabled: bool = True

    @property
    def always_last(self) -> int:
        return max(self.recent_tokens, self.probe.window_size)

    @property
    def uses_proxies(self) -> bool:
        return self.ffn_selection in ("proxy", "relative")

    def proxy_of(self, layer: int) -> Proxy:
        """Size of the proxy of a skipping layer."""
        return self.proxy[0] if len(self.proxy) == 1 else self.proxy[layer - self.start]

    def update_of(self, layer: int) -> Update:
        """Ranks of the update of a skipping layer."""
        return self.update[0] if len(self.update) == 1 else self.update[layer - self.start]

    def stage_of(self, layer: int) -> int:
        """Index of the stage that `layer` belongs to; layers after the last stage end belong to the last stage."""
        return next((i for i, stage in enumerate(self.stages) if layer <= stage.end), len(self.stages) - 1)

    def tokens(self, amount: Amount, length: int) -> int:
        """Tokens `amount` stands for in a prompt of `length` tokens; never fewer than the always active ones."""
        return min(length, max(amount.at(length), self.sink_tokens + self.always_last))

    def counts(self, layer: int, length: int) -> Counts:
        """Tokens of `layer` for a prompt of `length` tokens."""
        if layer < self.start or not self.skips(length):
            return Counts(length, length, length, length, length)
        number, candidates = self.stage_of(layer), length
        for before in self.stages[:number]:
            if before.prune_to is not None:
                candidates = min(candidates, self.tokens(before.prune_to, length))
        stage, left = self.stages[number], candidates
        active, ffn = (min(candidates, self.tokens(amount, length)) for amount in (stage.budget, stage.ffn_tokens))
        if layer == stage.end and stage.prune_to is not None:
            left = min(candidates, self.tokens(stage.prune_to, length))
        ffn = candidates if self.ffn_selection == "all" else ffn
        cached = min(candidates, max(active, Amount(self.kv or 0).at(length)))
        return Counts(candidates, active, ffn, left, cached)

    def skips(self, length: int) -> bool:
        """Whether a prompt of `length` tokens has any token to skip."""
        if not self.enabled or length < self.min_length:
            return False
        unused = "ffn_budget" if self.ffn_selection == "all" else None
        amounts = (a for stage in self.stages for name, a in stage.amounts().items() if name != unused)
        return any(self.tokens(amount, length) < length for amount in amounts)
