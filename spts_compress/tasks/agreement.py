"""Fidelity without labels: how far the skipping model's next tokens are from the dense model's.

- along the dense model's own free answer: KL(dense || SPTS) and top-1 agreement, teacher-forced after each prefill;
- how often free answers fall into repetition;
- perplexity of the text that follows a long prompt.
"""

from typing import Any

import torch

from .example import Item, about, chat, counted, sentences
from .runner import encode

QUESTION = "Explain in a few sentences what the following text says.\n\n{context}"
TASK = "free_answer"
GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": False}  # whatever the generation config says
REPEATED = 0.5  # an answer repeats itself if less than this share of its 4-token sequences are different


def items(tokenizer: Any, prose: str, length: int, count: int, answer_tokens: int) -> list[Item]:
    """`count` prompts of at most `length` tokens, answer included, that ask for a free answer about a stretch of
    `prose`, each from another place.

    Raises:
        UserError: if the question alone does not fit into `length`, or `prose` has no sentence.
    """
    parts, made = sentences(prose), []

    def ask(context: str) -> str:
        return chat(tokenizer, QUESTION.format(context=context))

    for index in range(count):
        start = index * len(parts) // count
        text = about(parts, start, tokenizer, length - answer_tokens, ask)
        made.append(
            Item(TASK, index, text, [], counted(TASK, tokenizer, text, length, answer_tokens), length, answer_tokens)
        )
    return made


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor, count: int, spts: Any) -> torch.Tensor:
    """Log probabilities (count, vocabulary), in float32, at the last `count` positions of `ids` (1, n): what comes
    before them is the prompt, and they follow it on its cache."""
    extra = {} if spts is None else {"spts": spts}
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=count, **extra).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def agreement(dense: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """`kl`: mean KL(dense || other) in nats; `top1`: share of positions with the same most likely token."""
    kl = (dense.exp() * (dense - other)).sum(-1)
    return {"kl": float(kl.mean()), "top1": float((dense.argmax(-1) == other.argmax(-1)).float().mean())}


def repeats(tokens: list[int]) -> bool:
    """Whether an answer repeats itself."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(grams) >= 8 and len(set(grams)) < REPEATED * len(grams)


def measure(model: Any, tokenizer: Any, item: Item, following: str | None) -> dict[str, Any]:
    """All measures of one prompt.

    Args:
        item: a prompt that asks for a free answer.
        following: text whose first part is taken as a prompt, and whose last 128 tokens are predicted after it; None
            if `loss` is not wanted.
    """
    inputs = encode(tokenizer, [item.text], model.device)
    with torch.no_grad():
        free = {
            name: model.generate(**inputs, **GREEDY, max_new_tokens=item.answer_tokens, **options)[0]
            for name, options in (("dense", {"spts": False}), ("spts", {}))
        }
    start = inputs["input_ids"].shape[1]
    own = free["dense"]
    logs = [log_probabilities(model, own[None, :-1], len(own) - start, spts) for spts in (False, None)]
    losses = None
    if following is not None:
        ids = tokenizer(following, return_tensors="pt", verbose=False)["input_ids"][:, : item.tokens].to(model.device)
        target = ids[0, -128:, None]
        losses = {
            name: -float(log_probabilities(model, ids[:, :-1], 128, spts).gather(1, target).mean())
            for name, spts in (("dense", False), ("spts", None))
        }
    return {
        **agreement(*logs),
        "tokens": len(own) - start,
        "repeats": {name: repeats(row[start:].tolist()) for name, row in free.items()},
        "answers": {name: tokenizer.decode(row[start:], skip_special_tokens=True) for name, row in free.items()},
        "loss": losses,
    }
