"""How answers are judged: RULER's and LongBench's scores (arXiv 2308.14508), each 0 to 1 for one answer.

ROUGE, edit similarity and Chinese word segmentation come from libraries (`pip install 'spts-compress[eval]'`).
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..utils.errors import UserError

Scorer = Callable[[str, list[str], list[str]], float]
ARTICLES = re.compile(r"\b(a|an|the)\b")
# What LongBench leaves out of Chinese words; other signs, such as ℃ and the opening mark 《, count as words.
PUNCTUATION = string.punctuation + (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"  # noqa: RUF001
)


def _library(name: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        raise UserError(f"this score needs {name.split('.')[0]}: pip install 'spts-compress[eval]'") from None


def contains(answer: str, outputs: list[str], classes: list[str]) -> float:
    """Share of the references found in the answer, case-insensitive (RULER)."""
    return sum(output.lower() in answer.lower() for output in outputs) / len(outputs)


def number(answer: str, outputs: list[str], classes: list[str]) -> float:
    """Whether the first number of the answer is the right one."""
    first = re.search(r"-?\d+(?:,\d{3})*", answer)
    return float(first is not None and first.group().replace(",", "") == outputs[0])


def english_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them; lower case, no punctuation, no spaces."""
    bare = ("".join(c for c in word.lower() if c not in PUNCTUATION and not c.isspace()) for word in _jieba_words(text))
    return [word for word in bare if word]


def token_f1(got: list[str], expected: list[str]) -> float:
    """Harmonic mean of precision and recall of words."""
    same = sum((Counter(got) & Counter(expected)).values())
    if not same:
        return 0.0
    precision, recall = same / len(got), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, output: str) -> float:
    """F measure of the longest common subsequences of words, sentence by sentence, as the package `rouge` takes it; 0
    where it can't, as LongBench has it: for an empty text, or a sentence too long for it."""
    rouge = _library("rouge").Rouge(["rouge-l"])
    try:
        return rouge.get_scores([answer], [output], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def _jieba_words(text: str) -> list[str]:
    return _library("jieba").lcut(text, cut_all=False)


def classification(answer: str, outputs: list[str], classes: list[str]) -> float:
    """1 over the number of class names in the answer, if the right one is among them; a name inside the right one does
    not count."""
    best = 0.0
    for output in outputs:
        named = [name for name in classes if name in answer]
        for name in named:  # as in LongBench: the name after one that was taken out is passed over, and counts
            if name in output and name != output:
                named.remove(name)
        best = max(best, 1 / len(named) if output in named else 0.0)
    return best


def number_share(answer: str, wanted: str) -> float:
    """Share of the answer's numbers that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, output: str) -> float:
    """Edit similarity, in whole percent, of the answer's first line that is neither a comment nor a code fence."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(_library("rapidfuzz.fuzz").ratio(line, output)) / 100


def _best(similarity: Callable[[str, str], float]) -> Scorer:
    """The reference that the answer is most like counts."""
    return lambda answer, outputs, classes: max(similarity(answer, output) for output in outputs)


SCORERS: dict[str, Scorer] = {
    "contains": contains,
    "number": number,
    "f1": _best(lambda answer, output: token_f1(english_words(answer), english_words(output))),
    "f1_chinese": _best(lambda answer, output: token_f1(chinese_words(answer), chinese_words(output))),
    "rouge": _best(rouge_l),
    "rouge_chinese": _best(lambda *texts: rouge_l(*(" ".join(_jieba_words(text)) for text in texts))),
    "classification": classification,
    "count": _best(number_share),
    # references of the form "Paragraph 12" or 段落12
    "paragraph": _best(lambda answer, output: number_share(answer, re.findall(r"\d+", output)[0])),
    "code": _best(code_similarity),
}


def score(scorer: str, answer: str, outputs: list[str], classes: list[str]) -> float:
    """The score of an answer, 0 to 1."""
    return SCORERS[scorer](answer, outputs, classes)
