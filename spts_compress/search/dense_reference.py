"""Work that every candidate shares: the dense pass over each prompt, kept at the layers where skipping may begin."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..tasks.example import Example
from ..tasks.recovery import score_rows
from ..tasks.runner import encode, until_switch
from ..timing.pairs import GREEDY
from ..utils.distributed import Ranks
from ..utils.store import Store, fingerprint
from .prompts import PromptSet

Log = Callable[[str], None]
ATTEMPTS = 8  # at a prompt that the dense model answers rightly


@dataclass(frozen=True)
class DenseReference:
    """What the dense model did with one prompt of n tokens and its own greedy answer of a tokens.

    `final`: normed states (a, D) that the answer's tokens are predicted from. `store`, `key`: where the states
    (1, n + a - 1, D) before the `layers` are kept.
    """

    item: Example
    answer: torch.Tensor
    final: torch.Tensor
    store: Store
    key: str
    layers: Sequence[int]

    def right(self, tokenizer: Any) -> bool:
        """Whether the answer is the known one, if one is known."""
        answer = tokenizer.decode(self.answer, skip_special_tokens=True)
        return not self.item.outputs or score_rows([{**self.item.to_row(), "answer": answer}])[0]["score"] == 1

    def states_before(self, start: int) -> tuple[int, torch.Tensor]:
        """The last of the `layers` before `start`, and the states that go into it."""
        layer = max(kept for kept in self.layers if kept < start)
        unit = self.store.tensors(f"dense-layer-{layer}", self.key)
        if unit is None:
            raise RuntimeError(f"the states of layer {layer} are gone from {self.store.root}")
        return layer, unit["states"]

    def forget_states(self) -> None:
        """Remove the states, which take up the disk; a prompt that is asked for again is run again."""
        for layer in self.layers:
            self.store.drop(f"dense-layer-{layer}", self.key)


References = list[DenseReference]


def _note_input(states: list[torch.Tensor], module: Any, args: tuple, kwargs: dict) -> None:
    states.append(args[0] if args else kwargs["hidden_states"])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, item: Example, layers: Sequence[int], store: Store, key: str) -> DenseReference:
    """Answer `item` with the stock `model`, and keep the states before `layers`; what is kept is not run again.

    Args:
        key: what the dense model's answers depend on beside the prompt.
    """
    key = fingerprint(key, item.text, item.answer_tokens)
    unit = store.tensors("dense", key)
    if unit is None or any(not store.path(f"dense-layer-{n}", key, ".safetensors").exists() for n in layers):
        inputs = encode(tokenizer, [item.text], model.device)
        before: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        final: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for layer, states in before.items():
                note = partial(_note_input, states)
                hooks.enter_context(model.model.layers[layer].register_forward_pre_hook(note, with_kwargs=True))
            last = model.model.norm.register_forward_hook(lambda module, args, output: final.append(output[:, -1]))
            hooks.enter_context(last)
            count = until_switch(model.config, inputs["input_ids"].shape[1], item.answer_tokens)
            tokens = model.generate(**inputs, **GREEDY, max_new_tokens=count).sequences[0]
        for layer, states in before.items():
            store.put_tensors(f"dense-layer-{layer}", key, {"states": torch.cat(states, dim=1).cpu()})
        unit = {"answer": tokens[inputs["input_ids"].shape[1] :].cpu(), "final": torch.cat(final).cpu()}
        store.put_tensors("dense", key, unit)
    return DenseReference(item, unit["answer"], unit["final"], store, key, layers)


def answer_all(
    model: Any, prompts: PromptSet, layers: Sequence[int], store: Store, key: str, log: Log, ranks: Ranks
) -> References:
    """The dense work for every prompt; with `require_dense_correct`, others in place of those answered wrongly."""
    references: dict[int, DenseReference] = {}
    strict, missing = prompts.section.require_dense_correct, list(range(len(prompts.items)))
    for attempt in range(ATTEMPTS if strict else 1):
        missing.sort(key=lambda number: prompts.items[number].limit)  # or a process would have the long ones
        shard = [(number, prompts.attempt(number, attempt)) for number in ranks.shard(missing)]
        for _, item in tqdm(shard, desc="dense answers", unit="prompt"):
            answer(model, prompts.tokenizer, item, layers, store, key)
        for number, item in ranks.all_gather(shard):
            if ranks.is_main and attempt and item.text != references[number].item.text:
                references[number].forget_states()
            references[number] = answer(model, prompts.tokenizer, item, layers, store, key)
        missing = [number for number in missing if strict and not references[number].right(prompts.tokenizer)]
        if not missing:
            break
    if missing:
        tasks = ", ".join(sorted({references[number].item.task for number in missing}))
        log(f"{len(missing)} of {len(references)} prompts ({tasks}) were never answered rightly; they count too")
    return [references[number] for number in sorted(references)]
