"""One process at a time trains in a run folder.

The lock is the kernel's (`flock` on `RUN/lock`), so that it is gone however its holder ends; the content of the file
names the holder. Where a file system has no locks, the content decides, and who ended without removing it must be known
to be gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from trainer.config.load import ConfigError
from trainer.runs.folder import RunFolder

_PATIENCE = 2.0
"""Seconds that a holder gets which is just ending."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""


def _slurm_start() -> str:
    """Slurm's job and how often it was restarted, such as `1234.0`; empty outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT') or 0}" if job else ""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run folder."""

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    slurm_start: str = field(default_factory=_slurm_start)

    def __str__(self) -> str:
        job = f" (Slurm job {self.slurm_start.split('.')[0]})" if self.slurm_start else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def is_earlier_start_of_this_job(self) -> bool:
        """Whether Slurm has given it up: launchers/slurm/rank.sh ends it, even if a lost node still holds its lock."""
        here = _slurm_start()
        return bool(here) and here != self.slurm_start and here.split(".")[0] == self.slurm_start.split(".")[0]

    def has_ended(self) -> bool:
        """Whether it surely runs no more; what runs on another host is not known."""
        return self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists()


class RunLock:
    """Holds a run folder while the context is active; makes the folder if there is none."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._file: IO[str] | None = None
        self._device = 0
        """Device of the folder, not of the lock: on overlay file systems those of files are others."""

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ConfigError: another process trains in this folder; the message names it.
        """
        self._file = self._take()
        self._device = self._run.path.stat().st_dev
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        if _is_at(self._file, self._run.lock):
            self._run.lock.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # a refused run leaves nothing behind: only an empty folder can be removed
            self._run.path.rmdir()

    def taken_again(self) -> bool:
        """Whether the folder was removed since the lock was taken; it is made and locked again.

        Raises:
            ConfigError: another process has begun a run there meanwhile, or the file system is gone.
        """
        assert self._file is not None
        if _is_at(self._file, self._run.lock):
            return False
        if _device(self._run.path) != self._device:
            # Otherwise the run would go on below the mount point, on a disk of this node.
            raise ConfigError(
                f"the file system of {self._run.path} is no longer mounted: mount it, and the same command resumes "
                "from the last checkpoint"
            )
        try:
            file = self._take()
        except ConfigError as error:
            raise ConfigError(f"this run's folder was removed while it trained: {error}") from None
        self._file.close()
        self._file = file
        return True

    def _take(self) -> IO[str]:
        end = time.monotonic() + _PATIENCE
        while True:
            file = _open(self._run)
            holder = _holder(file)
            if _try_lock(file, holder):
                # Whoever held it before may have removed the file after it was opened here.
                if _is_at(file, self._run.lock):
                    return _signed(file)
                end = time.monotonic() + _PATIENCE
            file.close()
            if time.monotonic() > end:
                raise _refusal(self._run, holder)
            time.sleep(0.05)


def check_not_locked(run: RunFolder) -> None:
    """Refuse a run that another process trains, before anything expensive starts. Writes nothing.

    Raises:
        ConfigError: the message names the process.
    """
    try:
        file = run.lock.open()
    except OSError:
        return
    with file:
        holder = _holder(file)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: all ranks of a start may look at once
        except BlockingIOError:
            if holder is None or not holder.is_earlier_start_of_this_job():
                raise _refusal(run, holder) from None
        except OSError:
            return  # no locks here: `RunLock` decides


def _open(run: RunFolder) -> IO[str]:
    while True:
        run.path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # a refused run has just removed the empty folder
            return run.lock.open("a+")


def _try_lock(file: IO[str], holder: Holder | None) -> bool:
    """Lock the file if nobody else holds it."""
    if holder and holder.is_earlier_start_of_this_job():
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return holder is None or holder.has_ended()
    return True


def _signed(file: IO[str]) -> IO[str]:
    file.truncate(0)
    file.write(json.dumps(asdict(Holder())))
    file.flush()
    os.fsync(file.fileno())  # for readers on other hosts
    return file


def _holder(file: IO[str]) -> Holder | None:
    """Who signed the file; None: nobody, or somebody is signing it."""
    file.seek(0)
    try:
        return Holder(**json.load(file))
    except (ValueError, TypeError):
        return None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:  # removed; on a network file system, possibly by another host
        return False


def _device(folder: Path) -> int:
    """The device of a folder, or of the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _refusal(run: RunFolder, holder: Holder | None) -> ConfigError:
    return ConfigError(
        f"{run.path} is being trained by {holder or 'another process'}: wait for it, end it, or choose another output; "
        f"if it no longer exists, remove {run.lock}"
    )
