"""Publishing an exported checkpoint on the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..checkpoint.layout import FREE, MANIFEST, all_files, may_be_read, read_json
from ..utils.errors import UserError, reason, some
from ..utils.tables import size
from .verify import require

HINTS = {401: "the Hub does not accept this token (401)", 403: "the token has no right to write there (403)"}


def listing(folder: Path) -> str:
    """What would be uploaded, with sizes, and what of the folder would not.

    Raises:
        UserError: if it is no checkpoint of ours.
    """
    names = _uploaded(folder)
    lines = [f"{size((folder / name).stat().st_size):>12}  {name}" for name in names]
    return "\n".join(lines + [f"{'left out':>12}  {name}" for name in all_files(folder) if name not in names])


def _uploaded(folder: Path) -> list[str]:
    """Names of the folder's files that the export, or a command of this toolkit, has made."""
    listed = read_json(folder / MANIFEST).get("sha256") or ()
    return [name for name in all_files(folder) if (name in listed or name in FREE) and (folder / name).is_file()]


def need_token() -> None:
    """Raises UserError if there is none."""
    if get_token() is None:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN")


def check_target(repo_id: str, private: bool) -> None:
    """Raises UserError if a push to the repository's main branch would be refused for what can be seen now."""
    need_token()
    with _faults_named(repo_id):
        try:
            target = HfApi().model_info(repo_id)
        except RepositoryNotFoundError:  # it will be created
            return
        _refuse(target, repo_id, private)


def push(
    folder: Path, repo_id: str, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Upload the checkpoint's files in one commit, which also removes what else a loader might read there, and return
    what was removed and the commit's address.

    Args:
        revision: branch to upload to; if it is not there, made of the first commit, which on the Hub holds nothing, so
            that a push that was stopped leaves no copies of others' files, and can be done again.
        create_pr: propose the commit as a pull request instead of making it.

    Raises:
        UserError: if it is not a whole checkpoint of ours, the repository holds files of others, is public though it
            should be private, or the Hub refuses.
    """
    if create_pr and revision is not None:
        raise UserError("--create-pr is a request to change the main branch; leave out --revision")
    require(folder)
    need_token()
    api, names = HfApi(), _uploaded(folder)
    with _faults_named(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_new = revision is not None and revision not in {ref.name for ref in api.list_repo_refs(repo_id).branches}
        if revision is not None and is_new:
            first = api.list_repo_commits(repo_id)[-1].commit_id
            api.create_branch(repo_id, branch=revision, revision=first)
        target = api.model_info(repo_id, revision=revision)
        _refuse(target, repo_id, private, any_files=create_pr or is_new)
        there = [file.rfilename for file in target.siblings or ()]
        gone = [name for name in there if name not in names and (name in FREE or may_be_read(name))]
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message="Skip-ready checkpoint (SPTS)",
            revision=revision,
            create_pr=create_pr,
            parent_commit=target.sha,  # what was looked at
        )
    return "\n".join([*(f"removed there: {name}" for name in gone), done.pr_url or done.commit_url])


def _refuse(target: Any, repo_id: str, private: bool, any_files: bool = False) -> None:
    """Raises UserError if a push may not go to the repository that `target` is the Hub's description of.

    Args:
        any_files: whether it may hold what was not pushed by this toolkit, since nothing of it would be lost.
    """
    if private and not target.private:
        raise UserError(f"{repo_id}: is public, not private; make it private on the Hub, or give another repository")
    names = {file.rfilename for file in target.siblings or ()} - {".gitattributes"}
    if names and MANIFEST not in names and not any_files:
        raise UserError(
            f"{repo_id}: holds files of others: {some(names)}; give another repository, or push with a new --revision "
            "or with --create-pr"
        )


@contextmanager
def _faults_named(repo_id: str) -> Iterator[None]:
    """Raises UserError, in one line, for whatever the Hub's client raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transport errors have no common type across versions of the client
        first = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        status = first.response.status_code if isinstance(first, HfHubHTTPError) and first.response is not None else 0
        raise UserError(f"{repo_id}: not uploaded: {HINTS.get(status) or reason(first)}") from error
