"""Updates: what a layer would add to a token that it skips, estimated by two affine maps of low rank.

They are fitted in closed form, layer after layer, on the states that skipping leaves there: a map's target is what
takes a skipped token to the dense model's state, so that later layers mend what earlier ones left undone. Tokens that
are not skipped count a little, too: where nearly all are active, the few skipped ones are too few to fit a map on.
"""

from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..calibrate.capture import layer_arguments
from ..modeling.configuration_spts import Schedule
from ..modeling.layer_plan import Count, LayerPlan
from ..modeling.selection import gather_tokens
from ..modeling.update import QUERIES, UPDATES, LowRankUpdate
from ..utils.errors import UserError

BLOCK = 4096  # tokens of a prompt that maps are fitted on
PENALTY = 1e-2  # of the ridge regression, in units of the features' mean variance
SPARE = 16  # further directions that the randomised eigenvectors are looked for in
ACTIVE_WEIGHT = 0.25  # of a token that is not skipped, and of all of them together no more than the skipped ones'


@torch.no_grad()
def solve(update: LowRankUpdate, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
    """Reduced-rank ridge regression: the map `b + V U x` of the update's rank that is nearest to `targets` (N, D) for
    `inputs` (N, D), in the least squares with `weights` (N). Set in place."""
    inputs, targets, shares = inputs.float(), targets.float(), weights / weights.sum()
    mean_in, mean_out = shares @ inputs, shares @ targets
    if not update.rank:
        update.bias.copy_(mean_out)
        return
    centred, wanted = inputs - mean_in, targets - mean_out
    weighted = (shares[:, None] * centred).T
    gram, cross = weighted @ centred, weighted @ wanted
    gram.diagonal().add_(PENALTY * gram.diagonal().mean() + 1e-12)
    full = torch.linalg.solve(gram, cross)  # (D, D)
    explained = cross.T @ full
    with torch.random.fork_rng(devices=[explained.device] if explained.is_cuda else []):
        torch.manual_seed(0)  # svd_lowrank draws; the same run is to give the same maps
        few = min(update.rank + SPARE, len(explained))
        up = torch.svd_lowrank(explained + explained.T, few, niter=6)[0][:, : update.rank]
    down = (full @ up).T
    update.up.copy_(up)
    update.down.copy_(down)
    update.bias.copy_(mean_out - up @ (down @ mean_in))


@dataclass(frozen=True)
class NotedPlan(LayerPlan):
    """A plan that keeps what was chosen by it, the last of each count."""

    chosen: dict[Count, torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: LayerPlan) -> "NotedPlan":
        return cls(**{name: getattr(plan, name) for name in LayerPlan.__dataclass_fields__})

    def choose(self, count: Count, order: torch.Tensor | None) -> torch.Tensor | None:
        self.chosen[count] = super().choose(count, order)
        return self.chosen[count]


class Fitting(nn.Module):
    """Stands in for the update `name` of a layer: asked for estimates, it first fits the map to what is asked."""

    def __init__(self, update: LowRankUpdate, layer: "LayerFit", name: str):
        super().__init__()
        self.update, self.layer, self.name = update, layer, name

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        target, skipped = layer.target(self.name, inputs)
        to_fit = torch.zeros_like(skipped)
        to_fit[: layer.fitted] = True
        counted, others = (skipped & to_fit).sum(), (~skipped & to_fit).sum()
        weights = skipped + ~skipped * (counted / others.clamp_min(1)).clamp_max(ACTIVE_WEIGHT)
        solve(self.update, inputs[to_fit], target[to_fit], weights[to_fit])
        estimate = self.update(inputs)
        if layer.fitted < len(skipped):
            wanted, left = (states[skipped & ~to_fit].float() for states in (target, target - estimate))
            spread = (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)
            layer.r2[self.name.removesuffix("_update")] = float(1 - left.square().sum() / spread)
        return estimate


class LayerFit:
    """One skipping layer while its maps are fitted; of the rows, the first `fitted` are fitted on, from the states that
    skipping leaves, or `on_dense` ones."""

    def __init__(self, fitted: int, on_dense: bool):
        self.fitted, self.on_dense = fitted, on_dense
        self.r2, self.pieces = dict[str, float](), list[torch.Tensor]()

    def enter(self, dense: "DenseStates", number: int, layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook before the layer: notes the candidates' states (B, T, D), and what the dense model makes of them."""
        self.states, self.plan = args[0], NotedPlan.of(kwargs["plan"])
        if self.on_dense and dense.states is not None:
            self.states = gather_tokens(dense.states, kwargs["slots"])
        after = dense.run(number, layer, self.states)
        self.dense = {name: gather_tokens(states, kwargs["slots"]) for name, states in zip(UPDATES, after, strict=True)}
        self.pieces.clear()  # the dense run's
        return (self.states, *args[1:]), {**kwargs, "plan": self.plan}

    def leave(self, *_: Any) -> None:
        """Hook after the layer: lets go of all states, or a run would hold those of every layer."""
        del self.states, self.plan, self.dense
        self.pieces.clear()

    def target(self, name: str, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What takes the candidates to the dense model's states (B, T, D), and which ones are skipped (B, T).

        Args:
            inputs: of the update `name`, (B, T, D).
        """
        states = self.states
        if name == UPDATES[1]:  # before the norm that gave `inputs`, if there is one
            states = torch.cat(self.pieces, dim=1) if self.pieces else inputs
        skipped = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        index = self.plan.chosen[self.plan.ffn_tokens if name == UPDATES[1] else self.plan.active]
        return self.dense[name] - states, skipped if index is None else skipped.scatter(1, index, False)


class DenseStates:
    """The dense model beside the skipping one, a layer at a time: states (B, n, D) of prompts of n tokens."""

    def __init__(self, model: Any, length: int):
        self.arguments = layer_arguments(model, length)
        self.states: torch.Tensor | None = None

    def run(self, number: int, layer: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States after a layer's attention and after the layer; `states` go into the first one."""
        options, middle = self.arguments[number], list[torch.Tensor]()
        place = getattr(layer, layer.norms.before_feed_forward or "mlp")
        with place.register_forward_pre_hook(partial(_note_input, middle)):
            rows = [layer.forward(row[None], **options) for row in (states if self.states is None else self.states)]
        self.states = torch.cat(rows)
        return torch.cat(middle), self.states


def _note_input(pieces: list[torch.Tensor], module: nn.Module, inputs: tuple) -> None:
    pieces.append(inputs[0])


def blank(schedule: Schedule, config: Any, dtype: torch.dtype, queries: bool = False) -> dict[str, torch.Tensor]:
    """Updates, or in their place corrections of `queries`, that add nothing, by their parameters' names in the exported
    model."""
    parameters = {}
    for layer in range(schedule.start, config.num_hidden_layers):
        ranks = [(QUERIES, schedule.probe.rank)]
        if not queries:
            ranks = list(zip(UPDATES, astuple(schedule.update_of(layer)), strict=True))
        for name, rank in ranks:
            for part, value in LowRankUpdate(config.hidden_size, rank).named_parameters():
                parameters[f"model.layers.{layer}.{name}.{part}"] = torch.zeros_like(value.data, dtype=dtype)
    return parameters


def skipping_parts(schedule: Schedule, layers: int, length: int) -> list[tuple[int, str]]:
    """Which layers of so many run "active" or "ffn_tokens", each of which has a map of its own, on a part of their
    candidates of a prompt of `length` tokens, whatever `min_length` is."""
    schedule = replace(schedule, min_length=0)
    counts = {layer: schedule.counts(layer, length) for layer in range(schedule.start, layers)}
    parts = ("active", "ffn_tokens")
    return [(n, part) for n, c in counts.items() for part in parts if getattr(c, part) < c.candidates_in]


def prompt_length(schedule: Schedule, layers: int, longest: int, held_out: int, most: int) -> int:
    """Tokens of the prompts to fit on: `BLOCK`, or what is held out if that is less; and more, up to `most`, where
    budgets skip nothing of such prompts in a layer that skips in prompts of `longest` tokens.

    Raises:
        UserError: if no such length is at hand.
    """
    wanted, length = set(skipping_parts(schedule, layers, longest)), min(BLOCK, held_out, most)
    while missing := sorted(wanted.difference(skipping_parts(schedule, layers, length))):
        if length == most:
            raise UserError(
                f"schedule.update: layer {missing[0][0]} skips nothing of a prompt of {length} tokens, the longest "
                "that the text to fit on and the model's context allow: raise calibration.tokens, or lower its budget"
            )
        length = min(2 * length, most)
    return length


def prompts_of(sequences: list[torch.Tensor], length: int) -> torch.Tensor:
    """Token sequences as prompts (B, `length`): one stream, cut; what is left over is left out."""
    stream = torch.cat(sequences)
    return stream[: len(stream) // length * length].view(-1, length)


@torch.no_grad()
def fit_updates(
    model: Any, fit: list[torch.Tensor], held_out: list[torch.Tensor], longest: int, on_dense: bool = False
) -> list[dict[str, Any]]:
    """Fit the updates of all skipping layers of a skipping causal language model, in place.

    Args:
        fit, held_out: token sequences to fit on and to judge by.
        longest: tokens of a prompt that the model is for; layers that skip in it get maps.
        on_dense: from the dense model's states, so that the maps suit no schedule better than another.

    Returns:
        For each skipping layer its number, and `attention` and `ffn`: R^2 of its maps, on held-out tokens that it
        skips; without them where nothing is skipped or the held-out tokens make no prompt.

    Raises:
        UserError: see `prompt_length`.
    """
    tokens, judging = (sum(map(len, part)) for part in (fit, held_out))
    most = min(model.config.max_position_embeddings, tokens)
    length = prompt_length(model.config.schedule(), len(model.model.layers), longest, judging, most)
    start, layers = model.config.schedule().start, model.model.layers
    if not model.config.schedule(min_length=0).skips(length):
        return [{"layer": number} for number in range(start, len(layers))]
    prompts = prompts_of(fit, length)
    ids = torch.cat([prompts, prompts_of(held_out, length)]).to(model.device)
    dense, fitted = DenseStates(model, length), {}
    with ExitStack() as stack:
        for number in range(start, len(layers)):
            fitted[number] = own = LayerFit(len(prompts), on_dense)
            for name in UPDATES:
                stack.callback(setattr, layers[number], name, update := getattr(layers[number], name))
                setattr(layers[number], name, Fitting(update, own, name))
            enter = partial(own.enter, dense, number)
            stack.callback(layers[number].register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layers[number].register_forward_hook(own.leave).remove)
            if norm := layers[number].norms.before_feed_forward:
                note = partial(_note_input, own.pieces)
                stack.callback(getattr(layers[number], norm).register_forward_pre_hook(note).remove)
        model(ids, logits_to_keep=1, use_cache=False, spts={"min_length": 0})
    return [{"layer": number, **own.r2} for number, own in fitted.items()]
