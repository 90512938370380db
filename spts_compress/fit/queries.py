"""The probing queries' corrections: the last tokens of a prompt ask for what the answer will attend to.

Which tokens a layer may skip is scored by what the prompt's own last queries attend to; what the answer attends to is
known only once it is written. In calibration it is: each layer by itself, in the dense model's states, learns by
gradient steps what to add to the last tokens' normed states so that their scores come nearer to the attention of the
tokens that follow.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, kl_div
from tqdm import tqdm

from ..calibrate.data import Blocks
from ..modeling.configuration_spts import Schedule
from ..modeling.selection import probe_scores, reduce_heads
from ..modeling.stock_layer import cos_sin_of, layer_windows
from ..modeling.update import QUERIES
from ..recipe import QueriesSection
from ..tasks import agreement, ruler
from ..tasks.example import token_ids
from ..tasks.runner import padded, stops, until_end, until_switch
from ..timing.pairs import GREEDY
from ..utils.errors import UserError
from .descent import NOT_KEPT, Pace, Progress, brought, trained

Rows = list[list[int]]  # of tokens
Text = tuple[list[int], int]  # tokens, and how many, the last ones, follow a prompt; 0: its answer is to come
RATE = 0.01  # Adam's step, in units of each parameter's own root mean square, or of `1 / sqrt(D)` if that is less
TOGETHER = 16384  # tokens of questions that are answered at once
CHECKED = 9  # of each kind: a needle of every task


def texts_of(
    sequences: list[torch.Tensor], tokenizer: Any, section: QueriesSection, count: int, half: int
) -> list[Text]:
    """`count` texts to fit on (`half` 0) or to check by (1), which have no needle in common, with each other or with an
    evaluation: of the section's kinds, made of a text, in turn.

    Raises:
        UserError: if a prompt does not fit into `section.length`, or the text has no prose to make one of.
    """
    seed, size, kinds = 10**9 * (1 + section.seed) + 10**6 * half, section.tokens, section.kinds
    stream, rng, made = torch.cat(sequences), random.Random(seed), list[Text]()
    prose, tasks = tokenizer.decode(stream.tolist(), skip_special_tokens=True), cycle([*ruler.NEEDLES, "vt"])
    for number in range(count):
        kind, given = kinds[number % len(kinds)], (tokenizer, prose, size)
        if kind == "text":
            begin = rng.randrange(len(stream) - size + 1)
            made.append((stream[begin : begin + size].tolist(), section.following))
            continue
        try:
            if kind == "questions":
                nth, of = number // len(kinds), -(-count // len(kinds))
                example = agreement.question(*given, nth, of, section.following, seed)
            else:
                example = ruler.examples(next(tasks), *given, 1, seed + number, section.following)[0]
        except UserError as error:
            raise UserError(f"queries: {error}") from None
        known = " " + ", ".join(example.outputs) if example.outputs else ""
        answer = tokenizer(known, add_special_tokens=False)["input_ids"][: section.following]
        made.append((token_ids(tokenizer, example.text) + answer, len(answer)))
    return made


def pair_of_texts(blocks: Blocks, tokenizer: Any, section: QueriesSection) -> tuple[list[Text], list[Text]]:
    """Texts to fit on, one for each step, and to check by; see `texts_of`."""
    parts = (blocks.fit, section.steps), (blocks.held_out, CHECKED * len(section.kinds))
    fit, check = (texts_of(part, tokenizer, section, count, half) for half, (part, count) in enumerate(parts))
    return fit, check


def answered(
    model: Any,
    texts: Sequence[Text],
    most: int,
    kept: Callable[[Rows, Callable[[], Rows]], Rows] = lambda prompts, make: make(),
) -> list[Text]:
    """The texts, each prompt without an answer with the stock `model`'s own, greedy, of at most so many tokens.

    Args:
        kept: given some prompts and what makes their answers, gives them as they were made before, if they were.
    """
    made, waiting = list(texts), [number for number, (_, following) in enumerate(texts) if not following]
    with tqdm(total=len(waiting), desc="dense answers", unit="text", disable=not waiting) as bar:
        count = max(1, TOGETHER // max((len(texts[number][0]) for number in waiting), default=1))
        for begin in range(0, len(waiting), count):
            numbers = waiting[begin : begin + count]
            prompts = [texts[number][0] for number in numbers]
            for number, answer in zip(numbers, kept(prompts, partial(_answers, model, prompts, most)), strict=True):
                made[number] = texts[number][0] + answer, len(answer)
            bar.update(len(numbers))
    return made


@torch.no_grad()
def _answers(model: Any, prompts: Rows, most: int) -> Rows:
    inputs = padded(prompts, 0, model.device)
    end = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **GREEDY, max_new_tokens=until_switch(model.config, end, most))
    return [until_end(row, stops(model)) for row in out.sequences[:, end:].tolist()]


def scoring(schedule: Schedule, config: Any, tokens: int) -> list[int]:
    """The layers that get a correction: those with heads that score, and no window shorter than so many tokens."""
    layers, windows = range(schedule.start, config.num_hidden_layers), layer_windows(config)
    return [n for n in layers if schedule.probe.heads_of(n) and (windows[n] or tokens) >= tokens]


def spread(scores: torch.Tensor, schedule: Any) -> torch.Tensor:
    """Logarithms of the shares that candidates which need to be chosen have of the scores (T), each a mean over as many
    neighbours as pooling takes."""
    width = schedule.probe.kernel_size
    smooth = avg_pool1d(scores[None, None], width, stride=1, padding=width // 2)[0, 0]
    chosen = smooth[schedule.sink_tokens : len(scores) - schedule.always_last].clamp_min(1e-12)
    return (chosen / chosen.sum()).log()


def layer_loss(layer: Any, number: int, config: Any, states: torch.Tensor, tables: Any, following: int) -> torch.Tensor:
    """KL in nats of a layer's scores of a prompt from the attention, mean over heads, that its `following` tokens pay
    it.

    Args:
        states: before the layer, (1, n + following, D).
        tables: its rotary tables.
    """
    schedule, scaling, end = config.schedule(), layer.self_attn.scaling, states.shape[1] - following
    window, heads = min(schedule.probe.window_size, end), schedule.probe.heads_of(number)
    named = None if isinstance(heads, str) else torch.tensor(heads, device=states.device)
    with torch.no_grad():
        normed, cos_sin = layer.normed("before_attention", states), cos_sin_of(tables)
        key = layer.keys(normed, *cos_sin)
        query = layer.probes(normed[:, end:], *(table[:, end:] for table in cos_sin))
        wanted = probe_scores(query, key, scaling)[0, :, :end].mean(0)
    last = slice(end - window, end)
    query = layer.asked(normed[:, last], *(table[:, last] for table in cos_sin), rank=schedule.probe.rank)
    found = probe_scores(query, key[:, :, :end], scaling, heads=named)
    found = reduce_heads(found, heads if named is None else "mean")[0]
    wanted, found = (spread(scores, schedule) for scores in (wanted, found))
    return kl_div(found, wanted, reduction="sum", log_target=True)


def loss(model: Any, layers: list[int], text: Text) -> torch.Tensor:
    """Mean of `layer_loss` over `layers` in one dense pass."""
    losses, (ids, following) = list[torch.Tensor](), text

    def note(number: int, layer: Any, args: tuple, kwargs: dict) -> None:
        with torch.enable_grad():
            tables = kwargs["position_embeddings"]
            losses.append(layer_loss(layer, number, model.config, args[0].detach(), tables, following).to(model.device))

    with ExitStack() as stack, torch.no_grad():
        for n in layers:
            handle = model.model.layers[n].register_forward_pre_hook(partial(note, n), with_kwargs=True)
            stack.callback(handle.remove)
        model.model(torch.tensor([ids], device=model.device), use_cache=False)
    return torch.stack(losses).mean()


def fit_queries(
    model: Any,
    texts: Sequence[Text],
    checked: Sequence[Text],
    section: QueriesSection,
    progress: Progress = NOT_KEPT,
) -> dict[str, float]:
    """Fit the corrections of a skipping causal language model in place; those that are best on `checked` are kept.

    Args:
        texts: one for each step.

    Returns:
        Mean KL in nats, see `layer_loss`, on `checked`: `before` and `after`.

    Raises:
        UserError: if it is not finite before.
    """
    layers = scoring(model.config.schedule(), model.config, section.tokens)
    generator = torch.Generator().manual_seed(section.seed)
    fitted = [getattr(model.model.layers[n], QUERIES) for n in layers]
    for each in fitted:
        each.down.data.copy_(torch.randn(each.down.shape, generator=generator) / math.sqrt(each.down.shape[1]))

    def error() -> float:
        return sum(float(loss(model, layers, text).detach()) for text in checked) / len(checked)

    pace = Pace(RATE, decay=0.99, floor=1 / math.sqrt(model.config.hidden_size))
    own = [parameter for each in fitted for parameter in each.parameters()]
    told = "fitting queries", "queries: attention is"
    with trained(model, own) as parameters:
        return brought(parameters, section.steps, pace, lambda n: loss(model, layers, texts[n]), error, *told, progress)
