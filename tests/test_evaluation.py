"""Tasks, scorers and runs of the evaluation."""

import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import PROSE, run
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SCHEDULE, TEXT, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from spts_compress.calibrate.data import blocks, document_key
from spts_compress.checkpoint.keys import stale
from spts_compress.evaluate import ablate, columns, suites
from spts_compress.evaluate.columns import score_tables
from spts_compress.evaluate.suites import EvalConfig, free_examples
from spts_compress.modeling.configuration_spts import Schedule
from spts_compress.recipe import CalibrationSection
from spts_compress.search import dense_reference
from spts_compress.tasks import agreement, longbench, recovery, ruler, runner, synthetic
from spts_compress.tasks.example import Example, chat, fit_example, sentences, token_count
from spts_compress.tasks.scorers import score
from spts_compress.timing import pairs
from spts_compress.timing.pairs import GREEDY
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import Store

TOKENIZER = tiny_tokenizer()


def made(task, length=6000, count=2, seed=3):
    maker = ruler.examples if task in ruler.TASKS else synthetic.examples
    return maker(task, TOKENIZER, PROSE, length, count, seed)


@pytest.mark.parametrize("task", [*ruler.TASKS, *synthetic.TASKS])
def test_prompts_hit_their_length_and_are_the_same_for_the_same_seed(task):
    length = {"cwe": 9000, "fwe": 6000, "repository": 6000}.get(task, 3000)  # almost every letter is a token here
    items = made(task, length)
    assert items == made(task, length) and items != made(task, length, seed=4)
    for item in items:
        assert item.tokens == token_count(TOKENIZER, item.text)
        asked = item.answer_tokens
        if item.follow_up:
            asked = 2 * asked + token_count(TOKENIZER, item.follow_up)
        slack = {"cwe": 60, "fwe": 80, "repository": 80}.get(task, 40)  # one unit of tiny tokens
        assert length - asked - slack <= item.tokens <= length - asked
        assert item.text.endswith(item.answer_prefix)


def context(item):
    return item.text.split("\n", 1)[1].rsplit("\nWhat ", 1)[0]


