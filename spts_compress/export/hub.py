"""Publishing an exported checkpoint on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from ..utils.errors import UserError
from ..utils.tables import size
from .verify import require

HINTS = {401: "the Hub does not accept this token (401)", 403: "the token has no right to write there (403)"}


def listing(folder: Path) -> str:
    """What would be uploaded, with sizes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return "\n".join(f"{size(p.stat().st_size):>12}  {p.relative_to(folder)}" for p in files)


def need_token() -> None:
    """Raises UserError if there is none."""
    if get_token() is None:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN")


def push(
    folder: Path, repo_id: str, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Upload the folder in one commit and return its address.

    Args:
        revision: branch to upload to, made if it is not there.
        create_pr: propose the commit as a pull request instead of making it.

    Raises:
        UserError: if it is not a whole checkpoint of ours, or the Hub refuses.
    """
    require(folder)
    need_token()
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = "Skip-ready checkpoint (SPTS)"
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=message
        )
    except Exception as error:  # transport errors have no common type across versions of the client
        first = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        status = first.response.status_code if isinstance(first, HfHubHTTPError) and first.response is not None else 0
        reason = HINTS.get(status) or (str(first) or type(first).__name__).splitlines()[0]
        raise UserError(f"{repo_id}: not uploaded: {reason}") from error
    return str(done)
