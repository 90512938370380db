"""What the documentation says is so: commands, options, links, pictures, recipes, families, names of tests."""

import re
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from spts_compress.checkpoint.families import ALIASES, FAMILIES
from spts_compress.cli import main
from spts_compress.recipe import find, load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
INDEX = ROOT / "recipes/results/README.md"


def pages() -> list[Path]:
    """The documentation: no environments, caches, outputs, nor the tables of single results."""
    places = [ROOT, ROOT / ".github", *(ROOT / name for name in ("calibration", "recipes", "spts_compress", "tests"))]
    found = {page for place in places for page in (place.glob("*.md") if place == ROOT else place.rglob("*.md"))}
    return sorted(page for page in found if page == INDEX or INDEX.parent not in page.parents)


MODELING = ROOT / "spts_compress/modeling/README.md"
PLUGIN = ROOT / "spts_compress/vllm_plugin/README.md"

every_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def code(text: str) -> list[str]:
    """Every inline piece and every line of every block of code, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [*lines, *(piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", prose))]


def command_faults(line: str) -> list[str]:
    """What `spts-compress` would not understand in a line of code."""
    found = []
    for words in re.findall(r"(?:^|(?<=&& )|(?<=\s))(?:spts-compress|-m spts_compress) (\w+)([^#&|;]*)", line):
        name, rest = words
        command = main.commands.get(name)
        if command is None:
            found.append(f"no command {name}")
            continue
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        found += [
            f"{name} has no {option}" for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest) if option not in known
        ]
    return found


def test_the_readme_fits_on_two_screens():
    assert len(README.read_text().splitlines()) <= 150


@every_page
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            missing.append(target)
    assert not missing


@every_page
def test_commands_and_their_options_exist(page):
    assert [fault for line in code(page.read_text()) for fault in command_faults(line)] == []


def test_the_check_of_commands_finds_faults():
    assert command_faults("pip install x && spts-compress recipe a.yaml --dry-run --set a.b=1") == []
    assert command_faults("torchrun -m spts_compress evaluate DIR --suites ruler") == ["evaluate has no --suites"]
    assert command_faults("spts-compress bake DIR") == ["no command bake"]


def test_every_command_is_in_the_readme():
    assert isinstance(main, click.Group)
    named = {word for line in code(README.read_text()) for word in re.findall(r"spts-compress (\w+)", line)}
    assert set(main.commands) == named


@every_page
def test_recipes_and_scripts_that_are_named_exist(page):
    pieces = " ".join(code(page.read_text()))
    recipes = set(re.findall(r"(?<![\w/.-])([\w.-]+\.yaml)\b", pieces)) - {"recipe.yaml", "recipe.resolved.yaml"}
    assert all(find(name).is_file() for name in recipes)
    assert all((ROOT / script).is_file() for script in re.findall(r"recipes/studies/\w+\.py", pieces))


def test_every_shipped_recipe_is_listed():
    listed = (ROOT / "recipes/README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in (ROOT / "recipes").glob("*.yaml"))


def test_recipes_in_the_documentation_are_read_by_the_toolkit(tmp_path):
    read = 0
    for page in (README, ROOT / "recipes/README.md"):
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            data = yaml.safe_load(block)
            if "model" not in data:  # a section alone
                data = {"model": {"path": "a"}, "export": {"path": "b"}, **data}
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
            load(tmp_path / "recipe.yaml").read_schedule(32)
            read += 1
    assert read >= 3


def test_families_are_the_supported_ones():
    part = README.read_text().split("## Model families")[1].split("\n\n")[1]
    assert re.findall(r"`(\w+)`", part.split("(by")[0]) == [*FAMILIES, *ALIASES]
    if MODELING.exists():
        rows = re.findall(r"^\| `(\w+)` \|", MODELING.read_text(), flags=re.MULTILINE)
        assert {*FAMILIES, *ALIASES} <= {*rows}


@pytest.mark.parametrize(("page", "tests", "least"), [(MODELING, "test_*.py", 25), (PLUGIN, "serving/test_*.py", 15)])
def test_every_way_of_use_names_existing_tests(page, tests, least):
    there = set(re.findall(r"def test_(\w+)\(", "".join(p.read_text() for p in ROOT.glob(f"tests/{tests}"))))
    rows = re.findall(r"^\| .* \| .* \| (`.*`) \|$", page.read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(rows) >= least
    assert named <= there, named - there


def test_the_index_of_results_names_every_file():
    folder, index = INDEX.parent, INDEX.read_text()
    linked = {(folder / path).resolve() for path in re.findall(r"\]\(([^)\s#]+)", index)}
    listed = {path.with_suffix("") for path in linked} | {
        (folder / name / stem).resolve()
        for name in ("llama-3.1-8b-shape", "qwen2.5-7b-shape")  # the same four files each
        for stem in ("headline", "ablation", "batch", "profile")
        if f"`{stem}`" in index
    }
    files = {path.with_suffix("").resolve() for path in folder.glob("*/*") if path.is_file()}
    assert files <= listed, files - listed


def test_every_study_is_described():
    listed = (ROOT / "recipes/studies/README.md").read_text()
    assert all(f"({path.name})" in listed for path in (ROOT / "recipes/studies").glob("*.py"))


def test_ci_runs_the_readmes_own_command():
    script = (ROOT / ".ci/run").read_text()
    extract = re.search(r"command=\$\((.*)\)$", script, flags=re.MULTILINE)
    assert extract
    found = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.startswith("pip install") and "pytest" in found and len(found.splitlines()) == 1
