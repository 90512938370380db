"""RULER's prompts to the published letter, beside references written here."""

import re
from collections import Counter

import pytest
from helpers import PROSE

from spts_compress.tasks import ruler


class Words:
    """A tokenizer whose tokens are words."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": text.split()}


def made(task, length, count=2):
    return ruler.examples(task, Words(), PROSE, length, count, seed=3)


LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt"])
def test_haystacks_of_noise_and_of_needles_have_a_line_for_each(task):
    for item in made(task, 4096):
        context = item.text.rsplit("\nQuestion" if task == "vt" else "\nWhat ", 1)[0]
        lines = context.rsplit("\n\n" if task == "vt" else "afterwards.\n", 1)[1].split("\n")
        hidden = (
            r"VAR [A-Z]{5} = (\d{5}|VAR [A-Z]{5} )"
            if task == "vt"
            else r"One of the special magic \w+ for \S+ is: \S+\."
        )
        filler = [line for line in lines[:-1] if not re.fullmatch(hidden, line)]  # the last one is cut to the length
        assert len(lines) > 150 and set(filler) <= {LINE}
        assert len(filler) > 150 or "multikey" in task


def test_haystacks_of_prose_have_no_lines():
    for item in made("niah_single_2", 4096):
        assert item.text.count("\n") == 2


ASKED = (
    r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n(.*)\n"
    r"Question: Find all variables that are assigned the value (\d{5}) in the text above\. "
    r"Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the value "
    r"(\d{5}), they are: "
)


@pytest.mark.parametrize("length", [2048, 8192])
def test_variables_come_after_a_solved_chain_of_500_tokens(length):
    for item in made("vt", length, 4):
        parts = re.fullmatch(rf"({ASKED}) ([A-Z ]+)\n\n{ASKED}", item.text, re.S)
        example, *solved = parts.groups()[:5]
        assert 500 - len(LINE.split()) < len(example.split()) <= 500
        chains = [(*solved[:3], solved[3].split(), 3), (*parts.groups()[5:], item.outputs, 5)]
        for context, value, again, names, letters in chains:
            assert value == again and len(set(names)) == 5 and {len(name) for name in names} == {letters}
            expected = [f"VAR {names[0]} = {value}"]
            expected += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(4)]
            assert [line for line in context.split("\n") if line.startswith("VAR")] == expected


@pytest.mark.parametrize(
    ("length", "often", "seldom", "known_often", "known_seldom", "known_words"),
    [(2048, 6, 1, 3, 1, 20), (4095, 6, 1, 3, 1, 20), (4096, 30, 3, 10, 3, 40), (70_000, 30, 3, 10, 3, 40)],
)
def test_common_words_come_after_a_solved_list(length, often, seldom, known_often, known_seldom, known_words):
    """At the longest, more words than the vocabulary has are asked for."""
    for item in made("cwe", length, 1):
        begin = "Below is a numbered list of words. In these words, some appear more often than others. "
        begin += "Memorize the ones that appear most often.\n"
        end = "\nQuestion: What are the 10 most common words in the above list? "
        end += "Answer: The top 10 words that appear most often in the list are:"
        [known, answer, asked] = re.fullmatch(
            rf"{re.escape(begin)}(.*){re.escape(end)} (.*)\n{re.escape(begin)}(.*){re.escape(end)}", item.text
        ).groups()
        numbers, words = zip(*re.findall(r"(\d+)\. (\S+)", answer), strict=True)
        assert numbers == tuple(map(str, range(1, 11)))
        lists = [(known, words, known_often, known_seldom), (asked, item.outputs, often, seldom)]
        for text, common, many, few in lists:
            numbers, listed = zip(*re.findall(r"(\d+)\. (\S+)", text), strict=True)
            assert numbers == tuple(map(str, range(1, len(listed) + 1)))
            counts = Counter(listed)
            assert {counts[word] for word in common} == {many} and len(set(common)) == 10
            assert {n for word, n in counts.items() if word not in common} == {few}
        assert len(set(re.findall(r"[a-z]+", known))) == known_words
        assert item.tokens > 0.99 * (length - 120)
