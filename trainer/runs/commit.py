"""The source version that a process runs, and the libraries that compute with it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Final

COMMIT_FILE: Final = "COMMIT"
"""File with the commit in a copy of the source tree that is not a git repository, such as a cluster job's."""

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = (
    "torch", "transformers", "tokenizers", "peft", "numpy", "liger-kernel", "flash-attn",
    "habana-torch-plugin",
)  # fmt: skip


def git_commit(root: Path = _REPOSITORY) -> str:
    """Commit of this source tree, with "+dirty" appended if tracked files differ; "unknown" outside git."""
    if (root / COMMIT_FILE).is_file():
        return (root / COMMIT_FILE).read_text().strip()
    # A source tree installed inside a different repository must not report the commit of that repository.
    if _git(root, "rev-parse", "--show-prefix") != "":
        return "unknown"
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return "unknown"
    return commit + ("+dirty" if changes else "")


def software(package: Path = _PACKAGE) -> dict[str, str]:
    """What computed a number: the digest of the trainer's source files, and the versions of the libraries under it.

    Unlike the commit, the digest also tells uncommitted changes apart, and is known outside git.
    """
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return {"trainer": digest.hexdigest()} | {name: _version(name) for name in _LIBRARIES}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
