"""Distillation: all updates together, taken nearer to the dense model's next tokens by gradient steps.

A map fitted in closed form mends what its own layer left undone; it does not know what later layers make of it, nor
what the answer needs. Here the whole prefill of a prompt skips, its last tokens follow on the cache that it leaves, and
the gradient of their KL(dense || SPTS) goes back through it to every map. The base's weights, and the choice of
tokens, stay as they are.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from ..modeling.update import UPDATES
from ..recipe import DistillSection
from ..utils.errors import UserError
from .updates import prompts_of

RATE = 0.02  # Adam's step, in units of each parameter's own root mean square
WARM_UP = 10  # steps
CHECKS = 3  # times the held-out tokens are looked at
CHECKED = 12  # prompts of them, at most


@contextmanager
def trained(model: Any) -> Iterator[list[torch.nn.Parameter]]:
    """Yields the updates' parameters, the only ones that get gradients in the block; scores get none."""
    layers = model.model.layers[model.config.schedule().start :]
    parameters = [each for layer in layers for name in UPDATES for each in getattr(layer, name).parameters()]
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(any(parameter is each for each in parameters))
        for layer in layers:
            layer._scores = torch.no_grad()(layer._scores)
            stack.callback(delattr, layer, "_scores")
        yield parameters


def loss(model: Any, ids: torch.Tensor, following: int) -> torch.Tensor:
    """Mean KL(dense || SPTS) in nats at the prompt's end and at the `following` tokens after it, the last of `ids`
    (1, n)."""
    options = {"use_cache": True, "logits_to_keep": following + 1}
    with torch.no_grad():
        expected = log_softmax(model(ids, spts=False, **options).logits[0].float(), dim=-1)
    found = log_softmax(model(ids, spts={"min_length": 0}, **options).logits[0].float(), dim=-1)
    return kl_div(found, expected, reduction="batchmean", log_target=True)


def distill(
    model: Any, fit: list[torch.Tensor], held_out: list[torch.Tensor], section: DistillSection
) -> dict[str, float]:
    """Take steps of Adam with a cosine schedule, each on another stretch of the text, in place; the updates that are
    best on held-out text are kept.

    Args:
        model: a skipping causal language model with updates, some of which it uses in prompts of `section.length`.
        fit, held_out: token sequences, each together of `section.tokens` at least.

    Returns:
        Mean KL(dense || SPTS) in nats of held-out text that follows a prompt, `before` and `after`.

    Raises:
        UserError: if it is not finite before.
    """
    generator = torch.Generator().manual_seed(section.seed)
    stream, steps, size = torch.cat(fit), section.steps, section.tokens
    checked = prompts_of(held_out, size)[:CHECKED, None].to(model.device)

    @torch.no_grad()
    def error() -> float:
        return sum(float(loss(model, ids, section.following)) for ids in checked) / len(checked)

    with trained(model) as parameters:
        # In float32, whatever the model's type: a step is small against the parameter.
        exact = [parameter.detach().float() for parameter in parameters]
        adam = torch.optim.Adam([{"params": [each]} for each in exact], betas=(0.9, 0.95))
        scales = [max(float(each.square().mean().sqrt()), 1e-4) for each in exact]
        before = least = error()
        if not math.isfinite(before):
            raise UserError("distill: the model's logits are not finite on held-out text; take a wider model.dtype")
        best = [parameter.detach().clone() for parameter in parameters]
        for step in tqdm(range(steps), desc="distilling", unit="step"):
            rate = RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            begin = int(torch.randint(len(stream) - size + 1, (), generator=generator))
            loss(model, stream[None, begin : begin + size].to(model.device), section.following).backward()
            for group, each, parameter, scale in zip(adam.param_groups, exact, parameters, scales, strict=True):
                group["lr"] = rate * scale
                each.grad = None if parameter.grad is None else parameter.grad.float()  # a layer may skip nothing
                parameter.grad = None
            if torch.nn.utils.clip_grad_norm_(exact, 1.0).isfinite():  # else no later one would be
                adam.step()
            with torch.no_grad():
                for each, parameter in zip(exact, parameters, strict=True):
                    parameter.copy_(each)
            looks = (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps
            if looks and (now := error()) < least:  # which NaN is not
                least, best = now, [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)
    return {"before": before, "after": least}
