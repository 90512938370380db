"""Publishing an exported checkpoint on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .checkpoint import read_config
from .errors import UserError


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload the folder in one commit and return its address.

    Raises:
        UserError: if it is not a checkpoint of ours, or the Hub refuses.
    """
    read_config(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Skip-ready checkpoint (SPTS)"
        )
    except LocalTokenNotFoundError:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{repo_id}: the Hub refused: {str(error).splitlines()[0]}") from None
    return str(done)
