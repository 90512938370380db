"""The keys and values that a skipped prefill leaves: shorter than the prompt, and of another length in every layer.
Bookkeeping, and no part of the method."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


def fill_layers(cache: Any, count: int) -> None:
    """Give a cache that makes its layers when they are first used as many as `count`."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) < count:
        cache.layers.append(cache.layer_class_to_replicate())


class SkippedCacheLayer(DynamicLayer):
    """KV cache of a layer that skipped prompt tokens: shorter than the prompt, and its rows may start with padding.

    `prompt_length`: slots of the prompt, with padding. `candidates`: what its tokens were chosen from. `active`: slots
    its attention ran on. `cached`: slots that entered the cache. `kept`: those still held. `protected`: how many of the
    prompt's last tokens every layer holds. `stage`: layers of one stage run on equally many tokens. `generated`: tokens
    that came after the prompt.
    What goes by rows and moves with them: `valid`: which of the kept slots are not padding, (B, kept), None if all are.
    `mask`: which slots of the prompt are not, (B, prompt_length), likewise; known to the first of a cache's layers.
    `positions`: on request, the places in the row's prompt that the cached tokens came from, (B, cached), -1 for
    padding, and `ends`, the place after it, (B, 1).
    """

    def __init__(
        self,
        prompt_length: int,
        candidates: int,
        active: int,
        cached: int,
        valid: torch.Tensor | None,
        protected: int,
        stage: int,
    ):
        super().__init__()
        self.prompt_length, self.candidates, self.active, self.cached = prompt_length, candidates, active, cached
        self.protected, self.stage, self.kept, self.generated = protected, stage, cached, 0
        self.valid = valid
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.ends: torch.Tensor | None = None

    def tokens_seen(self) -> int:
        """Tokens of the text that the layer has run on; none after a prefill that did not come to it."""
        return self.prompt_length + self.generated if self.is_initialized else 0

    def fits(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Whether a mask (B, all tokens so far) has the prompt as the prefill had it, a tensor on the mask's device."""
        prompt = attention_mask[:, : self.prompt_length].bool()
        return (prompt if self.mask is None else prompt == self.mask.to(prompt.device)).all()

    def note_positions(self, slots: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Keep which tokens are cached, if `ends` is set: those at `slots` (B, cached) of the padded prompt."""
        if self.ends is not None:
            positions = slots.to(self.ends.device) - (self.prompt_length - self.ends)
            self.positions = positions if valid is None else positions.masked_fill(~valid.to(positions.device), -1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.get_seq_length() > 0 or self.prompt_length == 0:
            self.generated += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def _move_rows(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("valid", "mask", "positions", "ends"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, move(rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._move_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._move_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._move_rows(lambda rows: rows[indices, ...])

    def reset(self) -> None:
        super().reset()
        self.prompt_length = self.candidates = self.active = self.cached = 0
        self.kept = self.protected = self.generated = 0
        self.valid = self.mask = self.positions = self.ends = None

    def places(self, states: torch.Tensor) -> torch.Tensor | None:
        """Where in their row's text the tokens are that are held here, and then the new `states` (B, new, D); None
        where no window asks for it."""
        return None

    def attention_mask(self, attention_mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor | None:
        """Which of the tokens held here, then of the new `states`, are not padding; None if all are.

        `attention_mask` (B, all tokens so far) is the caller's; None if it holds no padding.
        """
        if attention_mask is None and self.valid is None:
            return None
        held = self.valid
        if held is None:
            held = torch.ones(states.shape[0], self.kept, dtype=torch.bool, device=states.device)
        generated = self.get_seq_length() - self.kept + states.shape[1]
        if attention_mask is None:
            new = torch.ones(states.shape[0], generated, dtype=torch.bool, device=states.device)
        else:
            new = attention_mask[:, attention_mask.shape[1] - generated :].to(states.device, torch.bool)
        return torch.cat([held.to(states.device), new], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        count = abs(tokens_to_remove)
        of_prompt = max(0, count - self.generated)
        if of_prompt > self.protected:
            raise ValueError(
                f"cannot crop {count} tokens: {self.generated} came after the prompt, and every layer holds "
                f"only the last {self.protected} of the prompt (recent_tokens, or probe.window_size if that is more). "
                "Run the prompt again instead."
            )
        super().crop(tokens_to_remove)
        self.generated -= count - of_prompt
        if of_prompt:
            self.prompt_length, self.protected = self.prompt_length - of_prompt, self.protected - of_prompt
            for name in ("candidates", "active", "cached", "kept"):
                setattr(self, name, getattr(self, name) - of_prompt)
            for name in ("valid", "mask", "positions"):
                if (rows := getattr(self, name)) is not None:
                    setattr(self, name, rows[:, : rows.shape[1] - of_prompt])
            self.ends = None if self.ends is None else self.ends - of_prompt
