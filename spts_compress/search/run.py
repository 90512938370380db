"""From a recipe's target to a schedule: dense work, a search at each cost, and the winners on other prompts."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint.families import context_of
from ..modeling.configuration_spts import Amount, Proxy, Schedule, Stage, Update
from ..recipe import SearchSection
from ..tasks.runner import Answers
from ..timing.latency_table import LatencyTable, grid, measure
from ..utils.devices import hardware
from ..utils.distributed import Ranks
from ..utils.errors import UserError
from ..utils.store import Store, fingerprint
from . import halving, space
from .dense_reference import DenseReference, Log, References, answer_all
from .evaluator import Evaluator
from .prompts import PromptSet
from .retrieval_heads import reliability, retrieval_heads
from .winner import examine

RELIABILITY_PROMPTS = 4
HEAD_PROMPTS = 8  # to find heads with


def starts_of(section: SearchSection, config: Any) -> list[int]:
    """First skipping layers to try, checked against the model.

    Raises:
        UserError: for a layer that the model does not have, and for prompts longer than its context.
    """
    num_layers, context = config.num_hidden_layers, context_of(config)
    if max(section.lengths) > context:
        raise UserError(f"search.lengths: {max(section.lengths)} is more than the model's context of {context}")
    starts = section.start_layers(num_layers)
    for start in starts:
        if not 1 <= start < num_layers:
            raise UserError(f"search.starts: {start} is out of range; it must be 1 to {num_layers - 1}")
    if section.heads_from is not None and section.heads_from > starts[0]:
        raise UserError(f"search.heads_from: {section.heads_from} is after the first start; at most {starts[0]}")
    return starts


def widest(section: SearchSection, config: Any) -> Schedule:
    """A schedule that skips from the earliest layer on that a candidate may; the proxies, whatever their sizes, and the
    updates of candidates are fitted for it.

    Raises:
        UserError: see `starts_of`.
    """
    starts, end = starts_of(section, config), config.num_hidden_layers - 1
    start = section.heads_from or starts[0]
    update = (Update(**section.update.model_dump()),) if section.update else ()
    return Schedule(start, (Stage(end, Amount(0.2)),), (Proxy(1, 0),), ffn_selection="relative", update=update)


def latencies_of(model: Any, length: int) -> LatencyTable:
    """The stock model's latencies for prompts of up to `length` tokens on this machine."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return measure(model, ids.to(model.device), grid(length))


def _front(
    section: SearchSection, costs: space.Costs, evaluator: Evaluator, tune: References, held_out: References, log: Log
) -> list[dict[str, Any]]:
    """The best schedule at each cost, dearest first, up to the one that misses the wanted quality."""
    points: list[dict[str, Any]] = []
    given = section.choices.model_dump(include=section.choices.model_fields_set)
    starts = section.start_layers(costs.config.num_hidden_layers)
    seeds = space.seeds(starts, costs.heads is not None, bool(costs.update), given)
    for target in section.targets():
        words = "{} of {:g}".format(*target)
        tried = halving.search(costs, target, lambda some, count: evaluator.rows(some, tune[:count]), section, seeds)
        if not tried:
            log(f"no schedule has a {words}")
            break
        points.append(examine(tried, target, costs, evaluator, tune, held_out))
        seeds = [candidate.params for candidate in tried[: halving.ELITE]]
        quality = points[-1]["quality"]
        evaluator.progress.set_postfix_str(f"{words}: agreement {quality:.3f}, loss {tried[0].loss:.3f}")
        if section.quality is not None and quality < section.quality:
            break  # what costs even less is worse
    return points


