"""The model card of an exported checkpoint."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..calibrate.base_model import Base
from ..evaluate.report import fidelity_table, quality_table, speed_table
from ..modeling.configuration_spts import Schedule
from ..plan import probe_words, schedule_table, skips_from
from ..search import report

CITATION = """@misc{spts2026,
  title = {Self-Predictive Token Skipping},
  author = {Wu and others},
  year = {2026},
  eprint = {2601.13155},
  archivePrefix = {arXiv}
}"""


def license_of(base: Base) -> dict[str, Any]:
    """Licence fields of the base's own card, if it has one."""
    card = base.folder / "README.md"
    if not card.is_file():
        return {}
    data = ModelCard.load(card).data.to_dict()
    return {name: data[name] for name in ("license", "license_name", "license_link", "language") if data.get(name)}


def with_results(text: str, name: str, tasks: list[dict[str, Any]]) -> str:
    """The card `text` with scores in its metadata (the Hub's model-index), in the place of those it had.

    Args:
        name: of the model.
        tasks: rows with `task`, `length` in tokens, `items`, and scores of `dense` and `spts` from 0 to 1.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data  # typed without the fields of a model's card
    data.model_name = name if tasks else None
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=f"{row['task']}, {row['length']} tokens, {row['items']} prompts",
            metric_type="score",
            metric_name=f"score with {'skipping' if mode == 'spts' else 'spts=False'}",
            metric_value=round(100 * row[mode], 1),
        )
        for row in tasks
        for mode in ("dense", "spts")
    ] or None
    return str(card)


def _searched(found: dict | None) -> str:
    """The search's section, empty if the schedule was given."""
    if found is None:
        return ""
    return f"""
## Search

The schedule was searched for; "same answer" is the share of prompts whose greedy answer is the dense one.

{report.as_text(found)}

![Agreement with dense against cost; all candidates by start layer; tokens that the winners keep](search.png)
"""


def render(base: Base, schedule: Schedule, fits: list[dict], report: dict) -> str:
    """The card as Markdown with Hub metadata."""
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
    machine = report["hardware"]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    lengths = [row["tokens"] for row in report["speed"]]
    return f"""---
{data.to_yaml()}
---

# {base.title}, skip-ready

{base.title} with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155): while it reads a prompt, layers from
{skips_from(schedule, max(lengths))} on work on a budget of tokens, and only those enter the KV cache. The base weights
are untouched.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY", dtype="{report["dtype"]}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY"{", trust_remote_code=True" if base.trusted else ""})
```

`generate` skips by itself; `generate(..., spts=False)` does not. Forward passes that return every position (losses,
log-likelihoods) are dense. Pad batches on the left.

## Measured

On {machine["device"]}{threads}, torch {machine["torch"]}, transformers {machine["transformers"]}, {report["dtype"]},
SDPA; dense is the stock model with the same weights, alternating in one process. TTFT is the time of
`generate(max_new_tokens=1)`, median of {len(report["speed"][0]["ttft"]["dense"])} pairs; "counted" is the ratio of
floating-point operations.

{speed_table(report)}

{quality_table(report)}

On one H100, random weights in the shape of Llama-3.1-8B with the paper's schedule had a TTFT 2.50 times as short at 32K
tokens (1.39 at 8K) and 41.5% of the KV cache, measured by spts-compress; that says nothing of quality.

Needles flatter: a number is found more easily than a free answer stays the same. Nothing else was measured here; try
your own task against `spts=False` before you rely on it.

## Schedule

Active tokens of the candidates, per layer ({probe_words(schedule)}):

{schedule_table(base.config, schedule, lengths)}
{_searched(report.get("search"))}
## Proxies

Ranking of calibration tokens that nothing was fitted or chosen on, by the predicted norm of the feed-forward output
{"over the state's own " if schedule.ffn_selection == "relative" else ""}(`ffn_selection: {schedule.ffn_selection}`),
and by the free baseline, the norm of its input: Spearman correlation, and recall of the true top tokens at the layer's
budget; then the same on the states that skipping leaves in one long prompt.

{fidelity_table(fits)}

## Limits

Skipping is lossy, prefill only, and tuned on the recipe's text. It needs a dynamic cache and left padding. Prompts
below the budgets{f" or {schedule.min_length} tokens" if schedule.min_length else ""} run dense. Engines with their own
model code (vLLM, llama.cpp, SGLang) do not run the skipping code; `spts-compress strip` gives them the stock checkpoint
back, byte for byte.

## Citation

```bibtex
{CITATION}
```

Made with spts-compress {machine["spts_compress"]}; `recipe.yaml` is the recipe, `recipe.resolved.yaml` all its values.
"""
