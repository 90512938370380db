"""Publishing an exported checkpoint on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from .errors import UserError
from .tables import size
from .verify import verify


def listing(folder: Path) -> str:
    """What would be uploaded, with sizes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return "\n".join(f"{size(p.stat().st_size):>12}  {p.relative_to(folder)}" for p in files)


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload the folder in one commit and return its address.

    Raises:
        UserError: if it is not a whole checkpoint of ours, or the Hub refuses.
    """
    if faults := verify(folder):
        raise UserError("\n".join(f"{folder}: {fault}" for fault in faults))
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Skip-ready checkpoint (SPTS)"
        )
    except LocalTokenNotFoundError:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # transport errors have no common type across versions of the client
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{repo_id}: not uploaded: {reason}") from error
    return str(done)
