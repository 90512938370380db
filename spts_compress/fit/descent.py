"""Gradient steps on what was made in closed form: Adam with a cosine schedule, of which the best state is kept."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..utils.errors import UserError

KEPT = 10  # steps after which what is done is kept
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class Pace:
    """How steps are taken. `rate`: Adam's step, in units of each parameter's own root mean square, after `warm_up`
    steps. `decay`: of its second moments. `checks`: times the error is looked at. `clip`: the most that the gradient's
    norm may be. `floor`: what the root mean square is taken for if it is less."""

    rate: float
    decay: float
    warm_up: int = 10
    checks: int = 3
    clip: float = 1.0
    floor: float = 1e-4


@dataclass(frozen=True)
class Progress:
    """Where unfinished steps are kept, so that a killed run goes on: `read` gives what `write` was last given, None
    before."""

    read: Callable[[], dict[str, torch.Tensor] | None] = lambda: None
    write: Callable[[dict[str, torch.Tensor]], None] = lambda state: None


NOT_KEPT = Progress()


@contextmanager
def trained(model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """These parameters are the only ones of a model that get gradients in the block."""
    needed, own = [(each, each.requires_grad) for each in model.parameters()], list(parameters)
    model.requires_grad_(False)
    for each in own:
        each.requires_grad_(True)
    try:
        yield own
    finally:
        for each, before in needed:
            each.requires_grad_(before)


@torch.no_grad()
def _set(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


Tensors = list[torch.Tensor]


def _state(done: int, least: float, exact: Tensors, best: Tensors, adam: torch.optim.Adam) -> dict[str, torch.Tensor]:
    """What `descend` goes on from after so many steps."""
    state = {"done": torch.tensor(done), "least": torch.tensor(least, dtype=torch.float64)}
    for n, each in enumerate(exact):
        state |= {f"exact.{n}": each.detach(), f"best.{n}": best[n]}
        state |= {f"{name}.{n}": value for name, value in adam.state[each].items()}
    return state


def _restore(state: dict[str, torch.Tensor], exact: Tensors, best: Tensors, adam: torch.optim.Adam) -> None:
    """Parameters and moments as `_state` had them, in place."""
    _set(exact, (state[f"exact.{n}"] for n in range(len(exact))))
    _set(best, (state[f"best.{n}"] for n in range(len(best))))
    for n, each in enumerate(exact):
        moments = {name: state[f"{name}.{n}"] for name in MOMENTS if f"{name}.{n}" in state}
        adam.state[each] = {name: value if name == "step" else value.to(each) for name, value in moments.items()}


def descend(
    parameters: Sequence[torch.Tensor],
    steps: int,
    pace: Pace,
    loss: Callable[[int], torch.Tensor],
    error: Callable[[], float],
    least: float,
    update: Callable[[int], Any] = lambda steps: None,
    progress: Progress = NOT_KEPT,
) -> float:
    """Take steps in place; the state of the least error is kept, that of before if none is better. A step whose
    gradient is not finite is left out, or no later one would be.

    Args:
        parameters: of any type; some may get no gradient.
        loss: on the data of the step with this number. `error`: what is looked at. `least`: the error before.
        update: called with the steps just done, for a progress bar.

    Returns:
        The least error.
    """
    # In float32, whatever the parameters' type: a step is small against them.
    exact = [parameter.detach().float() for parameter in parameters]
    best = [parameter.detach().clone() for parameter in parameters]
    scales = [max(float(each.square().mean().sqrt()), pace.floor) for each in exact]
    adam, done = torch.optim.Adam([{"params": [each]} for each in exact], betas=(0.9, pace.decay)), 0
    if begun := progress.read():
        done, least = int(begun["done"]), float(begun["least"])
        _restore(begun, exact, best, adam)
        _set(parameters, exact)
        update(done)
    for step in range(done, steps):
        rate = pace.rate * min(1.0, (step + 1) / pace.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss(step).backward()
        for group, each, parameter, scale in zip(adam.param_groups, exact, parameters, scales, strict=True):
            group["lr"] = rate * scale
            each.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if torch.nn.utils.clip_grad_norm_(exact, pace.clip).isfinite():
            adam.step()
        _set(parameters, exact)
        looks = (step + 1) % max(1, steps // pace.checks) == 0 or step + 1 == steps
        if looks and (now := error()) < least:  # which NaN is not
            least, best = now, [parameter.detach().clone() for parameter in parameters]
        if (step + 1) % KEPT == 0:
            progress.write(_state(step + 1, least, exact, best, adam))
        update(1)
    _set(parameters, best)
    return least


def brought(
    parameters: Sequence[torch.Tensor],
    steps: int,
    pace: Pace,
    loss: Callable[[int], torch.Tensor],
    error: Callable[[], float],
    doing: str,
    judged: str,
    progress: Progress,
) -> dict[str, float]:
    """The error `before` and `after` the steps of `descend`, with a progress bar that says what is being done.

    Raises:
        UserError: if it is not finite before, naming what is `judged`.
    """
    with tqdm(total=steps, desc=doing, unit="step") as bar:
        if not math.isfinite(before := error()):
            raise UserError(f"{judged} not finite on held-out text; take a wider model.dtype")
        after = descend(parameters, steps, pace, loss, error, before, bar.update, progress)
    return {"before": before, "after": after}