@pytest.mark.parametrize("task", list(ruler.NEEDLES))
def test_needles_follow_the_published_definition(task):
    plan = ruler.NEEDLES[task]
    for item in made(task, count=3):
        text = context(item)
        kind = plan.value_kind
        needles = re.findall(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", text)
        asked = set(re.findall(r"[\w-]+", item.text.rsplit("\nWhat ", 1)[1].split(" for ")[1].split(" mentioned")[0]))
        asked -= {"and"}
        assert len(asked) == plan.queries
        per_key = Counter(key for key, _ in needles)
        assert all(per_key[key] == plan.values for key in asked)
        assert len(item.outputs) == plan.queries * plan.values
        for output in item.outputs:  # the answer is there once, under a key that is asked for
            assert text.count(output) == 1
            assert {key for key, value in needles if value == output} <= asked
        if plan.haystack == "needles":
            assert len(needles) > 20 and len(per_key) == len(needles)
            rest = re.sub(rf"One of the special magic {kind} for \S+ is: \S+\.", "", text).split()
            assert len(rest) < 15  # but for one needle cut short to hit the length
        else:
            assert len(needles) == plan.keys * plan.values
        if plan.haystack == "noise":
            assert text.count("The grass is green.") > 20
        if plan.value_kind == "uuids":
            assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", o) for o in item.outputs)
        else:
            assert all(re.fullmatch(r"\d{7}", output) for output in item.outputs)


OWLS = "第三只猫头鹰在老树上安静地睡觉，河水慢慢地流过村庄。孩子们都在听风的声音！谁知道明天会怎样？"  # noqa: RUF001


@pytest.mark.parametrize(
    "text",
    [
        "".join(OWLS.replace("三", chr(0x4E00 + n)) for n in range(80)),
        re.sub(r"\W", "", "".join(OWLS.replace("三", chr(0x4E00 + n)) for n in range(80))),
        "".join(f"{n} तीसरा उल्लू पुराने पेड़ पर चुपचाप सोता है। नदी गाँव के पास से धीरे धीरे बहती है। " for n in range(61)),
        "the third owl sleeps in a warm and quiet old tree by the river " * 100,
        f"{', '.join(f'A warm and quiet old tree number {n}' for n in range(400))}. Short ones are here as well. ",
    ],
)
def test_prompts_hit_their_length_whatever_their_text_has_for_sentence_ends(text):
    for task in ("free", "niah_single_2"):
        if task == "free":
            items = agreement.examples(TOKENIZER, text, 1024, 3, 64)
            assert len({item.text for item in items}) > 1
        else:
            items = ruler.examples(task, TOKENIZER, text, 1024, 3, 0)
        assert all(0.9 * (1024 - item.answer_tokens) <= item.tokens <= 1024 - item.answer_tokens for item in items)


def test_a_text_too_short_for_different_prompts_is_an_error():
    with pytest.raises(UserError, match="too short, or too much alike, for 4 different prompts"):
        agreement.examples(TOKENIZER, TEXT * 3, 1024, 4, 64)


def test_sentences_end_where_their_script_ends_them():
    quoted = "他很小声地对我们两个人说“猫头鹰都很好。”然后走了。"
    assert sentences(quoted + OWLS) == [quoted, OWLS[:26], OWLS[26:37], OWLS[37:]]
    parts = sentences("a long way " * 200 + "home. And a sentence after it.")
    assert parts.pop() == "And a sentence after it." and max(map(len, parts)) <= 300
    assert " ".join(parts) == "a long way " * 200 + "home."


def test_a_prompt_far_below_its_length_is_an_error():
    with pytest.raises(UserError, match=r"x: a prompt for 1000 tokens comes out \d+ too short of this text"):
        fit_example("x", 0, TOKENIZER, lambda count, rest: "word " * 300 * count, 1000, 10)


def test_depths_spread_and_are_where_they_say():
    items = ruler.examples("niah_single_2", TOKENIZER, PROSE, 4000, 40, 0)
    depths = [item.depth for item in items]
    assert min(depths) < 0.15 and max(depths) > 0.85
    for item in items:
        text = context(item)
        assert abs(text.index(item.outputs[0]) / len(text) - item.depth) < 0.12


def test_variables_form_one_chain():
    for item in made("vt", count=5):
        lines = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", item.text)  # names of the solved example have 3 letters
        names = [name for name, _ in lines]
        assert sorted(names) == sorted(item.outputs) and len(names) == 5
        known, value = {}, re.findall(r"assigned the value (\d{5})", item.text)[-1]
        for name, source in lines:  # in the order of the text, each source is known
            known[name] = known.get(source, source)
        assert set(known.values()) == {value}


def test_word_lists_have_the_published_counts():
    for item in made("cwe", 12000):
        listed = Counter(re.findall(r"\d+\. (\w+)", item.text.rsplit("Below is a numbered list", 1)[1]))
        assert {word for word, n in listed.items() if n == 30} == set(item.outputs) and len(item.outputs) == 10
        assert {n for word, n in listed.items() if word not in item.outputs} == {3}
    for item in made("fwe", 12000):
        listed = Counter(item.text.split("coded words. ")[1].split("\nQuestion")[0].split())
        assert [word for word, _ in listed.most_common(4)] == ["...", *item.outputs]
        counts = [n for _, n in listed.most_common(4)]
        assert abs(counts[0] / counts[1] - 4) < 0.3 and abs(counts[0] / counts[3] - 16) < 2
    with pytest.raises(UserError, match="the third and fourth most frequent words are as frequent"):
        ruler.examples("fwe", TOKENIZER, PROSE, 512, 1, 1)


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_answers_of_the_other_tasks_follow_from_their_text(task):
    for item in made(task, count=6):
        text, [answer] = item.text, item.outputs
        if task == "multi_hop":
            who = re.search(r"in which (\w+) lives\?", text)[1]
            town = re.search(rf"{who} lives in the town of (\w+)\.", text)[1]
            assert re.search(rf"the town of {town} lies on the river (\w+)\.", text)[1] == answer
        elif task == "arithmetic":
            one, two = re.search(r"sell to (\w+) and to (\w+) together", text).groups()
            bought = {name: int(n) for n, name in re.findall(r"The shop sold (\d+) boxes to (\w+)\.", text)}
            assert bought[one] + bought[two] == int(answer)
        elif task == "counting":
            colour = re.search(r"say that a (\w+) car", text)[1]
            assert text.count(f"Report: a {colour} car passed the gate.") == int(answer)
        elif task == "multi_turn":
            name = re.search(r"code of (\w+) mentioned", item.follow_up)[1]
            assert re.search(rf"The code of {name} is (\d{{7}})\.", text)[1] == answer
            assert name not in text.rsplit("\n\n", 1)[1]
        else:
            module = re.search(r"for which check_(\w+) returns", text)[1]
            used = re.search(rf"def check_{module}\(amount\):\n    return amount <= (\w+)", text)[1]
            assert re.search(rf"^{used} = (\d+)$", text, re.M)[1] == answer


def test_a_task_that_does_not_fit_says_what_it_needs():
    with pytest.raises(UserError, match="cwe does not fit into 500 tokens: the least it needs is"):
        made("cwe", 500)


def test_scorers_on_cases_worked_by_hand():
    pytest.importorskip("rouge")
    pytest.importorskip("rapidfuzz")
    pytest.importorskip("jieba")
    cases = [
        ("contains", "It is ABC and def.", ["abc", "xyz"], [], 0.5),
        ("number", "It is 1,204 boxes of 3.", ["1204"], [], 1.0),
        ("number", "3 of 1204", ["1204"], [], 0.0),
        ("f1", "The cat sat on a mat.", ["cat on the mat", "dog"], [], 6 / 7),  # cat sat on mat: 3 of 4, 3 of 3
        ("f1", "nothing alike", ["cat"], [], 0.0),
        ("f1_chinese", "我,爱 北京!", ["我爱北京"], [], 1.0),
        ("rouge", "a b c d", ["a c d e"], [], 0.75),
        ("rouge", "", ["a"], [], 0.0),
        ("rouge_chinese", "我爱北京", ["我爱北京"], [], 1.0),
        ("classification", "It is Food and Number", ["Food"], ["Food", "Number", "City"], 0.5),
        ("classification", "Other entity", ["Other entity"], ["Other entity", "entity"], 1.0),
        ("classification", "City", ["Food"], ["Food", "City"], 0.0),
        ("count", "There are 7, or 8, or 7.", ["7"], [], 2 / 3),
        ("paragraph", "Paragraph 12", ["Paragraph 12"], [], 1.0),
        ("paragraph", "Paragraph 1 or 12", ["Paragraph 12"], [], 0.5),
        ("paragraph", "no number", ["段落3"], [], 0.0),
        ("code", "```python\n# first\nreturn x\nmore", ["return x"], [], 1.0),
        ("code", "return y", ["return x"], [], 0.88),
    ]
    for scorer, answer, outputs, classes, expected in cases:
        found = score(scorer, answer, outputs, classes)
        assert found == pytest.approx(expected, abs=1e-6), (scorer, answer)
    assert longbench.judged_part("trec", "\nFood\nNumber") == "Food"
    assert longbench.judged_part("qasper", "a\nb") == "a\nb"


def bench_folder(folder, rows=3):
    line = {"input": "Who?", "context": TEXT * 30, "answers": ["fox"], "all_classes": None, "length": 5, "_id": "1"}
    (folder / "qasper.jsonl").write_text("\n".join(json.dumps(line) for _ in range(rows)))
    (folder / "trec.jsonl").write_text(json.dumps({**line, "all_classes": ["fox", "owl"]}))
    (folder / "dataset2prompt.json").write_text(json.dumps(dict.fromkeys(("qasper", "trec"), "{context}\nQ: {input}")))
    (folder / "dataset2maxlen.json").write_text(json.dumps({"qasper": 8, "trec": 4}))
    return folder


def test_longbench_is_cut_in_the_middle_and_dressed_by_rule(tmp_path):
    bench = longbench.LongBench(str(bench_folder(tmp_path)))
    assert bench.tasks() == ["qasper", "trec"]
    [item] = bench.examples("qasper", TOKENIZER, 400, 1)
    assert item.text.startswith("<s>") and item.text.endswith("Q: Who?") and "<s>The quick" in item.text
    assert 380 <= item.tokens <= 392 and item.scorer == "f1"
    [plain] = bench.examples("trec", TOKENIZER, 400, 5)
    assert not plain.text.startswith("<s>") and plain.classes == ["fox", "owl"]
    [whole] = bench.examples("trec", TOKENIZER, 100_000, 1)
    assert whole.text == TEXT * 30 + "\nQ: Who?"


@pytest.mark.parametrize("template", [True, False])
def test_longbench_prompts_begin_with_one_bos_where_the_tokenizer_puts_it(template, tmp_path):
    bench, tokenizer = longbench.LongBench(str(bench_folder(tmp_path))), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = tokenizer.chat_template if template else None
    for task in ("qasper", "trec"):  # with the template and without
        [item] = bench.examples(task, tokenizer, 400, 1)
        [ids] = runner.encode(tokenizer, [item.text], torch.device("cpu"))["input_ids"].tolist()
        assert ids[0] == 1 and ids.count(1) == 1 and len(ids) == item.tokens <= 400 - item.answer_tokens


def test_faults_of_longbench_files_are_named(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        longbench.LongBench(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"dataset2prompt\.json is missing"):
        longbench.LongBench(str(tmp_path))
    bench = longbench.LongBench(str(bench_folder(tmp_path)))
    with pytest.raises(UserError, match=r"lcc is not in .*; it has qasper, trec"):
        bench.examples("lcc", TOKENIZER, 400, 1)
    with (tmp_path / "qasper.jsonl").open("a") as stream:
        stream.write('\n\n{"input": "x"}\nnot json')
    with pytest.raises(UserError, match=r"qasper\.jsonl:5: no usable context, answers, all_classes"):
        bench.examples("qasper", TOKENIZER, 400, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "fox"}, r"qasper\.jsonl:1: no usable answers; a LongBench line has .* answers \(a list of texts"),
        ({"answers": []}, r"qasper\.jsonl:1: no usable answers"),
        ({"answers": [1]}, r"qasper\.jsonl:1: no usable answers"),
        ({"all_classes": "fox", "context": None}, r"qasper\.jsonl:1: no usable context, all_classes"),
        ([], r"qasper\.jsonl:1: not a JSON object"),
        ("dataset2prompt.json", r"dataset2prompt\.json: no text for qasper"),
        ("dataset2maxlen.json", r"dataset2maxlen\.json: no number for qasper"),
        ({"dataset2prompt.json": {"qasper": "{context} {question}"}}, r"qasper can't be filled in: no 'question'"),
        (
            {"dataset2prompt.json": {"qasper": "{input}"}},
            r"dataset2prompt\.json: no text for qasper; give its prompt, with",
        ),
        (b'\n{"input": "caf\xe9"}', r"qasper\.jsonl:2: not a JSON object"),
        ({"dataset2maxlen.json": {"qasper": "8"}}, r"dataset2maxlen\.json: no number for qasper"),
        ({"dataset2maxlen.json": [8]}, r"dataset2maxlen\.json: "),
    ],
)
def test_what_is_not_in_longbenchs_format_is_named_by_file_and_line(change, message, tmp_path):
    path = bench_folder(tmp_path) / "qasper.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    if isinstance(change, str):
        change = {change: {"trec": json.loads((tmp_path / change).read_text())["trec"]}}
    if files := isinstance(change, dict) and {name: value for name, value in dict(change).items() if "." in name}:
        for name, value in files.items():
            (tmp_path / name).write_text(json.dumps(value))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**line, **change} if change else change))
    with pytest.raises(UserError, match=message):
        longbench.LongBench(str(tmp_path)).examples("qasper", TOKENIZER, 400, 1)


