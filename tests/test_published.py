"""RULER's prompts and LongBench's scores to the published letter, beside references written here."""

import random
import re
import string
from collections import Counter

import pytest
from helpers import PROSE

from spts_compress.tasks import ruler
from spts_compress.tasks.scorers import score


class Words:
    """A tokenizer whose tokens are words."""

    chat_template = eos_token_id = None

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


def reference_rouge_l(answer, output):
    """Sentences end at full stops. Of each one of the reference, the words on a longest path through it and each one of
    the answer; of all these words as a set, precision and recall against the sets of words of both texts."""

    def sentences(text):
        return [" ".join(part.split()).split(" ") for part in text.split(".") if part]

    def path(x, y):
        best = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
        for i, j in ((i, j) for i in range(len(x)) for j in range(len(y))):
            best[i + 1][j + 1] = best[i][j] + 1 if x[i] == y[j] else max(best[i][j + 1], best[i + 1][j])
        i, j, found = len(x), len(y), set()
        while i and j:
            if x[i - 1] == y[j - 1]:
                i, j = i - 1, j - 1
                found.add(x[i])
            elif best[i - 1][j] > best[i][j - 1]:
                i -= 1
            else:
                j -= 1
        return found

    got, wanted = sentences(answer), sentences(output)
    if not got or not wanted:
        return 0.0
    same = len({word for one in wanted for other in got for word in path(one, other)})
    precision, recall = (same / len({word for part in parts for word in part}) for parts in (got, wanted))
    return 2 * precision * recall / (precision + recall + 1e-8)


def test_rouge_l_is_the_one_of_the_package_rouge():
    pytest.importorskip("rouge")
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefg..", k=rng.randint(1, 25))) for _ in range(120)]
    texts += ["", "...", " . ", "The committee met. " * 20, "It ends here."]
    for answer, output in zip(texts, [*texts[1:], texts[0]], strict=True):
        assert score("rouge", answer, [output], []) == pytest.approx(reference_rouge_l(answer, output), abs=1e-12)
    # the words of either sentence of the answer count, in whatever order the sentences are: all but 'more'
    cut = score("rouge", "spending rose. oversight is due", ["oversight is due. spending rose more"], [])
    assert cut == pytest.approx(10 / 11)


def test_rouge_l_of_sentences_too_long_for_the_package_is_0_as_in_longbench():
    pytest.importorskip("rouge")
    assert score("rouge", "one two " * 600, ["two one " * 600], []) == 0


def test_rouge_l_of_chinese_is_that_of_jieba_words():
    pytest.importorskip("rouge")
    jieba = pytest.importorskip("jieba")
    for answer, output in (
        ("会议讨论了预算。会议通过了预算。", "会议通过了学校的预算。"),
        ("北京 大学", "我爱北京"),
        ("", "北京"),
    ):
        cut = [" ".join(jieba.cut(text)) for text in (answer, output)]
        assert score("rouge_chinese", answer, [output], []) == pytest.approx(reference_rouge_l(*cut), abs=1e-12)


# As in LongBench's metrics: the opening mark of a book's title is not among them.
CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def test_chinese_words_lose_the_published_marks_and_no_others():
    jieba = pytest.importorskip("jieba")

    def words(text):
        bare = (
            re.sub(rf"[{re.escape(string.punctuation + CHINESE_MARKS)}\s]", "", word.lower())
            for word in jieba.cut(text)
        )
        return Counter(word for word in bare if word)

    cases = [("25℃", "25"), ("《红楼梦》", "红楼梦"), ("3米, 4米", "34米"), ("ABC 大学", "abc大学")]
    for answer, output in [*cases, *((f"北京{mark}大学", "北京大学") for mark in f"{CHINESE_MARKS}《•→")]:
        got, wanted = words(answer), words(output)
        same = (got & wanted).total()
        expected = 2 * same / (got.total() + wanted.total())
        assert score("f1_chinese", answer, [output], []) == pytest.approx(expected), answer
    assert score("f1_chinese", "《红楼梦》", ["红楼梦"], []) == pytest.approx(2 / 3)


def test_class_names_inside_the_right_one_are_left_out_as_published():
    """The published loop takes names out of the list that it walks along, and so passes over the next one."""

    def published(answer, right, classes):
        left, at = [name for name in classes if name in answer], 0
        while at < len(left):
            if left[at] != right and left[at] in right:
                del left[at]
            at += 1
        return 1 / len(left) if right in left else 0.0

    rng = random.Random(1)
    for _ in range(300):
        names = list({"".join(rng.sample("abcd", rng.randint(1, 3))): None for _ in range(8)})
        answer, right = " ".join(rng.sample(names, 2)), rng.choice(names)
        assert score("classification", answer, [right], names) == pytest.approx(published(answer, right, names))
    right = "Group or organization of person"
    assert score("classification", right, [right], ["Group", "organization", "person", right]) == 0.5