def run(
    model: Any, skipping: Any, prompts: PromptSet, store: Store, key: str, log: Log, ranks: Ranks
) -> dict[str, Any]:
    """The best schedule at each cost that the target asks for, confirmed on prompts that none was chosen on; a wanted
    quality chooses among costs by these, so that the figure of the chosen one flatters a little.

    Args:
        model, skipping: the stock and the skipping model, on the same parameters.
        key: what every figure depends on beside schedule and prompt.

    Returns:
        `points`, one for each cost: `cost`, `winner`, `held_out` and `quality` with its interval on the prompts
        that confirm, what the loss becomes `without` each chosen value and with other `budgets` in one stage, a
        `diagnosis` of what is lost, and all that was `tried`. `chosen`: the number of the point that meets the
        target, None if none does. `notes` on the prompts. `reliability` of every layer's ranking by the last
        winner's probe. `heads`: layer, head and what it finds over what the best one does, best first; None if no
        candidate could choose some. `latencies`: the table of measured costs, None if they are counted. And the
        numbers of `candidates` and `evaluations`, those of earlier runs included, and the `seconds` of this run.
    """
    begin, section, num_layers = time.monotonic(), prompts.section, model.config.num_hidden_layers
    longest, fitted = max(section.lengths), skipping.config.schedule()
    layers = {start - 1 for start in (fitted.start, *section.start_layers(num_layers))}
    references = answer_all(model, prompts, sorted(layers), store, key, log, ranks)
    tune, held_out = references[: section.num_prompts], references[section.num_prompts :]

    def mean(name: str, count: int, figures: Callable[[DenseReference], list], key: str) -> torch.Tensor:
        """The mean over so many of the longest prompts of the figures of each, which are kept."""
        some = [reference for reference in tune if reference.item.limit == longest][:count]
        shard = tqdm(ranks.shard(some), desc=name, unit="prompt")
        rows = [store.json(name, fingerprint(key, reference.key), partial(figures, reference)) for reference in shard]
        return torch.tensor(ranks.all_gather(rows)).mean(dim=0)

    heads = latencies = rankings = None
    if not all(isinstance(value, str) for value in section.choices.heads):
        count = max(HEAD_PROMPTS, len(section.kinds))  # in turn, so all kinds are there
        worth = mean("heads", count, partial(retrieval_heads, skipping, prompts.tokenizer), key)
        worth /= worth[fitted.start :].max().clamp_min(1e-9)
        heads = {
            (layer, head): float(value)
            for layer in range(fitted.start, num_layers)
            for head, value in enumerate(worth[layer])
        }
    dense_seconds = time.monotonic() - begin
    if section.cost == "measured":
        machine = fingerprint(key, hardware(str(model.device)), longest)
        with ranks.main_first():
            latencies = LatencyTable(**store.json("latencies", machine, lambda: asdict(latencies_of(model, longest))))

    proxies = {layer: fitted.proxy_of(layer) for layer in range(fitted.start, num_layers)}
    costs = space.Costs(model.config, longest, proxies, heads, latencies, fitted.update)
    with tqdm(desc="searching", unit="evaluation") as bar:
        answers = Answers(store.path("search", key, ".jsonl"), ranks.rank)
        answers.check = store.check
        evaluator = Evaluator(skipping, answers, key, bar, section.kinds, ranks)
        points = _front(section, costs, evaluator, tune, held_out, log)
    if points:
        probe = Schedule.from_dict(points[-1]["winner"]["schedule"], num_layers).probe
        rank = partial(reliability, skipping, prompts.tokenizer, probe)
        rankings = mean("reliability", RELIABILITY_PROMPTS, rank, fingerprint(key, asdict(probe))).tolist()
    meets = [i for i, p in enumerate(points) if section.quality is None or p["quality"] >= section.quality]
    notes = [*prompts.notes]
    if section.require_dense_correct and (wrong := sum(not r.right(prompts.tokenizer) for r in references)):
        notes.append(f"Of the {len(references)} prompts the dense model answers {wrong} wrongly; they count too.")
    return {
        "points": points,
        "notes": notes,
        "chosen": meets[-1] if meets and section.decides else None,
        "reliability": rankings,
        "heads": heads and sorted(([*pair, worth] for pair, worth in heads.items()), key=lambda row: -row[2]),
        "latencies": latencies and asdict(latencies),
        "evaluations": len(evaluator.used),
        "candidates": sum(len(point["tried"]) for point in points),
        "seconds": {"dense": dense_seconds, "all": time.monotonic() - begin},
    }
