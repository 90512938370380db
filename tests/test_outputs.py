"""What a run may replace, and how a finished folder gets its name: nothing is deleted that is not provably ours."""

import errno
import json
import os
import resource
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_checkpoint import tiny_checkpoint

from spts_compress.checkpoint.outputs import new_folder, refuse
from spts_compress.cli import main
from spts_compress.tasks.runner import Answers
from spts_compress.utils.errors import UserError
from spts_compress.utils.store import CLAIM, Store, claimed, file_hash


def made_here(folder: Path, text: str = "old") -> Path:
    """A folder that looks like a checkpoint made here."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / "README.md").write_text("card")
    listed = {"config.json": file_hash(folder / "config.json"), "extra/x.jinja": sha256().hexdigest()}
    told = {"README.md": file_hash(folder / "README.md")}
    (folder / "spts_files.json").write_text(json.dumps({"sha256": listed, "told": told}))
    return folder


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_what_is_free_to_be_made(tmp_path):
    refuse(tmp_path / "new")
    refuse(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty")
    refuse(made_here(tmp_path / "ours"), force=True)
    (tmp_path / "ours/extra").mkdir()
    (tmp_path / "ours/extra/x.jinja").touch()  # listed
    refuse(tmp_path / "ours", force=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refuse(tmp_path / "dangling")


def test_what_was_made_in_a_checkpoint_since_its_export_is_not_replaced(tmp_path):
    out = made_here(tmp_path / "out")
    names = ("config.json", "model-1.safetensors", "README.md", "recipe.yaml", "spts_report.json", "search.png")
    names += ("spts_evaluation.json",)
    listed = json.loads((out / "spts_files.json").read_text())
    listed["sha256"]["model-1.safetensors"] = "of the base's"
    (out / "spts_files.json").write_text(json.dumps(listed))
    for name in names:
        (out / name).write_text("mine")
    for message in (f"{' and '.join(names[first:])} changed" for first in range(len(names))):
        with pytest.raises(UserError, match=rf"out: {message} since the export; move or delete"), new_folder(out, True):
            raise RuntimeError("must not come here")
        (out / message.split()[0]).unlink()
    with new_folder(out, True) as new:
        made_here(new / "x")
    assert (out / "x").is_dir()


def _case_foreign(place):
    made_here(place / "out")
    (place / "out/notes.txt").touch()


def _case_foreign_below(place):
    made_here(place / "out")
    (place / "out/extra/deep").mkdir(parents=True)
    (place / "out/extra/deep/notes").touch()


def _case_link_inside(place):
    made_here(place / "out")
    (place / "elsewhere").mkdir()
    (place / "out/data").symlink_to(place / "elsewhere")


def _case_other_folder(place):
    (place / "out").mkdir()
    (place / "out/weights").touch()


def _case_broken_manifest(place):
    made_here(place / "out")
    (place / "out/spts_files.json").write_text("[")


def _case_file(place):
    (place / "out").touch()


def _case_link_to_foreign(place):
    (place / "real").mkdir()
    (place / "real/weights").touch()
    (place / "out").symlink_to(place / "real")


def _case_base(place):
    (made_here(place / "base") / "weights").touch()
    (place / "out").symlink_to(place / "base")


def _case_holds_base(place):
    made_here(place / "out")
    (place / "base").symlink_to(place / "out")


def _case_base_links_into_it(place):
    made_here(place / "out")
    (place / "base").mkdir()
    (place / "base/model.safetensors").symlink_to(place / "out/config.json")


CASES = {
    _case_foreign: "holds files of others: notes.txt",
    _case_foreign_below: "holds files of others: extra/deep/notes",
    _case_link_inside: "holds files of others: data",
    _case_other_folder: "is no checkpoint made here",
    _case_broken_manifest: "is no checkpoint made here",
    _case_file: "is a file",
    _case_link_to_foreign: "is no checkpoint made here",
    _case_base: "is or holds an input of this run",
    _case_holds_base: "is or holds an input of this run",
    _case_base_links_into_it: "is or holds an input of this run",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("_case_"))
def test_force_replaces_nothing_but_a_checkpoint_made_here(case, tmp_path):
    case(tmp_path)
    before = everything(tmp_path)
    for output in (tmp_path / "out", f"{tmp_path}/out/"):
        with pytest.raises(UserError, match=CASES[case]), new_folder(Path(output), True, [tmp_path / "base"]):
            raise RuntimeError("must not come here")
    assert everything(tmp_path) == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("output", [".", "..", "/", "~"])
def test_the_working_folder_its_parents_and_the_home_stay(output, tmp_path, monkeypatch):
    work = made_here(tmp_path / "a") / "b"
    work.mkdir()
    made_here(tmp_path / "home")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"is or holds (the working folder|your home)"):
        refuse(Path(output).expanduser(), True)


def test_without_force_a_checkpoint_stays(tmp_path):
    out = made_here(tmp_path / "out")
    with pytest.raises(UserError, match="or --force to replace it"):
        refuse(out, False)
    with pytest.raises(UserError, match=r"give another --output$"):  # where there is no such option
        refuse(out)


def test_a_new_folder_takes_its_name_in_the_end(tmp_path):
    for name in ("new", "old", "gone", "out.new", "out.old"):  # a user's own
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "out")
    with new_folder(tmp_path / "link", True) as made:
        (made / "config.json").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep/out/config.json").read_text() == "new"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert len(list(tmp_path.iterdir())) == 7
    out = made_here(tmp_path / "out")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(out)
    with new_folder(tmp_path / "link", True) as made:
        (made / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"
    assert everything(out) == {"config.json": "new"} and (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    out = made_here(tmp_path / "out")
    before = everything(tmp_path)
    for output in (out, tmp_path / "not" / "yet"):
        with pytest.raises(RuntimeError), new_folder(output, True) as made:
            (made / "half").touch()
            raise RuntimeError
    assert everything(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_a_run_is_not_replaced(force, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"out exists and is no checkpoint.* with --work w"):  # noqa: SIM117
        with new_folder(out, force, hint=" with --work w") as made:
            (made / "config.json").touch()
            out.mkdir()
            (out / "weeks of work").touch()
    assert [p.name for p in out.iterdir()] == ["weeks of work"] and not list(tmp_path.glob(".*"))
    with new_folder(tmp_path / "filled", force) as made:
        (made / "config.json").touch()
        (tmp_path / "filled").mkdir()  # empty, so nothing is lost
    assert [p.name for p in (tmp_path / "filled").iterdir()] == ["config.json"]


def test_the_last_step_itself_replaces_nothing(tmp_path, monkeypatch):
    """Between the last look and the renaming."""
    whole = Path.rename

    def late(self, target):
        if target == tmp_path / "out":
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").touch()
        return whole(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(UserError, match="something was put there"), new_folder(tmp_path / "out", False):
        pass
    assert (tmp_path / "out/theirs").exists()


def test_a_second_run_into_one_output_stops_at_its_start(tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    with new_folder(tmp_path / "out", False):
        for other in ("out", "alias"):
            with pytest.raises(UserError, match="another run is using"), new_folder(tmp_path / other, True):
                raise RuntimeError("must not come here")
        with new_folder(tmp_path / "out2"):
            pass
    assert (tmp_path / "out").is_dir()


def _killed_at(number: int, out: Path) -> bool:
    """Replace `out` in a process that is killed instead of its rename or deletion `number`; whether it came there."""
    child = os.fork()
    if child == 0:
        done = [0]

        def killed(step):
            def counted(*arguments, **options):
                done[0] += 1
                if done[0] == number:
                    os._exit(9)
                return step(*arguments, **options)

            return counted

        Path.rename, shutil.rmtree = killed(Path.rename), killed(shutil.rmtree)
        with new_folder(out, True) as made:
            (made / "config.json").write_text("new")
            (made / "spts_files.json").write_text(json.dumps({"sha256": {"config.json": sha256(b"new").hexdigest()}}))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_in_the_last_step_leaves_the_old_or_the_new(tmp_path):
    number, found = 1, set()
    while True:
        out = made_here(tmp_path / str(number) / "out")
        if not _killed_at(number, out):
            break
        with pytest.raises(RuntimeError), new_folder(out, True):
            raise RuntimeError  # the next run, which only has to begin
        found.add((out / "config.json").read_text())
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        number += 1
    assert number > 2 and found == {"old", "new"}


def _killed_between_renames(out: Path) -> None:
    """Replacing `out` is killed when the old checkpoint is renamed away and the new one has no name yet."""
    child = os.fork()
    if child == 0:
        whole = Path.rename
        Path.rename = lambda self, target: (whole(self, target), os._exit(9))
        with new_folder(out, True) as new:
            (new / "config.json").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_an_old_checkpoint_comes_back_to_an_empty_folder_too(tmp_path):
    out = made_here(tmp_path / "out")
    before = everything(tmp_path)
    _killed_between_renames(out)
    out.mkdir()  # as a job's script does before it starts a run
    with pytest.raises(RuntimeError), new_folder(out, True):
        raise RuntimeError
    assert everything(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_old_checkpoint_is_deleted_for_a_whole_one_alone(tmp_path):
    out = made_here(tmp_path / "out")
    _killed_between_renames(out)
    made_here(out, "another")  # but extra/x.jinja, which it lists, is not there
    with pytest.raises(UserError, match=r"the old checkpoint is .*old"), new_folder(out, True):
        raise RuntimeError("must not come here")
    assert (tmp_path / ".out.spts-compress/old/config.json").read_text() == "old"
    (out / "extra").mkdir()
    (out / "extra/x.jinja").touch()
    with pytest.raises(RuntimeError), new_folder(out, True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "another" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_hidden_folders_that_are_not_ours_stay(tmp_path):
    (tmp_path / ".out.spts-compress/new").mkdir(parents=True)
    (tmp_path / ".out.spts-compress/new/theirs").touch()
    with pytest.raises(UserError, match="was not made by this toolkit"), new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == [".out.spts-compress", "new", "theirs"]


def test_a_claimed_folder_keeps_what_is_not_ours(tmp_path):
    folder = tmp_path / "a" / "results"
    with claimed(folder, ("bench.json",)), pytest.raises(UserError, match="another run is using this folder"):  # noqa: SIM117
        with claimed(folder, ("bench.md",)):
            pass
    assert not (tmp_path / "a").exists()  # nothing came into it
    for _ in range(2):  # its own may be replaced
        with claimed(folder, ("bench.json",)):
            (folder / "bench.json").touch()
    (folder / "ablation.json").touch()
    with pytest.raises(UserError, match=r"ablation\.json exists and was not made"), claimed(folder, ("ablation.json",)):
        pass
    assert {p.name for p in folder.iterdir()} == {"ablation.json", "bench.json", CLAIM}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written to"), claimed(tmp_path / "file"):
        pass


def test_a_work_folder_loses_only_what_a_kill_left_half_written(tmp_path):
    half = ".proxy-2-0123456789abcdef.safetensors.12.partial", ".base-0123456789abcdef.12.partial"
    (tmp_path / half[0]).touch()
    (tmp_path / half[1]).mkdir()
    theirs = {".notes.partial", ".a.b.partial", ".thesis.12.partial", "lock"}
    for name in theirs:
        (tmp_path / name).write_text(name)
    with Store(tmp_path).lock():
        assert {p.name for p in tmp_path.iterdir()} == {*theirs, CLAIM}
    assert everything(tmp_path) == {name: name for name in theirs}


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"key": "a"}\nmine\n{"key": "b"}\n', b'{"other": 1}\n', b"mine", b'{"key": "a"}\n[1]']
)
def test_a_file_of_answers_that_holds_anything_else_stays(content, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"answers\.jsonl:\d: no answer"):
        Answers(path)
    assert path.read_bytes() == content


def test_a_line_that_a_kill_cut_short_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "answers.jsonl"
    first, second = (json.dumps({"key": key, "answer": "ü"}).encode() for key in "ab")
    for cut in range(len(second)):
        path.write_bytes(first + b"\n" + second[:cut])
        assert set(Answers(path).rows) == {"a"} and path.read_bytes() == first + b"\n"
    path.write_bytes(first + b"\n" + second)  # only its end was cut off
    assert set(Answers(path).rows) == {"a", "b"} and path.read_bytes().endswith(second + b"\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    tiny_checkpoint(folder)
    (folder / "text.jsonl").write_text('{"text": "words"}\n')
    return folder


def recipe_for(folder, output, target):
    data = {
        "model": {"path": str(folder / "base")},
        "calibration": {"source": "files", "path": str(folder / "text.jsonl")},
        "proxy": {"channels": 12, "rank": 4},
        "schedule": {"start": 2, "stages": [{"end": 4, "budget": 24}]},
        "report": {"lengths": [300]},
        "export": {"path": str(output)},
    }
    target.write_text(yaml.safe_dump(data))
    return target


@pytest.mark.parametrize("command", ["evaluate", "ablate", "bench", "strip", "sweep"])
@pytest.mark.parametrize("inside", ["out", "out/results", "other", "other/deep/results", "link"])
def test_results_are_not_written_into_any_checkpoint(command, inside, folder, tmp_path):
    other = shutil.copytree(folder / "out", tmp_path / "other")
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "link").symlink_to(other)
    read = tmp_path / "out"
    if command == "sweep":
        read = recipe_for(folder, tmp_path / "new", tmp_path / "recipe.yaml")
    assert "is in the checkpoint" in invoke(command, read, "--output", tmp_path / inside, code=2)
    for name in ("out", "other"):
        assert "is whole" in invoke("verify", tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == sorted(p.name for p in (folder / "out").iterdir())


@pytest.mark.parametrize("command", ["evaluate", "bench", "sweep"])
@pytest.mark.parametrize("inside", ["base", "base/results"])
def test_results_are_not_written_into_a_base(command, inside, folder, tmp_path):
    read, before = folder / "out", sorted((folder / "base").rglob("*"))
    if command == "sweep":
        read = recipe_for(folder, tmp_path / "new", tmp_path / "recipe.yaml")
    said = invoke(command, read, "--output", folder / inside, code=2)
    assert f"is in the model {folder / 'base'}" in said and f"beside: {folder / 'base'}-results" in said
    assert sorted((folder / "base").rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "name"), [("evaluate", "setting.json"), ("ablate", "ablation.md"), ("bench", "bench.png")]
)
def test_results_replace_no_file_of_others(command, name, folder, tmp_path):
    (tmp_path / name).write_text("mine")
    assert "was not made by this toolkit" in invoke(command, folder / "out", "--output", tmp_path, code=2)
    assert everything(tmp_path) == {name: "mine"}


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": ""}])
def test_a_rank_alone_replaces_no_file_of_others(variables, folder, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bench.md").write_text("mine")
    assert "was not made by this toolkit" in invoke("bench", folder / "out", "--output", tmp_path, code=2)
    assert everything(tmp_path) == {"bench.md": "mine"}


def test_strip_fills_no_folder_of_others(folder, tmp_path):
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock/mine").touch()
    assert "exists; give another --output" in invoke("strip", folder / "out", "--output", tmp_path / "stock", code=2)
    (tmp_path / "stock/mine").unlink()
    invoke("strip", folder / "out", "--output", tmp_path / "stock")  # empty
    base = {p.name: p.read_bytes() for p in (folder / "base").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "stock").iterdir()} == base


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("base", ["--force"], "is or holds an input"),
        (".", ["--force"], "is or holds an input"),
        ("new", ["--work", "new"], "is in the output"),
        ("new", ["--work", "new/work"], "is in the output"),
        ("out", [], "or --force to replace it"),
        ("text.jsonl", ["--force"], "is or holds an input"),
        ("new", ["--work", "base"], "is in the base"),
        ("new", ["--work", "base/work"], "is in the base"),
        ("new", ["--work", "out"], "is in the checkpoint"),
        ("new", ["--work", "out/work"], "is in the checkpoint"),
        ("out/new", [], "is in the checkpoint"),
    ],
)
def test_a_recipe_says_at_its_start_what_is_in_the_way(output, options, message, folder, tmp_path):
    recipe = recipe_for(folder, folder / output, tmp_path / "recipe.yaml")
    options = [option if option.startswith("--") else folder / option for option in options]
    names = sorted(p.name for p in folder.iterdir())
    assert message in invoke("recipe", recipe, *options, code=2)
    assert sorted(p.name for p in folder.iterdir()) == names


@pytest.mark.parametrize(("name", "message"), [("out", "is in the checkpoint"), ("base", "is in the base")])
def test_a_search_writes_into_no_other_folder(folder, tmp_path, name, message):
    recipe, taken = recipe_for(folder, tmp_path / "new", tmp_path / "recipe.yaml"), tmp_path / "new.search"
    shutil.copytree(folder / name, taken)
    edits = [f"model.path={taken if name == 'base' else folder / 'base'}", "schedule=null", "search={speedup: 1.5}"]
    files = sorted(taken.iterdir())
    said = invoke("recipe", recipe, *(word for edit in edits for word in ("--set", edit)), code=2)
    assert f"new, whose search's folder {taken} {message}" in said
    assert sorted(taken.iterdir()) == files


def test_the_working_folder_is_no_recipes_output(folder, tmp_path, monkeypatch):
    recipe = recipe_for(folder, folder / "new", tmp_path / "recipe.yaml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for options in (["--output", "."], ["--set", "export.path=."]):
        assert "error: . is or holds the working folder" in invoke("recipe", recipe, *options, code=2)


def test_a_recipe_inside_the_checkpoint_it_would_replace_stays(folder, tmp_path):
    recipe = recipe_for(folder, folder / "out", folder / "out/recipe.yaml")
    assert "an input of this run, " in invoke("recipe", recipe, "--force", code=2)
    assert recipe.exists()
    recipe.unlink()


@pytest.mark.parametrize("section", ["calibration", "dataset", "report"])
def test_what_a_run_makes_does_not_become_its_text(section, folder, tmp_path):
    (tmp_path / "text").mkdir()
    recipe, text = recipe_for(folder, tmp_path / "text/out", tmp_path / "recipe.yaml"), tmp_path / "text"
    edits = {"calibration": f"calibration.path={text}", "report": f"report.text={text}"}
    edit = ("--set", edits.get(section, f"calibration={{source: dataset, dataset: {text}}}"))
    for place in (
        (),
        ("--output", tmp_path / "text/deep/out"),
        ("--output", tmp_path / "o", "--work", tmp_path / "text"),
    ):
        assert f"is in {tmp_path / 'text'}, all files of which" in invoke("recipe", recipe, *edit, *place, code=2)
    assert not list((tmp_path / "text").iterdir())


def test_an_output_may_lie_in_the_folder_of_the_base_and_be_replaced_there(tmp_path):
    base = made_here(tmp_path / "base")
    out = made_here(base / "out")
    refuse(out, True, [base])
    (base / "link").symlink_to(out)
    with pytest.raises(UserError, match="is or holds an input"):
        refuse(out, True, [base])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_model_without_a_cache_is_not_measured(name, folder, tmp_path):
    for place in ("base", "out"):
        path = folder / place / name
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), "use_cache": False}))
        if place == "base":
            recipe = recipe_for(folder, folder / "new", tmp_path / "recipe.yaml")
            shown = invoke("recipe", recipe, "--dry-run", code=2)
        else:
            shown = invoke("evaluate", folder / "out", "--output", folder / "results", code=2)
            assert not (folder / "results").exists()
        path.write_text(before)
        assert f"{name}: use_cache is false" in shown


def test_a_claim_outlives_a_full_disk(tmp_path, monkeypatch):
    size, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with claimed(tmp_path, ("answers.jsonl", "result.json")):
            (tmp_path / "answers.jsonl").write_text("hours of work")
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # nothing more can be written to any file
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    for _ in range(2):
        with claimed(tmp_path, ("answers.jsonl", "result.json")):
            pass

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        with pytest.raises(UserError, match="no space left on the disk"), claimed(tmp_path, ("other",)):
            pass
    with (tmp_path / CLAIM).open("a") as stream:
        stream.write("cut sho")  # by a kill
    with claimed(tmp_path, ("answers.jsonl", "picture")):
        (tmp_path / "picture").touch()
    assert (tmp_path / CLAIM).read_text().splitlines() == ["answers.jsonl", "picture"]


def test_a_claimed_name_that_was_not_made_is_free_for_others(tmp_path):
    with claimed(tmp_path, ("made", "picture")):
        (tmp_path / "made").write_text("ours")
    with claimed(tmp_path, ("made", "picture")):
        (tmp_path / "made").write_text("ours again")
    (tmp_path / "picture").write_text("theirs")
    with pytest.raises(UserError, match="picture exists and was not made"), claimed(tmp_path, ("made", "picture")):
        pass
    with claimed(tmp_path, ("made",)):
        pass
    assert (tmp_path / "picture").read_text() == "theirs"
