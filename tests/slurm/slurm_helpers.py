"""Submission with the project's own command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from helpers import run_command
from local_cluster import LocalCluster

# --cpus-per-task: ranks have one thread in tests. Each --sbatch is passed to sbatch as is.
SMALL = ("--cpu", "--cpus-per-task=1", "--time=60")


@dataclass(frozen=True)
class Submitted:
    """A job, and the folder that submit.py wrote for it."""

    number: str
    folder: Path

    def output(self) -> str:
        """What its batch script and ranks printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))


def submit(cluster: LocalCluster, kind: str, preset: Path, *words: str) -> Submitted:
    """`submit.py KIND PRESET WORDS...` with ranks on CPUs."""
    done = run_command("launchers/slurm/submit.py", kind, preset, *SMALL, *words, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    head, folder = done.stdout.strip().rsplit(" ", 1)  # "job 3: 1 run(s), output in /.../slurm/20260101-000000/"
    return Submitted(head.removeprefix("job ").split(":")[0], Path(folder))


def losses(run: Path) -> list[float]:
    """The training loss of each logged step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]
