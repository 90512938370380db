"""A first recipe for a model: what suits it, with comments."""

import math
from pathlib import Path
from typing import Any

import yaml

from . import plan
from .cost import LayerShape, suitable_rank
from .recipe import ExportSection, ModelSection, Recipe, SearchSection, UpdateSection, validated
from .utils.errors import UserError
from .utils.paths import expand

TOKENS = ((0.3e9, 32768), (1e9, 49152), (math.inf, 65536))  # of calibration, for models of up to so many parameters
MULTI_HOP = 2048  # tokens that such a prompt needs at least


def model_section(name: str) -> ModelSection:
    """The `model` section for a folder, a GGUF file, a folder of one, or a Hub id.

    Raises:
        UserError: if it can be none of them, or a folder holds several GGUF files.
    """
    try:
        path = Path(expand(name))
    except ValueError as error:
        raise UserError(f"the model's path {error}") from None
    if path.suffix == ".gguf" and path.is_file():
        return ModelSection(path=str(path.parent), gguf_file=path.name)
    gguf = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    if not gguf or (path / "config.json").is_file():
        return ModelSection(path=str(path) if path.exists() else name)
    if len(gguf) > 1:
        raise UserError(f"{path}: several GGUF files; give one of them: {', '.join(gguf)}")
    return ModelSection(path=str(path), gguf_file=gguf[0])


def starter(model: ModelSection, config: Any, context: int, goal: dict[str, float], length: int) -> str:
    """A commented recipe, made for a model with a `context` of so many tokens.

    Args:
        goal: the target of the search: `speedup`, `kv_share`, `quality`.
        length: of the longest prompts in tokens.

    Raises:
        UserError: if the context or `length` is too short, or the model too shallow, to search, or the goal is not one.
    """
    layers, longest = config.num_hidden_layers, min(length, context)
    if longest < 512:
        raise UserError(f"prompts of {longest} tokens are too short to search a schedule on; at least 512 are needed")
    if layers < 2:
        raise UserError("a model of one layer has no later layer that could skip")
    rank = suitable_rank(LayerShape.of(config))
    search = SearchSection(update=UpdateSection(attention_rank=0, ffn_rank=rank))
    lengths = sorted({max(512, longest // 2), longest})
    starts = search.start_layers(layers)
    kinds = [kind for kind in search.kinds if kind != "multi-hop" or lengths[0] >= MULTI_HOP]
    stages = [count for count in search.choices.stages if count <= layers - starts[-1]]
    weights = plan.parameters(config)
    title = (model.gguf_file or Path(str(model.path)).name).lower().removesuffix(".gguf")
    recipe = plan.complete(Recipe(model=model, export=ExportSection(path=f"out/{title}-spts")), config, context)
    proxy = recipe.proxy
    wanted = ", ".join(f"{name} {value:g}" for name, value in goal.items())
    if proxy.channels is None:
        sizes = ["# proxy: every proxy is a regression, since experts share no matrices that another could be made of"]
    else:
        share = f"at most {proxy.max_flop_fraction:.0%} of the feed-forward network's FLOPs"
        sizes = [
            f"proxy:  # the largest size, {share}; layers may get a smaller one",
            f"  channels: {proxy.channels}",
            f"  rank: {proxy.rank}" + ("" if proxy.rank else "  # the regression alone: all else costs more"),
        ]
    meaning = {
        "speedup": "dense over SPTS FLOPs of a prompt of the longest length",
        "kv_share": "share of the KV cache that is kept, of a prompt of the longest length",
        "quality": "share of next tokens that must be the dense model's, on prompts that no schedule was chosen on",
    }
    lines = [
        f"# {title}: {config.model_type}, {layers} layers, {weights / 1e9:.2f}B parameters, {context} positions.",
        f"# Made by spts-compress init for {wanted}. `spts-compress recipe FILE --dry-run` prints the plan.",
        "model:",
        *(f"  {key}: {_scalar(value)}" for key, value in model.model_dump(exclude_defaults=True).items()),
        "calibration:",
        "  source: [python-docs, python-code]  # better: text like yours, source: files and path: FOLDER",
        f"  tokens: {next(tokens for most, tokens in TOKENS if weights < most)}",
        f"  length: {recipe.calibration.length}",
        *sizes,
        "search:  # finds the schedule",
        *(f"  {name}: {value:g}  # {meaning[name]}" for name, value in goal.items()),
        f"  lengths: {lengths}  # of the prompts, in tokens",
        f"  kinds: [{', '.join(kinds)}]  # what the prompts ask for",
        f"  starts: {starts[:: max(1, len(starts) // 6)]}  # first skipping layers to try, of {layers}",
        f"  choices: {{stages: {stages}}}  # numbers of stages to try",
        f"  update: {{attention_rank: 0, ffn_rank: {rank}}}  # estimates of what a layer adds, for tokens it skips",
        "report:",
        f"  lengths: {sorted({max(64, longest // 4), longest // 2, longest})}",
        "export:",
        f"  path: {_scalar(recipe.export.path)}",
        "  break_even: true  # prompts too short for skipping to pay run dense",
    ]
    text = "\n".join(lines) + "\n"
    validated(yaml.safe_load(text), "init")
    return text


def _scalar(value: Any) -> str:
    """Plain data as YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)[1:].rstrip()[:-1]
