"""What the finished checkpoint is like: dense and SPTS, same weights, same prompts, in one process."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from tqdm import tqdm

from ..cost import predicted
from ..fit import metrics
from ..recipe import ReportSection
from ..tasks import agreement, ruler
from ..tasks.example import Example, is_shorter, text_notes
from ..tasks.recovery import fidelity_summary, score_rows, summary
from ..tasks.runner import answers, encode
from ..timing.pairs import Way, compare
from ..utils.devices import hardware
from ..utils.errors import UserError

NEEDLE_TOKENS = 32
TRIED = 2048  # what fits into so many tokens fits into more


def _any_prompt(section: ReportSection, tokenizer: Any, haystack: str, length: int) -> list[Example]:
    return agreement.examples(tokenizer, haystack, length, 1, 1)


def _needles(section: ReportSection, tokenizer: Any, haystack: str, length: int) -> list[Example]:
    needles = ruler.Needles(keys=section.keys)
    return ruler.examples("needles", tokenizer, haystack, length, section.needles, section.seed, NEEDLE_TOKENS, needles)


def _free(section: ReportSection, tokenizer: Any, haystack: str, length: int) -> list[Example]:
    return agreement.examples(tokenizer, haystack, length, section.answers, section.answer_tokens)


def check_prompts(section: ReportSection, tokenizer: Any, haystack: str) -> None:
    """Make the report's prompts, the long ones no longer than it takes to see that they fit.

    Raises:
        UserError: if one does not fit into its length, or `haystack` has nothing to make them of.
    """
    prompts = [("lengths", _any_prompt, length) for length in section.lengths]
    prompts += [("quality_length", make, section.longest) for make in (_needles, _free)]
    for name, make, length in prompts:
        if length > TRIED:
            with suppress(UserError):
                make(section, tokenizer, haystack, TRIED)
                continue
        try:
            make(section, tokenizer, haystack, length)
        except UserError as error:
            raise UserError(f"report.{name}: {error}") from None


def measure_all(
    dense: Any,
    spts: Any,
    tokenizer: Any,
    haystack: str,
    section: ReportSection,
    keep: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Everything the report holds.

    Args:
        haystack: text that nothing was fitted on.
        keep: `keep(name, make)` returns a finished measurement of that name, or makes and keeps it.

    Returns:
        `speed`, a row of `compare` with the `flops` that were counted for each length; `tasks`, the score of needles,
        and `fidelity` of free answers, both as in an evaluation; `skipped_states`, each proxy's ranking by layer;
        `notes`, see `text_notes`.
    """
    ways: dict[str, Way] = {"dense": (dense, {}), "spts": (spts, {})}
    schedule, longest = spts.config.schedule(), section.longest
    steps = len(section.lengths) * (section.pairs + 1) + section.needles + section.answers
    with tqdm(total=steps, desc="measuring", unit="step") as progress:

        def any_ids(length: int) -> dict[str, Any]:
            [example] = _any_prompt(section, tokenizer, haystack, length)
            return encode(tokenizer, [example.text], dense.device)

        def speed(length: int) -> dict:
            row = compare(ways, any_ids(length)["input_ids"], section.pairs, tick=progress.update)
            row |= {"length": length, "skips": schedule.skips(row["tokens"])}
            return {**row, "flops": predicted(spts.config, schedule, row["tokens"])}

        def row_of(example: Example) -> dict[str, Any]:
            return {**example.to_row(), "skips": schedule.skips(example.tokens)}

        def answer(example: Example) -> list[dict]:
            found = {mode: answers(model, tokenizer, [example])[0] for mode, (model, _) in ways.items()}
            progress.update()
            return [{**row_of(example), "mode": mode, "answer": text} for mode, text in found.items()]

        def agree(example: Example) -> dict:
            own = agreement.free_answer(ways["dense"], tokenizer, example)
            row = agreement.along_answer(ways, tokenizer, example, own)
            progress.update()
            return {**row_of(example), **row}

        def skipped_states() -> dict:
            if not schedule.uses_proxies:
                return {}
            rankings = metrics.on_skipped_states(spts, any_ids(longest), schedule.ffn_selection == "relative")
            return {str(layer): ranking for layer, ranking in rankings.items()}

        text = tokenizer, haystack, longest
        rows = [keep(f"speed-{length}", partial(speed, length)) for length in section.lengths]
        needles = [keep(f"needle-{e.index}", partial(answer, e)) for e in _needles(section, *text)]
        agreed = [keep(f"agreement-{e.index}", partial(agree, e)) for e in _free(section, *text)]
        states = keep("skipped-states", skipped_states)
    fidelity = []
    if agreed:
        overlap = is_shorter(haystack, longest * section.answers, tokenizer)
        row = {"length": longest, "prompts": "held-out text", "overlap": overlap}
        fidelity.append({**row, **fidelity_summary(agreed)})
    return {
        "hardware": hardware(str(dense.device)),
        "dtype": str(spts.dtype).removeprefix("torch."),
        "keys": section.keys,
        "speed": rows,
        "tasks": summary(score_rows([row for pair in needles for row in pair])),
        "fidelity": fidelity,
        "skipped_states": states,
        "notes": text_notes(haystack, [longest], tokenizer),
    }
