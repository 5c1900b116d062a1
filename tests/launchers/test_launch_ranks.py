"""Several ranks: the real `deepspeed` launcher, and an error that is reported once."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_command, sasrec_config, write_config
from launch_helpers import Trained, one_error

from trainer.reports.results import read
from trainer.runs.launch_env import free_port

pytestmark = pytest.mark.process


def test_two_ranks_through_deepspeed_equal_one_process(srec: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", "2", "--master_port",
            str(free_port()), str(ROOT / "launchers/train.py"), str(srec.preset), f"output={run}",
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    def losses(folder: Path) -> list[float]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [record["train/loss"] for record in records if "train/loss" in record]

    assert losses(run) == pytest.approx(losses(srec.output), rel=1e-4)
    assert [(r.history, r.users) for r in read(run / "results.jsonl")] == [("original", 61), ("shuffled", 61)]
    # Only rank 0 logs and prints the table; with --quiet the launcher adds nothing.
    log = (run / "log.txt").read_text().splitlines()
    assert ", 2 rank(s), " in log[0]
    assert done.stderr.splitlines() == log
    assert done.stdout.lstrip().startswith("world · test split")
    assert not re.findall(r"\[(?:DEBUG|INFO|WARNING|ERROR)\]", done.stdout), "lines of DeepSpeed"


@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_all_ranks_is_reported_once(srec: Trained, world: Path, tmp_path: Path, late: bool) -> None:
    """Early: found in the preflight. Late: a flipped byte, which only rank 0 checks for."""
    word = "system.teacher=/nowhere"
    if late:
        data = Path(shutil.copytree(world, tmp_path / "data"))
        shard = next(data.rglob("*.tar"))
        damaged = bytearray(shard.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        shard.write_bytes(bytes(damaged))
        word = f"data.path={data}"
    port = str(free_port())
    processes = []
    for rank in ("0", "1"):
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [
            sys.executable,
            str(ROOT / "launchers/train.py"),
            str(srec.preset),
            f"output={tmp_path / 'run'}",
            word,
        ]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    (out, err), others = (process.communicate(timeout=120) for process in processes)
    assert ("is damaged" if late else "is not a run folder") in one_error(processes[0].returncode, out, err)
    assert others == ("", "")
    assert processes[1].returncode == 2
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_run_uses_is_named(world: Path, tmp_path: Path) -> None:
    preset = write_config(tmp_path / "preset.yaml", sasrec_config(world, tmp_path / "run"))
    with socket.socket() as other_run:
        other_run.bind(("", 0))
        other_run.listen()
        port = str(other_run.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_command("launchers/train.py", preset, env=ranks)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"error: the ranks cannot connect at 127.0.0.1:{port}" in done.stderr
    assert "--master_port" in done.stderr
