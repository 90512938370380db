"""Fidelity without labels: how far the skipping model's next tokens are from the dense model's.

- along the dense model's own free answer: KL(dense || SPTS) and top-1 agreement, teacher-forced after each prefill;
- how often free answers fall into repetition;
- perplexity of the text that follows a long prompt.
"""

import random
from collections.abc import Mapping
from typing import Any

import torch

from ..timing.pairs import GREEDY, Way
from ..utils.errors import UserError
from .example import Example, ask_about, different, places, sentences
from .runner import encode, until_switch

QUESTION = "Explain in a few sentences what the following text says.\n\n{context}"
QUESTIONS = (
    QUESTION,
    "{context}\n\nWhich names and terms matter most in the text above, and what is said of them?",
    "Read the text and answer the question below.\n\n{context}\n\nQuestion: what does the text say about {term}?",
    "{context}\n\nSummarize the text above.",
)
TASK = "free_answer"
REPEATED = 0.5  # an answer repeats itself if less than this share of its 4-token sequences are different
FOLLOWING = 128  # tokens of following text that are predicted


def examples(
    tokenizer: Any, haystack: str, length: int, count: int, answer_tokens: int, first: float = 0.0
) -> list[Example]:
    """`count` prompts of at most `length` tokens, answer included, that ask for a free answer about a stretch of
    `haystack`, each from another place; the first one's is at `first` of it, from 0 to 1.

    Raises:
        UserError: if the question alone does not fit into `length`, or `haystack` has no sentence, or two
            prompts are the same.
    """
    parts = sentences(haystack)
    made = [
        ask_about(TASK, index, tokenizer, parts, start, QUESTION, length, answer_tokens)
        for index, start in enumerate(places(parts, count, first))
    ]
    return different(TASK, made)


def question(tokenizer: Any, prose: str, length: int, number: int, count: int, tokens: int, seed: int) -> Example:
    """As `examples`, the one with this `number` of `count`, each from another place as far as there are any; what is
    asked, they take in turn. `tokens`: of the answer."""
    rng, parts = random.Random(f"{seed} {number} {length}"), sentences(prose)
    start = places(parts, count, random.Random(f"{seed} {length}").random())[number % count]
    words = [word.strip(".,;:()'\"") for word in " ".join(parts[start : start + 40]).split()]
    term = rng.choice([word for word in words if len(word) > 6] or words)
    asked = QUESTIONS[number % len(QUESTIONS)].replace("{term}", term)
    return ask_about(TASK, number, tokenizer, parts, start, asked, length, tokens)


@torch.no_grad()
def log_probabilities(way: Way, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Log probabilities (count, vocabulary), in float32, at the last `count` positions of `ids` (1, n): what comes
    before them is the prompt, and they follow it on its cache."""
    model, options = way
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=count, **options).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def agreement(dense: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """`kl`: mean KL(dense || other) in nats; `top1`: share of positions with the same most likely token. Where `other`
    is NaN it agrees on nothing, and the KL is NaN too. Both are log probabilities (a, V).

    Raises:
        UserError: if `dense` is NaN.
    """
    if dense.isnan().any():
        raise UserError("the dense model's logits are NaN, so nothing can be compared with them; take a wider dtype")
    kl = (dense.exp() * (dense - other)).sum(-1)
    same = (dense.argmax(-1) == other.argmax(-1)) & ~other.isnan().any(-1)
    return {"kl": float(kl.mean()), "top1": float(same.float().mean())}


def repeats(tokens: list[int]) -> bool:
    """Whether an answer repeats itself."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(grams) >= 8 and len(set(grams)) < REPEATED * len(grams)


@torch.no_grad()
def free_answer(way: Way, tokenizer: Any, example: Example) -> list[int]:
    """The tokens of the greedy answer."""
    model, options = way
    inputs = encode(tokenizer, [example.text], model.device)
    prompt = inputs["input_ids"].shape[1]
    tokens = until_switch(model.config, prompt, example.answer_tokens)
    return model.generate(**inputs, **GREEDY, max_new_tokens=tokens, **options).sequences[0, prompt:].tolist()


def along_answer(ways: Mapping[str, Way], tokenizer: Any, example: Example, answer: list[int]) -> dict[str, float]:
    """`agreement` of dense and SPTS along the dense model's own `answer`."""
    prompt = encode(tokenizer, [example.text], ways["dense"][0].device)["input_ids"]
    ids = torch.cat([prompt, prompt.new_tensor([answer[:-1]])], dim=1)
    dense, spts = (log_probabilities(ways[name], ids, len(answer)) for name in ("dense", "spts"))
    return agreement(dense, spts)


def following_loss(ways: Mapping[str, Way], tokenizer: Any, text: str, length: int) -> dict[str, float] | None:
    """Mean loss in nats of the last 128 of the first `length` tokens of `text`, after those before them; None if `text`
    is shorter, or SPTS skips none of these, or a model reads the longer text in another way."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :length].to(ways["dense"][0].device)
    config = ways["spts"][0].config
    if ids.shape[1] < length or not config.schedule().skips(length - FOLLOWING):
        return None
    if until_switch(config, length - FOLLOWING, FOLLOWING) < FOLLOWING:
        return None
    target = ids[0, -FOLLOWING:, None]
    return {
        name: -float(log_probabilities(way, ids[:, :-1], FOLLOWING).gather(1, target).mean())
        for name, way in ways.items()
    }


def measure(ways: Mapping[str, Way], tokenizer: Any, example: Example, following: str | None) -> dict[str, Any]:
    """All measures of one prompt that asks for a free answer.

    Args:
        following: text that `following_loss` reads as far as the example's prompt is long; None if that is not wanted.
    """
    tokens = {name: free_answer(way, tokenizer, example) for name, way in ways.items()}
    return {
        **along_answer(ways, tokenizer, example, tokens["dense"]),
        "repeats": {name: repeats(answer) for name, answer in tokens.items()},
        "answers": {name: tokenizer.decode(answer, skip_special_tokens=True) for name, answer in tokens.items()},
        "loss": None if following is None else following_loss(ways, tokenizer, following, example.tokens),
    }
