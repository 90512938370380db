"""From which prompt length on skipping pays, on the machine at hand."""

from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from .pairs import compare

SHORTEST, LONGEST = 64, 32768


def shortest_paying_length(dense: Any, spts: Any, pairs: int = 5) -> int | None:
    """The first of 64, 128, 256, ... tokens, up to 32K, at which SPTS skips tokens and has the shorter TTFT (median of
    `pairs` ratios), as it has at the next one (the longest: once more), since noise may favour one; None if there is
    none that the context allows. The prompt's tokens are random: time does not depend on them."""
    schedule = replace(spts.config.schedule(), min_length=0)
    limit, length = min(LONGEST, spts.config.max_position_embeddings - 1), SHORTEST
    generator, first = torch.Generator().manual_seed(0), None
    ways = {"dense": (dense, {}), "spts": (spts, {"spts": {"min_length": 0}})}
    with tqdm(desc="timing for the break-even", unit="pair") as progress:
        while length <= limit:
            if not schedule.skips(length):  # both would run dense, and noise would tell which is faster
                length *= 2
                continue
            progress.set_postfix_str(f"{length} tokens")
            ids = torch.randint(spts.config.vocab_size, (1, length), generator=generator).to(spts.device)
            pays = compare(ways, ids, pairs, tick=progress.update)["spts"]["speedup"][0]["median"] > 1
            if pays and first:
                break
            first = length if pays else None
            if not pays or 2 * length <= limit:  # the longest one is asked again
                length *= 2
    return first
