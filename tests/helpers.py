"""Steps that several test files take."""

import json
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from tiny import TEXT

from spts_compress.cli import main
from spts_compress.utils.store import file_hash

PROSE = " ".join(f"The {n} owls of wood number {n} sleep in a warm and quiet old tree." for n in range(300))


def run(*arguments, code=0):
    """Run the command line in this process; its output, once it ended with `code`."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def write_corpus(folder):
    """Write twelve short documents into the existing `folder`."""
    lines = (json.dumps({"text": f"Document {n}. {TEXT * 3}It ends at {n * 37}. "}) for n in range(12))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def recipe_for(base, corpus, folder, **changes):
    """Write folder/recipe.yaml for the tiny model in `base`, to export to folder/out.

    `changes` are values by section and key, such as `model__path`.
    """
    data = {
        "model": {"path": str(base)},
        "calibration": {"source": "files", "path": str(corpus), "tokens": 1200, "length": 128},
        "proxy": {"channels": 12, "rank": 4, "max_flop_fraction": 1.0, "steps": 20},
        "schedule": {
            "start": 2,
            "stages": [{"end": 3, "budget": 40, "prune_to": 48}, {"end": 4, "budget": 24}],
            "sink_tokens": 2,
        },
        "report": {"lengths": [300], "pairs": 1, "needles": 1, "answers": 1, "answer_tokens": 4, "quality_length": 400},
        "export": {"path": str(folder / "out")},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        data[section][key] = value
    path = folder / "recipe.yaml"
    path.write_text("# a comment that travels\n" + yaml.safe_dump(data))
    return path


def contents(folder: Path) -> dict[str, Any]:
    """Hashes of everything that does not hold a measured time or a path."""
    skip = {"README.md", "spts_report.json", "recipe.yaml", "recipe.resolved.yaml"}
    hashes = {p.name: file_hash(p) for p in folder.iterdir() if p.name not in skip}
    listed = json.loads((folder / "spts_files.json").read_text())
    return {**hashes, "spts_files.json": {name: value for name, value in listed.items() if name != "told"}}
