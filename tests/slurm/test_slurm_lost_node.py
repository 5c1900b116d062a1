"""Slurm loses a node whose processes keep running: the job restarts elsewhere, and its first ranks are ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import sasrec_config, write_config
from local_cluster import LocalCluster, install, local_cluster
from slurm_helpers import submit


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster of its own, because one node will be lost."""
    if reason := install():
        pytest.skip(reason)
    with local_cluster(tmp_path / "lost", nodes=2) as running:
        yield running


def ranks(run: Path) -> list[int]:
    """Processes on any node that train this run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        trains = any(word.endswith(b"launchers/train.py") for word in words)
        if trains and any(str(run).encode() in word for word in words):
            found.append(int(file.parent.name))
    return found


def test_ranks_of_the_first_start_are_ended(cluster: LocalCluster, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = sasrec_config(world, run, epochs=100000, patience=100000, validate_every=1000, save_every=20)
    job = submit(cluster, "a6000", write_config(tmp_path / "sasrec.yaml", config), "--per-node=1")
    cluster.wait((run / "metrics.jsonl").is_file, "first step")
    first, node = ranks(run), cluster.facts(job.number)["NodeList"]
    assert len(first) == 1
    cluster.lose_slurmd(node)
    owner = run / "slurm/owner"
    cluster.wait(lambda: owner.read_text().strip() == f"{job.number}.1", "second start")
    cluster.wait(lambda: first[0] not in ranks(run), "end of the first start's rank", 20)
    cluster.wait(lambda: "resuming from step" in (run / "log.txt").read_text(), "second start's first step")
    assert cluster.facts(job.number)["NodeList"] != node
    assert len(ranks(run)) == 1
    cluster.run("scancel", job.number)
    assert cluster.wait_end(job.number) == "CANCELLED"