def test_a_passage_that_has_no_number_is_named(tmp_path):
    bench_folder(tmp_path)
    (tmp_path / "qasper.jsonl").rename(tmp_path / "passage_retrieval_en.jsonl")
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("qasper", "passage_retrieval_en"))
    with pytest.raises(UserError, match="an answer without a number; those of passage_retrieval_en are"):
        longbench.LongBench(str(tmp_path)).examples("passage_retrieval_en", TOKENIZER, 400, 1)


def test_a_class_that_no_answer_could_name_is_refused_and_equal_lines_count_once(tmp_path):
    path = bench_folder(tmp_path) / "trec.jsonl"
    line = json.loads(path.read_text())
    path.write_text("\n".join(map(json.dumps, [line, line, {**line, "input": "What?"}])))
    assert [e.index for e in longbench.LongBench(str(tmp_path)).examples("trec", TOKENIZER, 400, 8)] == [0, 2]
    for classes in (None, [], ["hen"]):
        path.write_text(json.dumps({**line, "all_classes": classes}))
        with pytest.raises(UserError, match=r"trec\.jsonl:1: no answer of trec is among all_classes"):
            longbench.LongBench(str(tmp_path)).examples("trec", TOKENIZER, 400, 1)


def test_recovery_and_its_interval():
    rows = [
        {"task": "t", "limit": 64, "tokens": 20 + i, "answer_tokens": 8, "index": i, "mode": mode, "score": value}
        for mode, values in (("dense", [1, 1, 0.5, 1]), ("spts", [1, 0, 0.5, 1]))
        for i, value in enumerate(values)
    ]
    [found] = recovery.summary(rows)
    assert found["items"] == 4 and found["recovery"] == pytest.approx(2.5 / 3.5)
    assert "| 64 at most, mean 30 |" in score_tables({"tasks": [found], "fidelity": []})
    low, high = found["interval"]
    assert 0.2 <= low < 2.5 / 3.5 < high <= 1.0
    assert recovery.interval([1.0], [1.0]) is None and recovery.interval([0, 0], [1, 1]) is None
    same = recovery.interval([1.0, 0.5, 1.0], [1.0, 0.5, 1.0])
    assert same == (1.0, 1.0)
    for dense in ([1, 0, 0, 0], [1] + [0] * 7):  # in a third of the resamples no answer is right
        assert recovery.interval(dense, dense) is None and recovery.interval(dense, dense[::-1]) is None
    low, high = recovery.interval([1] * 5 + [0] * 7, [0] * 5 + [1] * 7)  # in 0.2% of them
    assert low < 7 / 5 < high < 12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_intervals_contain_the_ratio_of_means(pairs):
    dense, other = zip(*pairs, strict=True)
    low, high = recovery.interval(list(dense), list(other))
    assert low - 1e-9 <= sum(other) / sum(dense) <= high + 1e-9


def test_answers_survive_a_torn_line_and_are_not_made_twice(tmp_path):
    path = tmp_path / "answers.jsonl"
    kept = runner.Answers(path)
    kept.add({"key": "a", "answer": "one"})
    kept.add({"key": "b", "answer": "two"})
    path.write_bytes(path.read_bytes()[:-5])
    again = runner.Answers(path)
    assert set(again.rows) == {"a"}
    again.add({"key": "c", "answer": "three"})
    assert set(runner.Answers(path).rows) == {"a", "c"}


def item_of(text, index=0, tokens=6, **more):
    return Example("qasper", index, text, ["x"], 10, 64, tokens, **more)


