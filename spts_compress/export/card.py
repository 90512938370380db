"""The model card of an exported checkpoint."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump
from yaml import YAMLError

from ..calibrate.base_model import Base
from ..modeling.configuration_spts import Schedule
from ..plan import probe_words, schedule_table, skips_from
from ..utils.errors import UserError, reason
from ..vllm_plugin import CLASSES, holes

CITATION = """@misc{wu2026probe,
  title = {Probe and Skip: Self-Predictive Token Skipping for Efficient Long-Context LLM Inference},
  author = {Wu, Zimeng and Wang, Donghao and Jin, Chaozhe and Chen, Jiaxin and Wang, Yunhong},
  year = {2026},
  eprint = {2601.13155},
  archivePrefix = {arXiv}
}"""

SEARCHED = """
## Search

The schedule was searched for; "all next tokens the same" is the share of prompts with every next token along dense's
answer as dense's, before what generation_config.json does to the logits. The text
searched on is {that} of the prompts measured above.

{tables}

![Agreement with dense against cost; all candidates by start layer; tokens that the winners keep](search.png)
"""


HEAD = re.compile(r"(\s*---\n)(.*?\n)(?=---\s)", re.DOTALL)  # of a card, with its metadata
INDEX = re.compile(r"^model-index:.*\n([ -].*\n)*", re.MULTILINE)  # up to the next key
METRICS = {"dense": "score with spts=False", "spts": "score with skipping"}


def license_of(base: Base) -> dict[str, Any]:
    """Licence fields of the base's own card, if it has one.

    Raises:
        UserError: if its metadata can't be read.
    """
    card = base.folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise UserError(f"{card}: its metadata can't be read: {reason(error)}; mend them, or remove the file") from None

    def code(language: Any) -> Any:
        return "no" if language is False else language  # as YAML reads Norwegian's

    said = data.get("language")
    data["language"] = [*map(code, said)] if isinstance(said, list) else code(said)
    return {name: data[name] for name in ("license", "license_name", "license_link", "language") if data.get(name)}


def with_results(text: str, name: str, tasks: list[dict[str, Any]]) -> str:
    """The card `text` with scores in its metadata, as an entry of the Hub's model-index in the place of the one that
    this toolkit put there; tasks of which no token was skipped are left out, and entries of others stay as they are.

    Args:
        name: of the model.
        tasks: rows with `task`, `length` in tokens, `items`, and scores of `dense` and `spts` from 0 to 1.

    Raises:
        ValueError, YAMLError: if the card's metadata can't be read.
    """
    ModelCard(text)  # which judges what the plain data below may be
    card = RepoCard(text)
    entries = card.data.get("model-index", [])
    others = [entry for entry in entries if not _is_own(entry)]
    own = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=f"{row['task']}, up to {row['length']} tokens, {row['items']} prompts",
            metric_type="score",
            metric_name=metric,
            metric_value=round(100 * row[mode], 1),
        )
        for row in tasks
        if row.get("unskipped", 0) < row["items"]
        for mode, metric in METRICS.items()
    ]
    card.data["model-index"] = entries = [*others, *(eval_results_to_model_index(name, own) if own else [])] or None
    if head := HEAD.match(text):  # the rest stays as it is written, since YAML reads the code "no" as false
        index = yaml_dump({"model-index": entries}, sort_keys=False) if entries else ""
        made = head[1] + INDEX.sub("", head[2]) + index + text[head.end() :]
        if RepoCard(made).data.to_dict() == card.data.to_dict():
            return made
    return str(card)


def _is_own(entry: dict[str, Any]) -> bool:
    """Whether an entry of the model-index is this toolkit's."""
    names = {metric.get("name") for result in entry["results"] for metric in result["metrics"]}
    return bool(names) and names <= {*METRICS.values()}


def _cached(schedule: Schedule) -> str:
    """Which tokens enter the KV cache, in words."""
    if schedule.kv is None:
        cached = "only those enter the KV cache"
    else:
        cached = f"{schedule.kv:.0%} of the prompt's tokens that have not left, those among them, enter the KV cache"
    return cached + ("; skipped ones get estimates of what a layer would have added" if schedule.update else "")


PROXIES = """Proxies rank calibration tokens that nothing was fitted or chosen on, by the predicted norm of the
feed-forward output{relative} (`ffn_selection: {selection}`), beside the free baseline, the norm of its input: Spearman
correlation, and recall of the true top tokens at the layer's budget; then the same on the states that skipping leaves
in one long prompt."""
UPDATES = "R^2 of the updates is on held-out tokens that the layer skips: of what would take them to the dense state."


