"""Push an export to the Hugging Face hub. `HF_ENDPOINT` names another hub, `HF_TOKEN` the token."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from trainer.config import ConfigError
from trainer.runs.exported import is_export

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", re.ASCII)


def check_repository(name: str) -> None:
    """Check the form of a repository's name before anything is written; the hub has the last word.

    Raises:
        ConfigError: it is not `OWNER/NAME`.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"--push {name}: write OWNER/NAME, in letters, digits, -, _ and .")


def listing(folder: Path) -> list[tuple[str, int]]:
    """Files that `push` uploads, by their path in the repository, and their bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an export in one commit; returns its address. Files that the repository has besides are kept.

    Args:
        private: whether to make the repository private if it does not exist.

    Raises:
        ValueError: not an export, no token, or the hub refuses.
        OSError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if not is_export(folder):
        raise ConfigError(f"{folder} is not an export: make one with `llm-srec export RUN {folder}`")
    for client in ("httpx", "httpx2"):  # by release of huggingface_hub; they log a line per request
        logging.getLogger(client).setLevel(logging.WARNING)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of llm-srec-trainer")
        )
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: {error}") from None
    except LocalTokenNotFoundError:
        raise ConfigError("the hub wants a token: set HF_TOKEN, or run `hf auth login`") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        cure = "; set HF_TOKEN to a token that may write there" if status in (401, 403) else ""
        raise ConfigError(f"the hub refused {repository} (HTTP {status}): {str(error).splitlines()[0]}{cure}") from None
    except Exception as error:
        # The hub's client is built on httpx, httpx2 or requests, depending on its version.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise OSError(f"the hub at {api.endpoint} cannot be reached ({error}): try again later") from None