def test_batches_answer_as_single_prompts_do(tmp_path):
    model = tiny_model(vocab_size=300).eval()
    items = [item_of(TEXT[: 40 + 20 * i], i, tokens=4 + i) for i in range(3)]
    found = []
    for batch in (1, 3):
        kept = runner.Answers(tmp_path / f"{batch}.jsonl")
        found.append(
            list(runner.run(runner.ways_of(model), TOKENIZER, items, {"dense": "k", "spts": "s"}, kept, batch))
        )
    answers = [{(row["mode"], row["index"]): row["answer"] for row in rows} for rows in found]
    assert len(answers[0]) == 6 and answers[0] == answers[1]


def test_what_pads_the_shorter_answers_of_a_batch_is_no_part_of_them():
    tokenizer, model = tiny_tokenizer(), tiny_model(vocab_size=300).eval()
    tokenizer.pad_token = model.generation_config.pad_token_id = None  # then the first end pads
    items = [item_of(TEXT[: 40 + 20 * i], i, tokens=8) for i in range(3)]
    inputs = runner.encode(tokenizer, [items[0].text], model.device)
    second = int(model.generate(**inputs, **GREEDY, max_new_tokens=8).sequences[0, inputs["input_ids"].shape[1] + 1])
    model.generation_config.eos_token_id = [second, 2]  # an ordinary token, which decodes to something
    alone = [answer for item in items for answer in runner.answers(model, tokenizer, [item])]
    assert runner.answers(model, tokenizer, items) == alone and len(alone[0]) < len(alone[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"max_time": 1e-9},
        {"stop_strings": [" ", "a", "o"]},
        {"token_healing": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "high"},
        {"use_mtp": True},
        {"force_words_ids": [[5]]},
        {"do_sample": True, "temperature": 9.0, "num_return_sequences": 2},
    ],
)
def test_what_is_measured_is_greedy_whatever_the_checkpoint_prefers(settings, tmp_path):
    model, item = tiny_model(vocab_size=300).eval(), item_of(TEXT[:60])
    stock, ids = pairs.stock_twin(model), torch.arange(3, 43)[None]

    def found(name):
        kept = dense_reference.answer(stock, TOKENIZER, item, [0], Store(tmp_path), name)
        free = agreement.free_answer((model, {}), TOKENIZER, item)
        times = pairs.seconds(model, ids, (1, 3))
        return runner.answers(model, TOKENIZER, [item]), free, kept.answer.tolist(), [*times]

    plain = found("plain")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)  # which the twin shares
    assert found("own") == plain


def test_a_template_that_states_the_time_makes_the_same_prompt_every_day():
    tokenizer, now = tiny_tokenizer(), "{{ strftime_now('%d %B %Y, %H:%M:%S.%f') }}"
    tokenizer.chat_template = f"{now} {tokenizer.chat_template} {now}"
    assert chat(tokenizer, "Q") == "26 July 2024, 00:00:00.000000 <s>Q 26 July 2024, 00:00:00.000000"
    assert "26 July 2024" in synthetic.further_turn(tokenizer, "Q")
    asked = CalibrationSection(tokens=400, length=64, chat_template=True)
    made = blocks(asked, [[f"{n} {TEXT * 9}" for n in range(9)]], tokenizer)
    assert tokenizer.decode(made.fit[0]).startswith("26 July 2024")


def test_a_further_turn_begins_after_the_answer_whatever_the_template_says():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "Give the ANSWER only.{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
    )
    assert synthetic.further_turn(tokenizer, "And now?") == "</s><user>And now?</s><assistant>"


@pytest.mark.parametrize("spts", [False, None])
def test_a_further_turn_runs_on_the_first_ones_cache(spts):
    model = tiny_model(vocab_size=300).eval()
    item = item_of(TEXT[:60], follow_up=" And then?")
    extra = {} if spts is None else {"spts": spts}
    [answer] = runner.answers(model, TOKENIZER, [item], **extra)
    ids = runner.encode(TOKENIZER, [item.text], model.device)["input_ids"]
    with torch.no_grad():
        out = model(ids, logits_to_keep=1, use_cache=True, **extra)

        def greedy(out, count):
            tokens = []
            for _ in range(count):
                tokens.append(int(out.logits[0, -1].argmax()))
                if tokens[-1] == 2 or len(tokens) == count:
                    break
                out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
            return tokens

        first = greedy(out, 6)
        first = first[:-1] if first[-1] == 2 else first
        later = TOKENIZER(item.follow_up, add_special_tokens=False)["input_ids"]
        seen = out.past_key_values.get_seq_length()
        chunk = torch.tensor([[*first, *later][seen - ids.shape[1] :]])
        expected = greedy(model(chunk, past_key_values=out.past_key_values), 6)
    assert answer == TOKENIZER.decode(expected, skip_special_tokens=True)


def test_agreement_and_repetition_by_hand():
    dense = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    other = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.9]]))
    found = agreement.agreement(dense, other)
    assert found["top1"] == 0.5
    assert found["kl"] == pytest.approx((0.9 * torch.log(torch.tensor(9.0)) - 0.1 * torch.log(torch.tensor(9.0))) / 2)
    other[0] = float("nan")  # what is no number agrees with nothing, though the likeliest token of NaNs is one, too
    broken = agreement.agreement(dense, other)
    assert math.isnan(broken["kl"]) and broken["top1"] < found["top1"]
    with pytest.raises(UserError, match="dense model's logits are NaN"):
        agreement.agreement(other, dense)
    assert agreement.repeats([1, 2, 3] * 10) and not agreement.repeats(list(range(30)))


def test_unknown_suites_tasks_and_folders_are_named(tmp_path):
    for options, message in (
        (["--suite", "rular"], "--suite rular: unknown; there are ruler, longbench"),
        (["--task", "niah"], "--task niah: unknown; there are niah_single_1"),
        (["--suite", "longbench"], "needs --longbench FOLDER"),
        (["--lengths", "4k"], "--lengths 4k: give whole numbers"),
        ([], "no readable config.json"),
    ):
        assert message in run("evaluate", tmp_path, "--output", tmp_path / "out", *options, code=2)