def _fitted(schedule: Schedule) -> str:
    """What the table of fits shows, in words."""
    relative, selection = schedule.ffn_selection == "relative", schedule.ffn_selection
    words = "No proxies, since attention's scores choose the feed-forward network's tokens, too."
    if schedule.ffn_selection == "all":
        words = "No proxies, since the feed-forward network runs on all candidates."
    if schedule.proxy:
        words = PROXIES.format(relative=" over the state's own" if relative else "", selection=selection)
    return words + (f" {UPDATES}" if schedule.update else "")


DEQUANTISED = "; they are a GGUF file's, dequantised, and so not quite those of the model that was quantised"


def _in_vllm(base: Base, schedule: Schedule) -> str:
    """When vLLM skips after all, in words."""
    able = base.family in map(str.lower, CLASSES) and holes(schedule) is None
    return "; vLLM 0.32 with `spts-compress[vllm]` and model runner V1 (tried on CPUs) skips" if able else ""


def render(
    base: Base, schedule: Schedule, report: dict, speed: str, quality: str, fits: str, search: str | None
) -> str:
    """The card as Markdown with Hub metadata.

    Args:
        report: gives the setting of the measurements.
        speed, quality, fits, search: tables; None if the schedule was given.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base.repository,
        # its weights with modules trained on top: of the Hub's four words the one that says nothing untrue
        base_model_relation="finetune" if base.repository else None,
        tags=["spts", "token-skipping", "kv-cache-compression", "custom_code"],
    )
    for name, value in license_of(base).items():
        setattr(data, name, value)
    searched = ""
    if search:
        searched = SEARCHED.format(tables=search, that="also that" if report.get("same_text") else "not that")
    machine, keys = report["hardware"], report["keys"]
    needle = "the number hidden in the text" if keys == 1 else f"one of {keys} numbers hidden in the text"
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    lengths = [row["tokens"] for row in report["speed"]]
    return f"""---
{data.to_yaml()}
---

# {base.title}, skip-ready

{base.title} with Self-Predictive Token Skipping (SPTS): while it reads a prompt, layers from
{skips_from(schedule, max(lengths))} on work on a budget of tokens, and {_cached(schedule)}. The base weights
are untouched{DEQUANTISED if base.dequantised else ""}.

The method: Zimeng Wu, Donghao Wang, Chaozhe Jin, Jiaxin Chen, Yunhong Wang, "Probe and Skip: Self-Predictive
Token Skipping for Efficient Long-Context LLM Inference", arXiv 2601.13155, 2026.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY", dtype="{report["dtype"]}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY", trust_remote_code=True)
```

`generate` skips by itself; `generate(..., spts=False)` does not. Forward passes that return every position (losses,
log-likelihoods) are dense. Pad batches on the left.

## Measured

On {machine["device"]}{threads}, torch {machine["torch"]}, transformers {machine["transformers"]}, {report["dtype"]},
SDPA; dense is the stock model with the same weights, alternating in one process. TTFT is the time of
`generate(max_new_tokens=1)`, median of {len(report["speed"][0]["dense"]["rounds"][0])} pairs; "FLOPs" is the
ratio of floating-point operations. `needles` asks for {needle}; nothing was fitted on that text. Scores are in percent.

{speed}

{quality}

Needles flatter: a number is found more easily than a free answer stays the same. Nothing else was measured here; try
your own task against `spts=False` before you rely on it.

## Schedule

Active tokens of the candidates, per layer ({probe_words(schedule)}):

{schedule_table(base.config, schedule, lengths)}
{searched}
## What was fitted

{_fitted(schedule)}

{fits}

## Limits

Skipping is lossy, prefill only, and fitted on the recipe's text. It needs left padding, and a cache that is neither
quantised nor offloaded and static. Prompts below the
budgets{f" or {schedule.min_length} tokens" if schedule.min_length else ""} run dense. vLLM loads it
(`trust_remote_code=True`) and runs it dense{_in_vllm(base, schedule)}. SGLang and llama.cpp were not tried;
`spts-compress strip` gives the stock checkpoint back for them, byte for byte.

## Citation

```bibtex
{CITATION}
```

Made with spts-compress {machine["spts_compress"]}; `recipe.yaml` is the recipe, `recipe.resolved.yaml` all its values.
"""
