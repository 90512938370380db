"""From which prompt length on skipping pays, on the machine at hand."""

from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .pairs import in_turn, memory, ratio, seconds

SHORTEST, LONGEST = 64, 32768


def break_even(dense: Any, spts: Any, pairs: int = 5) -> int | None:
    """The first of 64, 128, 256, ... tokens, up to 32K, at which SPTS has the shorter TTFT (median of `pairs` ratios);
    None if it has it at none that the context allows. The prompt's tokens are random: time does not depend on them."""
    limit, length = min(LONGEST, spts.config.max_position_embeddings - 1), SHORTEST
    generator = torch.Generator().manual_seed(0)
    with tqdm(desc="timing for the break-even", unit="pair") as progress:
        while length <= limit:
            progress.set_postfix_str(f"{length} tokens")
            ids = torch.randint(spts.config.vocab_size, (1, length), generator=generator).to(spts.device)
            modes = {"dense": (dense, {}), "spts": (spts, {"spts": {"min_length": 0}})}
            for model, options in modes.values():
                memory(model, ids, **options)  # warms up
            runs = {name: partial(seconds, model, ids, (1,), **options) for name, (model, options) in modes.items()}
            if ratio(in_turn(runs, pairs, progress.update), "spts", 1)["median"] > 1:
                return length
            length *= 2
    return None
