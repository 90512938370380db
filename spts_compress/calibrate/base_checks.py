"""What a base must be for skipping: its family, its settings, its tokenizer, and that its checkpoint loads."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer

from ..checkpoint import loadable
from ..checkpoint.families import ALIASES, FAMILIES
from ..checkpoint.layout import CONFIG, GENERATION, read_json
from ..modeling.stock_layer import MASKS
from ..utils.errors import UserError, reason, some

# Settings with which every forward pass gives what only a dense pass can, or no named outputs, or has no KV cache.
OUTPUTS = {
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
}
# Settings of generation that run more than one prompt, or a prompt in parts: the answers to all prompts are dense.
DENSE = {"prefill_chunk_size": (None,), "guidance_scale": (None, 1), "assistant_early_exit": (None,)}
CACHES = (None, "dynamic", "offloaded", "hybrid")  # transformers takes the dynamic one for hybrid
MARK = "Hello there"  # what a chat template must pass on


def check_family(config: Any, name: str) -> None:
    """Refuse what skipping is not written for.

    Raises:
        UserError: naming the family or setting and what is supported.
    """
    family = str(getattr(config, "model_type", None))
    if family not in FAMILIES and family not in ALIASES:
        known = ", ".join([*FAMILIES, *ALIASES])
        wraps = "; of a multimodal model, save the text part alone" if hasattr(config, "text_config") else ""
        raise UserError(
            f"{name}: model family {family} is not supported; supported are {known} (README, Model families){wraps}"
        )
    if strange := set(getattr(config, "layer_types", None) or ()) - set(MASKS):
        raise UserError(f"{name}: layers of {', '.join(sorted(strange))} are not supported; {' and '.join(MASKS)} are")
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(f"{name}: attention that looks ahead is not supported; it is for embeddings, not for answers")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{name}: a quantised base is not supported; start from the unquantised checkpoint")


def read_tokenizer(folder: Path, config: Any, name: str, trusted: bool, chat: bool) -> Any:
    """The tokenizer in `folder`, of the model that `config` describes; `chat`: whether its chat template is needed.

    Raises:
        UserError: if it can't be loaded, such as code of its own that is not trusted, has more tokens than the model
            has embeddings, or a chat template that can't be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # tokenizers raises nothing more special
        advice = "" if trusted else "; code of its own needs model.trust_remote_code: true, once you have read it"
        raise UserError(f"{name}: no usable tokenizer: {reason(error)}{advice}") from None
    if beyond := _without_embedding(tokenizer, config.vocab_size):
        raise UserError(
            f"{name}: the tokenizer has more tokens than the model has embeddings ({config.vocab_size}): "
            f"{some(beyond)}; resize the model (resize_token_embeddings) and save it again"
        )
    if not getattr(tokenizer, "chat_template", None):
        if chat:
            raise UserError(f"{name}: calibration.chat_template is true, but the tokenizer has no chat template")
        return tokenizer
    try:
        turn = [{"role": "user", "content": MARK}]
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever Jinja and the template's own code raise
        raise UserError(f"{name}: the tokenizer's chat template can't show a user's turn: {reason(error)}") from None
    if MARK not in shown:
        raise UserError(f"{name}: the tokenizer's chat template leaves out what the user says")
    return tokenizer


def files_named(tokenizer: Any, folder: Path) -> list[str]:
    """Names of the files in `folder`, or anywhere below, that the tokenizer's class says it reads."""
    return [name for name in map(str, type(tokenizer).vocab_files_names.values()) if (folder / name).is_file()]


def _without_embedding(tokenizer: Any, embeddings: int) -> list[str]:
    """Tokens that the model has no embedding for; but for added ones that neither text nor template brings in, such as
    Gemma 3's placeholder of an image."""
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= embeddings]
    added, template = tokenizer.get_added_vocab(), str(getattr(tokenizer, "chat_template", None))
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)  # some classes add an unk of their own
    return [token for token in beyond if token not in added or token in special or token in template]


def judge(folder: Path, config: Any, name: str, weights: bool = True) -> None:
    """Refuse a base whose checkpoint would not load or not skip; no weight is read.

    Args:
        weights: whether to look at the weights' names and shapes as well.

    Raises:
        UserError: a line for each fault.
    """
    faults = setting_faults(folder)
    if weights:
        faults += loadable.faults(folder, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], deepcopy(config))
    if faults:
        raise UserError("\n".join(f"{name}: {fault}" for fault in faults))


def tell_of_own_code(config: Any, name: str, say: Callable[[str], None]) -> None:
    """Say so if the base brings modelling code, which does not run: the family's code in transformers does."""
    named = getattr(config, "auto_map", None)
    if own := {str(code) for key, code in named.items() if "Model" in key} if isinstance(named, dict) else set():
        say(
            f"{name}: its own modelling code ({some(own)}) is not run, but that of transformers for the family "
            f"{config.model_type}; make sure that they compute the same"
        )


def setting_faults(folder: Path) -> list[str]:
    """What `config.json` or `generation_config.json` must not say, a line each."""
    faults = []
    for file in (CONFIG, GENERATION):
        if file != CONFIG and not (folder / file).is_file():
            continue
        stated = read_json(folder / file)
        faults += [
            f"{file}: {key} is {str(not right).lower()}, with which no token is skipped; set it to {str(right).lower()}"
            for key, right in OUTPUTS.items()
            if stated.get(key, right) not in (right, None)
        ]
        faults += [
            f"{file}: {key} is {stated[key]}, with which generate skips no token; leave it out"
            for key, harmless in DENSE.items()
            if stated.get(key) not in harmless
        ]
        if file == GENERATION and stated.get("spts", True) is not True:
            faults.append(f"{file}: spts is {stated['spts']}, which generate takes for the schedule; leave it out")
        if (cache := stated.get("cache_implementation")) not in CACHES:
            faults.append(f"{file}: cache_implementation is {cache}, but measuring needs a dynamic cache; leave it out")
        classes = str(stated.get("architectures"))
        if re.search("Classification|QuestionAnswering|Reward", classes):
            faults.append(f"{file}: architectures is {classes}; skipping is for models that answer in text")
    return faults