def test_an_evaluation_goes_on_scores_again_and_certifies(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    common = ["evaluate", folder, "--output", tmp_path / "out", "--haystack", checkpoint.parent / "prose.txt"]
    options = ["--items", 2, "--lengths", "1500", "--task", "niah_single_2", "--task", "counting", "--dtype", "float32"]
    suites = ["--suite", "ruler", "--suite", "diversity", "--suite", "fidelity"]
    first = run(*common, *options, *suites)
    tables = (tmp_path / "out/evaluation.md").read_text()
    assert tables in first
    lines = (tmp_path / "out/answers.jsonl").read_text().strip().split("\n")  # an answer may have other separators
    assert len(lines) == 2 * 2 * 2 + 2 and "niah_single_2" in first and "KL, nats" in first
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {row["task"] for row in result["tasks"]} == {"niah_single_2", "counting"}
    assert result["fidelity"][0]["kl"] > 0 and len(result["depths"]) == 4

    whole = runner.answers
    monkeypatch.setattr(runner, "answers", None)  # nothing is answered again
    assert tables in run(*common, *options, *suites)
    (tmp_path / "out/answers.jsonl").write_text("\n".join(lines[2:]) + "\n")
    assert "Not finished: 2 answers are missing" in run(*common, "--rescore")
    assert "2 answers are missing; run evaluate" in run(*common, "--rescore", "--certify", code=2)
    monkeypatch.setattr(runner, "answers", whole)
    assert tables in run(*common, *options, *suites)
    assert sorted((tmp_path / "out/answers.jsonl").read_text().strip().split("\n")) == sorted(lines)

    rows = [json.loads(line) for line in lines]  # scoring anew reads the answers, whoever wrote them
    for row in rows:
        if row["task"] == "counting":
            row["answer"] = row["outputs"][0] if row["mode"] == "dense" else "none"
    (tmp_path / "out/answers.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    again = run(*common, *options, *suites, "--rescore", "--certify")
    assert re.search(r"counting +\| 1500 +\| 2 +\| 100\.0 +\| 0\.0", again)
    card = (folder / "README.md").read_text()
    assert str(checkpoint.parent) not in (folder / "spts_evaluation.json").read_text()
    assert card.count("# A card") == card.count("## Evaluation") == 1 and "Not measured: niah_single_1" in card
    told = ModelCard(card).data.eval_results  # what the Hub shows
    counting = {r.metric_name: r.metric_value for r in told if r.dataset_type == "counting"}
    assert counting == {"score with spts=False": 100.0, "score with skipping": 0.0}
    run(*common, *options, *suites, "--rescore", "--certify")
    assert (folder / "README.md").read_text() == card
    assert stale(folder) is None
    config = json.loads((folder / "config.json").read_text())
    config["spts"]["sink_tokens"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "was changed since the evaluation" in run(*common, "--rescore")
    assert "these answers are another checkpoint's" in run(*common, "--rescore", "--certify", code=2)


def test_an_evaluation_of_something_else_leaves_an_earlier_ones_tables(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "answers", lambda model, tokenizer, batch, **options: ["fox"] * len(batch))
    common = ["evaluate", checkpoint, "--output", tmp_path, "--suite", "ruler", "--task", "niah_single_1"]
    for length in (512, 512, 600):
        run(*common, "--items", 1, "--lengths", length)
    tables = {path.name: path.read_text() for path in tmp_path.glob("evaluation*.md")}
    assert tables.keys() == {"evaluation.md", "evaluation-1.md"}
    assert "| 512 " in tables["evaluation-1.md"] and "| 600 " in tables["evaluation.md"]


def test_an_evaluation_on_other_text_of_the_same_name_leaves_an_earlier_ones_tables(checkpoint, tmp_path):
    text, haystack = (checkpoint.parent / "prose.txt").read_text(), tmp_path / "text.txt"
    options = ["--suite", "fidelity", "--lengths", 400, "--items", 1, "--haystack", haystack, "--output", tmp_path]
    for part in (text[:9000], text[:9000], text[9000:]):
        haystack.write_text(part)
        run("evaluate", checkpoint, *options)
    assert sorted(path.name for path in tmp_path.glob("evaluation*.json")) == ["evaluation-1.json", "evaluation.json"]


def test_a_haystack_most_of_which_no_prompt_has_is_told(checkpoint, tmp_path):
    prose, haystack = (checkpoint.parent / "prose.txt").read_text(), tmp_path / "text.txt"
    options = ["--suite", "fidelity", "--lengths", 400, "--items", 1, "--haystack", haystack, "--output"]
    for lines, told in ((0, False), (2000, True)):
        haystack.write_text(prose[:9000] + "".join(f"total[{n}] = {n} * 0x{n};\n" for n in range(lines)))
        shown = run("evaluate", checkpoint, *options, tmp_path / f"{lines}")
        assert ("of the text is sentences in plain words" in shown) is told
        assert "in which it stands more than once" not in shown


def test_fidelity_takes_longbench_prompts_too(checkpoint, tmp_path):
    bench = bench_folder(tmp_path)
    options = ["--suite", "fidelity", "--longbench", bench, "--lengths", "600", "--items", "1", "--dtype", "float32"]
    haystack = ["--haystack", checkpoint.parent / "prose.txt"]
    shown = run("evaluate", checkpoint, "--output", tmp_path / "out", *options, *haystack)
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["fidelity"]
    assert [row["prompts"] for row in rows] == ["haystack", "LongBench"] and "| LongBench " in shown
    assert rows[0]["perplexity"]["dense"] > 1 and rows[1]["perplexity"] is None
    assert rows[1]["items"] == len(rows[1]["tasks"]) > 0 and rows[1]["kl"] > 0
    setting = json.loads((tmp_path / "out/setting.json").read_text())
    assert all(row["tokens"] + row["answer_tokens"] <= 600 for row in setting["examples"]["free"])


def test_a_haystack_that_was_fitted_on_is_told(checkpoint, tmp_path):
    folder, text = shutil.copytree(checkpoint, tmp_path / "model"), (checkpoint.parent / "prose.txt").read_text()
    (folder / "spts_report.json").write_text(json.dumps({"fitted_on": [document_key(f" {text}\n")]}))
    (tmp_path / "texts").mkdir()
    for name, part in (("copy", text), ("other", text[:9000])):
        (tmp_path / f"texts/{name}.txt").write_text(part)
    options = ["--suite", "fidelity", "--lengths", 400, "--items", 1, "--haystack"]
    shown = run("evaluate", folder, *options, tmp_path / "texts", "--output", tmp_path / "out", "--certify")
    note = "The checkpoint was fitted or chosen on 1 of 2 documents that prompts are made of."
    assert note in shown and note in (folder / "README.md").read_text()
    assert note not in run("evaluate", folder, *options, tmp_path / "texts/other.txt", "--output", tmp_path / "out")


@pytest.mark.parametrize(("kinds", "after", "told"), [(["needles"], 0.1, 1), (["needles"], 0.2, 0), (["text"], 0.1, 0)])
def test_queries_that_were_corrected_on_needles_are_told(checkpoint, tmp_path, kinds, after, told):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    report = {"queries": {"before": 0.2, "after": after, "kinds": kinds}}
    (folder / "spts_report.json").write_text(json.dumps(report))
    common = ["evaluate", folder, "--suite", "ruler", "--task", "niah_single_1", "--lengths", 512, "--output", tmp_path]
    assert run(*common, "--items", 1).count(columns.ON_NEEDLES) == told


@pytest.mark.parametrize(("items", "interval", "told"), [(29, (0.9, 1.0), 1), (30, (0.9, 1.0), 0), (1, None, 0)])
def test_intervals_of_few_prompts_are_not_trusted(items, interval, told):
    row = {"task": "vt", "length": 512, "items": items, "dense": 1, "spts": 1, "recovery": 1, "interval": interval}
    assert score_tables({"tasks": [row], "fidelity": []}).count(columns.FEW) == told


def test_other_seeds_ask_about_other_places(checkpoint):
    config = EvalConfig(lengths=(600,), items=2, haystack=str(checkpoint.parent / "prose.txt"))
    asked = [free_examples(replace(config, seed=seed), TOKENIZER, config.text) for seed in (1, 1, 2)]
    first, again, other = ({example.text for example in some} for some in asked)
    assert first == again and not first & other


@pytest.mark.parametrize("part", [{"answers": 3}, {"answers": {"dense": 1}}, {"examples": {"known": [1]}}])
def test_a_setting_that_was_changed_is_told(checkpoint, tmp_path, part):
    common = ["evaluate", checkpoint, "--output", tmp_path, "--suite", "ruler", "--task", "niah_single_1"]
    run(*common, "--items", 1, "--lengths", 512)
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps(json.loads(setting.read_text()) | part))
    assert "its setting.json was changed" in run(*common, "--items", 1, "--lengths", 512, "--rescore", code=2)


def test_benchmark_documents_that_were_fitted_on_are_told(checkpoint, tmp_path):
    folder, bench = shutil.copytree(checkpoint, tmp_path / "model"), bench_folder(tmp_path)
    context = json.loads((bench / "qasper.jsonl").read_text().splitlines()[0])["context"]
    (folder / "spts_report.json").write_text(json.dumps({"fitted_on": [document_key(context)]}))
    options = ["--suite", "longbench", "--longbench", bench, "--task", "qasper", "--lengths", 600, "--items", 1]
    shown = run("evaluate", folder, *options, "--output", tmp_path / "out")
    assert "on 1 of 1 documents that prompts are made of" in shown


def test_scoring_fewer_answers_than_before_leaves_the_earlier_tables(checkpoint, tmp_path):
    common = ["evaluate", checkpoint, "--output", tmp_path, "--suite", "ruler", "--task", "niah_single_1"]
    whole = run(*common, "--items", 1, "--lengths", 512)
    (tmp_path / "answers.jsonl").unlink()
    assert "Not finished" in run(*common, "--items", 1, "--lengths", 512, "--rescore") and "| 512 " in whole
    assert "| 512 " in (tmp_path / "evaluation-1.md").read_text()


def test_tables_that_someone_wrote_in_are_kept(checkpoint, tmp_path):
    common = ["evaluate", checkpoint, "--output", tmp_path, "--suite", "ruler", "--task", "niah_single_1"]
    run(*common, "--items", 1, "--lengths", 512)
    run(*common, "--items", 1, "--lengths", 512, "--rescore")
    tables = tmp_path / "evaluation.md"
    assert not (tmp_path / "evaluation-1.md").exists()
    tables.write_text(own := tables.read_text() + "\nWhat I think of it.\n")
    run(*common, "--items", 1, "--lengths", 512, "--rescore")
    assert (tmp_path / "evaluation-1.md").read_text() == own and tables.read_text() == own[: own.index("\nWhat")]


def test_a_haystack_shorter_than_its_prompts_is_told(checkpoint, tmp_path):
    text = (checkpoint.parent / "prose.txt").read_text()
    options = ["--suite", "fidelity", "--lengths", 400, "--items", 3, "--haystack"]
    for characters, shared, repeated in ((350, True, True), (1500, True, False), (9000, False, False)):
        (tmp_path / "text.txt").write_text(text[:characters])
        shown = run("evaluate", checkpoint, *options, tmp_path / "text.txt", "--output", tmp_path / "out")
        assert ("prompts share parts of it" in shown) is shared
        assert ("shorter than a prompt of 400 tokens, in which it stands more than once" in shown) is repeated


def test_an_ablation_adds_the_parts_one_by_one(checkpoint, tmp_path):
    options = ["--length", 1500, "--items", 1, "--pairs", 1, "--new-tokens", 2, "--task", "niah_single_2"]
    folder, prose = shutil.copytree(checkpoint, tmp_path / "model"), checkpoint.parent / "prose.txt"
    (folder / "spts_report.json").write_text(json.dumps({"fitted_on": [document_key(prose.read_text())]}))
    shown = run("ablate", folder, "--output", tmp_path, *options, "--haystack", prose)
    assert "The checkpoint was fitted or chosen on 1 of 1 documents that prompts are made of." in shown
    rows = {row["variant"]: row for row in json.loads((tmp_path / "ablation.json").read_text())["rows"]}
    names = ["dense", "+PAP", "+PAP+LTP", "+PAP+LTP+MSDP", "attention chooses FFN tokens", "uniform budgets"]
    assert list(rows) == names and all(name in shown for name in names)
    flops = [rows[name]["flop_speedup"] for name in names[:4]]
    assert flops == sorted(flops) and flops[0] == 1
    kv = [rows[name]["kv_bytes"] for name in names]
    assert kv[0] > kv[1] == kv[2] == kv[3] and abs(kv[5] - kv[3]) <= 0.01 * kv[3]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(names) and all(json.loads(line)["made"]["batch"] == 1 for line in lines)  # as evaluate's
    assert set(rows["+PAP"]["scores"]) == {"niah_single_2"} and len(rows["+PAP"]["seconds"]) == 2


def test_variants_of_an_ablation_are_what_their_names_say():
    stages = [{"end": 2, "budget": 40, "ffn_budget": 10, "prune_to": 60}, {"end": 4, "budget": 20}]
    for selection, ltp, count in (("proxy", "+LTP", 5), ("attention", "+FFN by attention", 4), ("all", "", 4)):
        schedule = Schedule.from_dict({**SCHEDULE, "stages": stages, "ffn_selection": selection}, 5)
        found = ablate.variants(schedule, 5, 100)
        assert len(found) == count and found[f"+PAP{ltp}+MSDP"] == schedule
        assert ("attention chooses FFN tokens" in found) == (selection != "attention")
        even, own = (
            [sum(counts) for counts in zip(*(one.counts(layer, 100) for layer in range(5)), strict=True)]
            for one in (found["uniform budgets"], schedule)
        )
        assert even[1] == own[1] and (even[2] == own[2] or selection == "all")


def test_answers_are_scored_as_the_examples_of_this_request(checkpoint, tmp_path, monkeypatch):
    """Documents that fit into both lengths have one answer; of the long one something is skipped at the second."""
    folder, output = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "spts": {**config["spts"], "min_length": 600}}))
    monkeypatch.setattr(runner, "answers", lambda model, tokenizer, batch, **options: ["fox"] * len(batch))
    bench = bench_folder(tmp_path)

    def evaluated(reference):
        contexts = ["One fox.", "Three foxes.", "Two foxes.", TEXT * 60]
        lines = [{"input": "Who?", "context": c, "answers": [reference], "all_classes": None} for c in contexts]
        (bench / "qasper.jsonl").write_text("\n".join(map(json.dumps, lines)))
        options = ["--suite", "longbench", "--longbench", bench, "--task", "qasper", "--lengths", "512,1024,512"]
        shown = run("evaluate", folder, "--output", output, *options, "--items", 4, "--batch", 4)
        rows = json.loads((output / "evaluation.json").read_text())["tasks"]
        return [(row["length"], row["items"], row["unskipped"], row["spts"]) for row in rows], shown

    rows, shown = evaluated("owl")
    assert rows == [(512, 4, 4, 0.0), (1024, 4, 3, 0.0)]
    assert "| 4 (4 not skipped) |" in shown and "say nothing of skipping" in shown
    assert evaluated("fox")[0] == [(512, 4, 4, 1.0), (1024, 4, 3, 1.0)]
    assert len((output / "answers.jsonl").read_text().splitlines()) == 2 * 5

    other = run("evaluate", checkpoint, "--output", output, "--rescore", "--items", 3, "--dtype", "float32")
    assert "another checkpoint's than that in" in other
    assert "asked for with items 4, not 3" in other and "asked for with dtype bfloat16, not float32" in other
    same = run("evaluate", folder, "--output", output, "--rescore", "--items", 4)
    assert "warning" not in same and "| 4 (4 not skipped) |" in same


