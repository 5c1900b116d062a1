"""The job folder: everything that a submitted job depends on, so that later edits do not affect it.

FOLDER/code/       copies of the packages, and their commit
FOLDER/N.yaml      the resolved configuration of run N: one run, or those of a sweep
FOLDER/runs.txt    their run folders, one per line
FOLDER/job.env     interpreter, container and accelerator; read by the shell
FOLDER/command.txt how the job was submitted
FOLDER/*.out       what the job prints
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import RunConfig, built_on, dump_config
from trainer.runs.commit import COMMIT_FILE, git_commit

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the packages that a job copies."""
_PACKAGES = ("trainer", "shards", "launchers", "ds_configs")


@dataclass(frozen=True)
class Cluster:
    """Nodes of a kind of cluster; sites differ, so every value can be overridden by an option."""

    gres: str
    """Slurm's name of the devices, as in `--gres=gpu:4`."""
    devices: int
    """Devices per node."""
    cpus: int
    """CPU cores per rank."""
    accelerator: str
    """DeepSpeed's name of the accelerator."""


CLUSTERS = {"a6000": Cluster("gpu", 4, 8, "cuda"), "gaudi": Cluster("hpu", 8, 16, "hpu")}


@dataclass(frozen=True)
class Job:
    """A job to submit: its folder, the runs in it and the sbatch command."""

    folder: Path
    configs: tuple[RunConfig, ...]
    """Configurations with absolute paths, in the order of the job array."""
    environment: Mapping[str, str]
    """Content of `job.env`."""
    command: tuple[str, ...]

    def files(self) -> dict[str, str]:
        """Contents of all files beside the code, by name."""
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        files = {}
        for index, config in enumerate(self.configs):
            engine = config.engine
            if engine.deepspeed.endswith(".json"):  # a file of the user's, which may change: copied too
                files[name := f"{index}.deepspeed.json"] = Path(engine.deepspeed).read_text(encoding="utf-8")
                engine = engine.model_copy(update={"deepspeed": str(self.folder / name)})
            files[f"{index}.yaml"] = dump_config(config.model_copy(update={"engine": engine}))
        return files | {
            "runs.txt": "".join(f"{config.output}\n" for config in self.configs),
            "job.env": "".join(lines),
            "command.txt": shlex.join(self.command) + "\n",
        }


def submit(job: Job, after: str | None = None) -> str:
    """Write the job folder and call sbatch; returns the job id.

    Args:
        after: id of a job that has to end first, however it ends: a run whose sources failed says so itself.

    Raises:
        OSError: sbatch does not exist here, or rejected the job; the job folder is then removed.
    """
    if shutil.which("sbatch") is None:
        raise OSError(
            "sbatch is not on this machine: submit from a login node of the cluster, or preview with --dry-run"
        )
    write(job)
    name, *words = job.command
    command = [name, *([f"--dependency=afterany:{after}"] if after else []), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(job.folder)
        raise OSError(f"sbatch rejected the job: {done.stderr.strip()}; nothing was submitted")
    return done.stdout.strip().split(";")[0]  # "123" or "123;cluster"


def preview(job: Job) -> str:
    """Text of what `submit` would write and run."""
    parts = [f"would write {job.folder}/ with a copy of {ROOT} as code/, and\n"]
    return "".join([*parts, *(f"\n--- {name}\n{text}" for name, text in job.files().items())])


def write(job: Job) -> None:
    """Write the job folder.

    Raises:
        FileExistsError: another job for the same run was submitted at the same moment.
    """
    job.folder.mkdir(parents=True)
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, job.folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (job.folder / "code" / COMMIT_FILE).write_text(git_commit(ROOT) + "\n")
    for name, text in job.files().items():
        (job.folder / name).write_text(text, encoding="utf-8")


def mounts(base: Path, configs: Sequence[RunConfig]) -> str:
    """Folders to mount into a container at their own paths, in the syntax of Apptainer and pyxis."""
    folders = {base}
    for config in configs:
        folders |= {config.data.path, *built_on(config.system).values()}
        sections = [getattr(config.system, name, None) for name in ("llm", "encoder")]
        paths = [getattr(section, key, None) for section in sections for key in ("path", "title_store")]
        folders |= {Path(path) for path in paths if path and Path(path).is_absolute()}  # others are hub ids
    return ",".join(f"{folder}:{folder}" for folder in sorted(folders))
