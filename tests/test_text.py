"""Calibration text."""

import json

from tiny import tiny_tokenizer

from spts_compress.calibrate import data
from spts_compress.recipe import CalibrationSection


def section(**values):
    return CalibrationSection.model_validate(values)


def test_sources_share_the_tokens_and_never_a_document(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"document{number} " * 40)
    made = section(source=["files", "python-docs"], path=str(tmp_path), tokens=4000, length=128, held_out=0.25)
    sources = data.documents(made)
    blocks = data.blocks(made, sources, tiny_tokenizer())
    assert sum(map(len, blocks.fit)) == 3000 and sum(map(len, blocks.held_out)) == 1000
    tokenizer = tiny_tokenizer()

    def named(sequences):
        words = " ".join(tokenizer.decode(s) for s in sequences).split()
        return {word for word in words if word.startswith("document") and words.count(word) > 5}  # none cut short

    fitted, kept = named(blocks.fit), named(blocks.held_out)
    assert fitted and kept and not any(f"{name} {name}" in blocks.unseen for name in fitted)
    ours = sum(len(s) for s in blocks.fit if "document" in tokenizer.decode(s))
    assert abs(ours - 1500) <= 128


def test_both_of_pythons_own_sources_hold_text():
    docs, code = data.documents(section(source=["python-docs", "python-code"]))
    assert sum(map(len, docs)) > 100_000 and sum(map(len, code)) > 1_000_000
    assert any("def " in file for file in code)


def test_no_more_of_a_source_is_read_than_the_tokens_need(tmp_path):
    lines = (json.dumps({"text": "word " * 200}) for _ in range(5000))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    [found] = data.documents(section(source="files", path=str(tmp_path / "many.jsonl"), tokens=1000))
    assert 16_000 < sum(map(len, found)) < 40_000
