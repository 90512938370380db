"""Work that every candidate shares: the dense pass over each prompt, kept at the layers where skipping may begin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.calls import SkipRequest
from ..modeling.configuration_spts import Schedule
from ..tasks.agreement import GREEDY, agreement
from ..tasks.example import Example
from ..tasks.recovery import score_rows
from ..tasks.runner import encode
from ..timing.pairs import share_buffers
from ..utils.store import Store, fingerprint


@dataclass(frozen=True)
class Dense:
    """What the dense model did with one prompt of n tokens and its own greedy answer of a tokens.

    `final`: normed states (a, D) that the answer's tokens are predicted from. `store`, `key`: where the states
    (1, n + a - 1, D) in front of the `layers` are kept.
    """

    item: Example
    answer: torch.Tensor
    final: torch.Tensor
    store: Store
    key: str
    layers: Sequence[int]

    def right(self, tokenizer: Any) -> bool:
        """Whether the answer is the known one, if one is known."""
        said = tokenizer.decode(self.answer, skip_special_tokens=True)
        return not self.item.outputs or score_rows([{**self.item.to_row(), "answer": said}])[0]["score"] == 1

    def kept_before(self, layer: int) -> int:
        """The last layer before `layer` that the states in front of are kept."""
        return max(kept for kept in self.layers if kept < layer)

    def states(self, layer: int) -> torch.Tensor:
        """States in front of `layer`."""
        found = self.store.tensors(f"dense-layer-{layer}", self.key)
        if found is None:
            raise RuntimeError(f"the states of layer {layer} are gone from {self.store.root}")
        return found["states"]


@contextmanager
def _watching(model: Any, layers: list[int]) -> Iterator[tuple[dict[int, list], list]]:
    """Collects the states in front of `layers`, and the last normed state, of every forward pass."""
    before: dict[int, list] = {layer: [] for layer in layers}
    last: list[torch.Tensor] = []

    def note(held: list) -> Any:
        return lambda module, args, kwargs: held.append(args[0] if args else kwargs["hidden_states"])

    handles = [
        model.model.layers[layer].register_forward_pre_hook(note(before[layer]), with_kwargs=True) for layer in layers
    ]
    handles.append(model.model.norm.register_forward_hook(lambda module, args, output: last.append(output[:, -1])))
    try:
        yield before, last
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def dense(model: Any, tokenizer: Any, item: Example, layers: list[int], store: Store, key: str) -> Dense:
    """Answer `item` with the stock `model`, and keep the states in front of `layers`; what is kept is not run again.

    Args:
        key: what the dense model's answers depend on beside the prompt.
    """
    key = fingerprint(key, item.text, item.answer_tokens)
    kept = store.tensors("dense", key)
    if kept is None or any(not store.path(f"dense-layer-{n}", key, ".safetensors").exists() for n in layers):
        inputs = encode(tokenizer, [item.text], model.device)
        with _watching(model, layers) as (before, last):
            out = model.generate(**inputs, **GREEDY, max_new_tokens=item.answer_tokens)
        for layer, states in before.items():
            store.put_tensors(f"dense-layer-{layer}", key, {"states": torch.cat(states, dim=1).cpu()})
        kept = {"answer": out[0, inputs["input_ids"].shape[1] :].cpu(), "final": torch.cat(last).cpu()}
        store.put_tensors("dense", key, kept)
    return Dense(item, kept["answer"], kept["final"], store, key, layers)


def skipping(model: Any, model_class: Any, schedule: Schedule, proxies: dict[str, torch.Tensor]) -> Any:
    """The skipping model on the parameters of the stock `model`, with `proxies` by their name."""
    config_class = model_class.config_class
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = config_class(**settings, spts=schedule.to_dict())
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made = model_class(config)
    moved = {name: tensor.to(model.device, model.dtype) for name, tensor in proxies.items()}
    made.load_state_dict({**model.state_dict(), **moved}, assign=True)
    share_buffers(made, model)
    return made.eval()


@torch.no_grad()
def compare(whole: Any, schedule: Schedule, prompt: Dense) -> dict[str, Any]:
    """How far SPTS is from dense along the dense model's own answer, teacher-forced after a prefill by `schedule`.

    Args:
        whole: the skipping model, with proxies in all layers from the schedule's start on.

    Returns:
        `kl`: mean KL(dense || SPTS) of the next token, nats; `top1`: share of tokens on which both agree; `same`:
        whether they agree on all, so that the greedy answer is the dense one.
    """
    first, count = prompt.kept_before(schedule.start), len(prompt.answer)
    device = whole.lm_head.weight.device
    request = SkipRequest(schedule, last=count, suffix_length=count - 1)
    states = prompt.states(first).to(device)
    logits = whole(inputs_embeds=states, first_layer=first, spts=request, use_cache=True, logits_to_keep=count).logits[
        0
    ]
    own = whole.lm_head(prompt.final.to(device))
    if cap := getattr(whole.config, "final_logit_softcapping", None):
        own = torch.tanh(own / cap) * cap
    found = agreement(torch.log_softmax(own.float(), dim=-1), torch.log_softmax(logits.float(), dim=-1))
    return {**found, "same": found["top1"] == 1}