@pytest.mark.parametrize(
    ("command", "name", "processes"), [("evaluate", "answers.1.jsonl", 2), ("ablate", "ablation.png", 1)]
)
def test_a_users_file_of_a_results_name_stays(command, name, processes, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    (tmp_path / name).write_text("theirs")
    shown = run(command, checkpoint, "--output", tmp_path, code=2)
    assert f"{tmp_path / name} exists and was not made by this toolkit" in shown
    assert (tmp_path / name).read_text() == "theirs"


def test_a_result_names_the_machines_and_batches_its_answers_are_from(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "answers", lambda model, tokenizer, batch, **options: ["1"] * len(batch))
    options = ["--suite", "diversity", "--task", "counting", "--lengths", 800, "--items", 2, "--output", tmp_path]
    options += ["--haystack", checkpoint.parent / "prose.txt"]

    def made(device, batch):
        monkeypatch.setattr(suites, "hardware", lambda _: {"device": device, "torch": "2", "transformers": "5"})
        run("evaluate", checkpoint, *options, "--batch", batch)
        setting = json.loads((tmp_path / "evaluation.json").read_text())["setting"]
        assert "hardware" not in setting and "batch" not in setting["request"]
        return [(one["hardware"]["device"], one["batch"]) for one in setting["made"]]

    assert made("a CPU", 2) == made("another", 1) == [("a CPU", 2)]  # nothing was answered again
    (tmp_path / "answers.jsonl").write_text((tmp_path / "answers.jsonl").read_text().split("\n", 1)[1])
    assert sorted(made("another", 1)) == [("a CPU", 2), ("another", 1)]


def test_equal_prompts_of_a_batch_have_a_row_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "answers", lambda model, tokenizer, batch, **options: ["x"] * len(batch))
    ways, keys = {"dense": (None, {}), "spts": (None, {})}, {"dense": "d", "spts": "s"}
    items, done = [item_of("same", n) for n in range(3)], runner.Answers(tmp_path / "answers.jsonl")
    rows = list(runner.run(ways, TOKENIZER, items, keys, done, 3))
    assert [(row["mode"], row["index"]) for row in rows] == [(m, n) for m in ("dense", "spts") for n in range(3)]


