"""Distillation: all updates together, taken nearer to the dense model's next tokens by gradient steps.

A map fitted in closed form mends what its own layer left undone; it does not know what later layers make of it, nor
what the answer needs. Here the whole prefill of a prompt skips, its last tokens follow on the cache that it leaves, and
the gradient of their KL(dense || SPTS) goes back through it to every map. The base's weights, and the choice of
tokens, stay as they are.
"""

from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from ..modeling.update import UPDATES
from ..recipe import DistillSection
from .descent import NOT_KEPT, Pace, Progress, brought, trained
from .updates import prompts_of

RATE = 0.02  # Adam's step, in units of each parameter's own root mean square
CHECKED = 12  # prompts of them, at most


@torch.no_grad()
def dense_logits(model: Any, ids: torch.Tensor, following: int) -> torch.Tensor:
    """The dense model's, (following + 1, V), at the prompt's end and at the `following` tokens after it, the last of
    `ids` (1, n)."""
    return model(ids, spts=False, use_cache=True, logits_to_keep=following + 1).logits[0]


def loss(model: Any, ids: torch.Tensor, following: int, dense: torch.Tensor | None = None) -> torch.Tensor:
    """Mean KL(dense || SPTS) in nats at these positions, see `dense_logits`, of which `dense` is the result if it is
    known."""
    dense = dense_logits(model, ids, following) if dense is None else dense
    found = model(ids, spts={"min_length": 0}, use_cache=True, logits_to_keep=following + 1).logits[0]
    wanted, found = (log_softmax(logits.float(), dim=-1) for logits in (dense, found))
    return kl_div(found, wanted, reduction="batchmean", log_target=True)


def distill(
    model: Any,
    fit: list[torch.Tensor],
    held_out: list[torch.Tensor],
    section: DistillSection,
    progress: Progress = NOT_KEPT,
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
    stream, size, generator = torch.cat(fit), section.tokens, torch.Generator().manual_seed(section.seed)
    begins = torch.randint(len(stream) - size + 1, (section.steps,), generator=generator).tolist()
    checked = prompts_of(held_out, size)[:CHECKED, None].to(model.device)
    expected = [dense_logits(model, ids, section.following) for ids in checked]  # for all looks

    @torch.no_grad()
    def error() -> float:
        losses = (loss(model, ids, section.following, dense) for ids, dense in zip(checked, expected, strict=True))
        return sum(map(float, losses)) / len(checked)

    def loss_of(step: int) -> torch.Tensor:
        ids = stream[None, begins[step] : begins[step] + size]
        return loss(model, ids.to(model.device), section.following)

    pace = Pace(RATE, decay=0.95)
    told = "distilling", "distill: the model's logits are"
    layers = model.model.layers[model.config.schedule().start :]
    own = [each for layer in layers for name in UPDATES for each in getattr(layer, name).parameters()]
    with trained(model, own) as parameters:
        return brought(parameters, section.steps, pace, loss_of, error, *told, progress)
