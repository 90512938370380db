"""What a stranger's machine gets from an exported checkpoint, compared with what the base gives.

Run as a script by a fresh interpreter, this file can't import the package, so it imports nothing of it.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Texts whose tokens are compared: words, code, blanks, numbers, many scripts; texts with special tokens join them.
TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?  Two  spaces, and one at the end. ",
    "def f(x):\n\treturn {'a': x ** 2}  # 1234567890, 3.14\r\n\n\n",
    "Größe, naïve café, e\u0301; привет мир; 你好,世界。 こんにちは; مرحبا; नमस्ते; 🙂👩\u200d👩\u200d👧 \u00a0\ufeff",
    "",
)
CHAT = ({"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"})
# What a config says of the file it is in, of this method, or of how it was loaded.
BESIDE = (
    "spts", "auto_map", "model_type", "architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype",
    "transformers_weights", "_from_model_config",
)  # fmt: skip


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def settings(config: Any) -> Any:
    """A configuration's own fields."""
    return plain({key: value for key, value in config.to_dict().items() if key not in BESIDE})


def _attempt(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `call` gives, or its error: where the base's tokenizer fails, the export's is to fail alike."""
    try:
        return call(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _rendered(tokenizer: Any, template: str) -> list[Any]:
    if "strftime_now" in template:  # another answer every day; the template itself is compared
        return []
    return [
        _attempt(tokenizer.apply_chat_template, list(CHAT[:n]), template, add_generation_prompt=n == 1, tokenize=False)
        for n in (1, 2)
    ]


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, as plain data: equal facts, equal tokens and prompts."""
    added = tokenizer.added_tokens_decoder
    texts = [*TEXTS, *(f"a{token} b {token}" for token in list(added.values())[:32])]
    ids = [_attempt(tokenizer.encode, text, add_special_tokens=special) for text in texts for special in (True, False)]
    templates = tokenizer.chat_template or {}
    templates = templates if isinstance(templates, dict) else {"default": templates}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return plain(
        {
            "token ids": ids,
            "decoded text": [_attempt(tokenizer.decode, row) for row in ids if isinstance(row, list)],
            "chat templates": templates,
            "rendered chats": {name: _rendered(tokenizer, template) for name, template in templates.items()},
            "special tokens": tokenizer.special_tokens_map,
            "added tokens": {str(number): repr(token) for number, token in added.items()},
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "size": [tokenizer.vocab_size, len(tokenizer)],
            "sides": [tokenizer.padding_side, tokenizer.truncation_side],
            "model_max_length": tokenizer.model_max_length,
            "model_input_names": tokenizer.model_input_names,
        }
    )


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Names of the facts that differ."""
    return sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))


def main(folder: Path, tensors: Path, facts: dict[str, Any]) -> list[str]:
    """Everything in which the checkpoint in `folder` is not what was built, a line each.

    Args:
        tensors: safetensors file with token ids, and the logits and states that they are to give.
        facts: `dtype`; `weights`: the files of tensors; `config`, `generation` and `tokenizer`: the base's; `trust`:
            how the tokenizer is loaded.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    expected = load_file(tensors)
    options = {"trust_remote_code": True, "dtype": getattr(torch, facts["dtype"]), "attn_implementation": "sdpa"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    faults = [f"{key}: {value}" for key, value in info.items() if value]
    state = model.eval().state_dict()
    for file in facts["weights"]:
        with safe_open(folder / file, "pt") as opened:
            for name in list(opened.keys()):
                if name in state and not torch.equal(state[name], opened.get_tensor(name).to(state[name].dtype)):
                    faults.append(f"tensor {name} differs from {file}")
    with torch.no_grad():
        ids = expected["ids"]
        for name, spts in (("spts", {"min_length": 0}), ("dense", False)):
            logits = model(ids, logits_to_keep=1, spts=spts).logits
            if not torch.equal(logits, expected[name]):
                faults.append(f"{name} logits differ by {float((logits - expected[name]).abs().max())}")
    for name, config in (("config", model.config), ("generation", model.generation_config)):
        faults += [f"{name}: {key} is not the base's" for key in differences(facts[name], settings(config))]
    del loaded, model, state
    body = AutoModel.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        if not torch.equal(body(ids).last_hidden_state[:, -1], expected["state"]):
            faults.append("AutoModel gives other states")
    for trust in facts["trust"]:
        actual = tokenizer_facts(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))
        faults += [f"tokenizer: {key} not the base's" for key in differences(facts["tokenizer"], actual)]
    return faults


if __name__ == "__main__":
    sys.modules["spts_compress"] = None  # type: ignore[assignment]  # as on a machine without it
    facts = json.loads(Path(sys.argv[3]).read_text())
    print("FAULTS " + json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), facts)))