def test_a_checkpoint_replaced_while_it_is_loaded_answers_nothing(checkpoint, tmp_path, monkeypatch):
    folder, whole = shutil.copytree(checkpoint, tmp_path / "model"), AutoModelForCausalLM.from_pretrained

    def load(*arguments, **options):
        (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0}))
        return whole(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for command, output in (("evaluate", "one"), ("ablate", "two"), ("bench", "three")):
        (folder / "generation_config.json").write_text("{}")
        options = ["--length" if command == "ablate" else "--lengths", 300, "--output", tmp_path / output]
        assert "was changed during the run" in run(command, folder, *options, code=2)
        assert not (tmp_path / output).exists()


def test_a_schedule_edited_to_need_what_was_not_fitted_is_not_measured(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["spts"]["update"] = {"attention_rank": 0, "ffn_rank": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"needs model\.layers\.1\.attention_update\.bias, .* and would be random"):
        suites.load(folder, "cpu", "float32")


def test_what_can_not_be_measured_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    common = ["--output", tmp_path / "out"]
    for command, option in (("evaluate", "--lengths"), ("ablate", "--length")):
        assert "more than the context of 2048" in run(command, checkpoint, option, 2049, *common, code=2)
        inside = run(command, checkpoint, option, 300, *common, "--haystack", tmp_path, code=2)
        assert "is inside --haystack" in inside and not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, what in (("bench", checkpoint), ("ablate", checkpoint), ("sweep", tmp_path / "recipe.yaml")):
        assert f"{command} is for one process" in run(command, what, *common, code=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", b"\xff\xfe"),
        ("README.md", b"---\na: [\n---\n"),
        ("README.md", b"---\nmodel-index: [{name: x}]\n---\n"),
        ("README.md", b"<!-- evaluation -->\nold figures\nthe user's notes\n"),
        ("README.md", b"<!-- /evaluation -->\nnotes\n<!-- evaluation -->\n"),
        ("README.md", b"<!-- evaluation -->\nnotes\n<!-- evaluation -->\n<!-- /evaluation -->\n"),
        ("spts_evaluation.json", b"{"),
        ("spts_evaluation.json", b"[]"),
    ],
)
def test_what_can_not_be_certified_is_named_before_any_work(name, content, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / name).write_bytes(content)
    shown = run("evaluate", folder, "--output", tmp_path / "out", "--lengths", 300, "--certify", code=2)
    assert f"error: {folder / name}: " in shown and not (tmp_path / "out").exists()


def test_what_has_no_prompt_is_refused_and_an_earlier_certificate_stays(checkpoint, tmp_path):
    folder, bench = shutil.copytree(checkpoint, tmp_path / "model"), bench_folder(tmp_path)
    (folder / "spts_evaluation.json").write_text("{}")
    common, there = ["--output", tmp_path / "out"], ["--longbench", bench, "--task"]
    (bench / "trec.jsonl").write_text("")
    for command, options, message in (
        (
            "evaluate",
            ["--suite", "ruler", "--task", "trec", "--certify"],
            "trec is of the suite longbench, which",
        ),
        ("evaluate", ["--suite", "fidelity", "--task", "vt"], "vt is of the suite ruler, which is not run"),
        ("evaluate", ["--suite", "longbench", "--lengths", 300, *there, "lcc"], "lcc is not in"),
        ("ablate", ["--task", "trec"], "it needs that suite and --longbench FOLDER"),
        ("ablate", ["--length", 300, *there, "trec"], f"{bench}: no prompt of trec there"),
        ("ablate", ["--pairs", 0], "--pairs and --new-tokens must be at least 1"),
        ("ablate", ["--new-tokens", "16,0"], "--pairs and --new-tokens must be at least 1"),
    ):
        assert message in run(command, folder, *common, *options, code=2), options
    folder_of = suites.folder_key(folder)
    setting = {"keys": {"spts": suites.fingerprint(folder_of, ["cpu"])}, "how": ["cpu"]}
    with pytest.raises(UserError, match="nothing was measured that could be certified"):
        suites.certify(folder, {"setting": setting, "missing": 0, "tasks": [], "fidelity": []})
    assert (folder / "spts_evaluation.json").read_text() == "{}"


def test_a_kill_leaves_no_card_and_certificate_of_two_evaluations(checkpoint, tmp_path, monkeypatch):
    folder, options = shutil.copytree(checkpoint, tmp_path / "model"), ["--suite", "fidelity", "--lengths", 400]
    run("evaluate", folder, *options, "--items", 1, "--certify", "--output", tmp_path / "out")
    result, replace = suites.summarise(tmp_path / "out"), os.replace
    result["fidelity"][0]["items"] = 77
    for last in ("README.md", "spts_evaluation.json"):

        def killed(source, target, last=last):
            if target.name == last:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            suites.certify(folder, result)
        assert not (folder / "spts_evaluation.json").exists()
        assert ("| 77 " in (folder / "README.md").read_text()) == (last != "README.md")
    suites.certify(folder, result)
    assert json.loads((folder / "spts_evaluation.json").read_text())["fidelity"][0]["items"] == 77


def test_an_ablation_runs_the_longbench_tasks_that_are_there(checkpoint, tmp_path, monkeypatch):
    asked, bench = [], bench_folder(tmp_path)
    monkeypatch.setattr(ablate, "ablate", lambda *arguments: asked.append(arguments[3].tasks) or {})
    monkeypatch.setattr(ablate, "save", lambda *_: "")
    run("ablate", checkpoint, "--output", tmp_path / "out", "--length", 300, "--longbench", bench)
    assert asked == [("niah_single_2", "niah_multikey_1", "qasper", "trec")]


def test_prompts_are_padded_without_a_token_for_it():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    ids, mask = runner.encode(tokenizer, ["fox", "The quick fox"], torch.device("cpu")).values()
    for text, row, real in zip(["fox", "The quick fox"], ids, mask, strict=True):
        own = runner.encode(tokenizer, [text], torch.device("cpu"))
        assert own["attention_mask"].all() and torch.equal(row[real.bool()], own["input_ids"][0])
        assert real.tolist() == [0] * (ids.shape[1] - int(real.sum())) + [1] * int(real.sum())
    assert ids.shape[0] == 2 and mask[0, 0] == 0


@pytest.mark.parametrize("template", [True, False])
def test_no_prompt_ends_with_the_token_that_some_tokenizers_put_last(template):
    tokenizer = tiny_tokenizer()
    specials = [("<s>", 1), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    own = tokenizer("The fox </s>", add_special_tokens=False)["input_ids"]  # one that the text has stays
    ids = runner.encode(tokenizer, ["The fox </s>"], torch.device("cpu"))["input_ids"][0].tolist()
    assert own[-1] == tokenizer.eos_token_id and ids == (own if template else [1, *own])
    assert token_count(tokenizer, "The fox </s>") == len(ids)


def test_text_too_short_to_follow_a_prompt_has_no_perplexity():
    ways = runner.ways_of(tiny_model(vocab_size=300).eval())
    assert agreement.following_loss(ways, TOKENIZER, "A short text.", 400) is None
    assert agreement.following_loss(ways, TOKENIZER, TEXT * 20, 10_000) is None  # it would stand under that length
    assert set(agreement.following_loss(ways, TOKENIZER, TEXT * 20, 400)) == {"dense", "spts"}


def test_text_after_a_prompt_that_is_not_skipped_has_no_perplexity():
    ways = runner.ways_of(tiny_model(schedule={**SCHEDULE, "min_length": 100}, vocab_size=300).eval())
    lengths = (200, 227, 228)  # of which 128 tokens follow
    assert [bool(agreement.following_loss(ways, TOKENIZER, TEXT * 20, n)) for n in lengths] == [False, False, True]


def test_perplexity_is_of_the_haystack_that_is_asked_for(checkpoint, tmp_path, monkeypatch):
    """Haystacks that differ where no prompt is, so that other text follows the same prompts."""
    followed, whole = [], {"kl": 0.0, "top1": 1.0, "repeats": {"dense": False, "spts": False}}

    def measure(ways, tokenizer, example, following):
        followed.append(following)
        return {**whole, "loss": {"dense": float(following.count("long")), "spts": 0.0}}

    monkeypatch.setattr(agreement, "measure", measure)
    sentences, found = PROSE.split(". "), []
    for middle in (sentences[75], sentences[75] + " for a long long while"):
        (tmp_path / "hay.txt").write_text(". ".join([*sentences[:75], middle, *sentences[76:]]))
        options = ["--suite", "fidelity", "--lengths", 512, "--items", 2, "--haystack", tmp_path / "hay.txt"]
        run("evaluate", checkpoint, *options, "--output", tmp_path / "out")
        found.append(json.loads((tmp_path / "out/evaluation.json").read_text())["fidelity"][0]["perplexity"]["dense"])
    assert found == [1.0, pytest.approx(math.exp(2))] and len(set(followed)) == 4
