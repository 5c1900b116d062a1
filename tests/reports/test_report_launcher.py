"""`launchers/report.py`, run as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_helpers import result

import launchers.report
from launchers.report import main
from trainer.evaluation.ranking import Estimate
from trainer.reports.results import append


def write(folder: Path, value: float = 0.3, **values: Any) -> None:
    metrics = {name: Estimate(value, value, value) for name in ("NDCG@10", "HR@10", "NDCG@20", "HR@20")}
    append(folder / "results.jsonl", result(0.0, **{"run": folder.name, "users": 100, "metrics": metrics, **values}))


def fails_with(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", 0.25)
    write(tmp_path / "b", 0.75)
    write(tmp_path / "b", 0.625, split="valid")
    write(tmp_path / "b", 0.125, candidates="full")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main([a, b, b]) == 0
    out = capsys.readouterr().out
    assert "LLM-SRec (a)" in out
    assert "0.2500" in out
    assert "0.7500" in out
    assert "0.6250" not in out
    assert "0.1250" not in out

    assert main([b, "--split", "valid", "--metrics", "HR@20,HR@10", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| system | users | HR@20 | shuffled | change | HR@10 |" in out
    assert "0.6250" in out

    assert main([b, "--candidates", "full"]) == 0
    assert "0.1250" in capsys.readouterr().out


def test_a_missing_or_empty_file_names_the_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a"
    cure = f"`llm-srec evaluate {run} --split test`\n"
    error = fails_with(capsys, str(run))
    assert "results.jsonl does not exist" in error
    assert error.endswith(cure)

    run.mkdir()
    (run / "results.jsonl").touch()
    error = fails_with(capsys, str(run))
    assert "no test results with sampled candidates" in error
    assert error.endswith(cure)

    write(run)
    assert "no valid results" in fails_with(capsys, str(run), "--split", "valid")


def test_one_missing_run_among_others_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a")
    assert f"{tmp_path / 'b'}" in fails_with(capsys, str(tmp_path / "a"), str(tmp_path / "b"))


def test_an_unreadable_line_or_metric_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a")
    assert "no result has HR@3" in fails_with(capsys, str(tmp_path / "a"), "--metrics", "HR@3")
    (tmp_path / "a" / "results.jsonl").write_text('{"version": 9}\n')
    assert "format version 9" in fails_with(capsys, str(tmp_path / "a"))


def test_two_folders_with_one_run_name_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", run="exp")
    write(tmp_path / "b", run="exp")
    assert "both hold LLM-SRec run 'exp'" in fails_with(capsys, str(tmp_path / "a"), str(tmp_path / "b"))


def test_it_starts_without_torch_and_warns_on_stderr(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with (tmp_path / "a" / "results.jsonl").open("a") as file:
        file.write('{"version": 1, "ru')
    program = (
        "import sys, launchers.report as report; status = report.main(sys.argv[1:]); "
        "sys.exit('torch imported' if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        cwd=Path(launchers.report.__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Scientific")
    assert done.stderr == f"WARNING: {tmp_path / 'a' / 'results.jsonl'}:2: damaged line of 18 bytes skipped\n"


def test_runs_of_one_name_cannot_be_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parent, system in (("a", "sasrec"), ("b", "gru4rec")):
        write(tmp_path / parent / "run", system=system)
    paths = [str(tmp_path / parent / "run") for parent in ("a", "b")]
    assert "same folder name" in fails_with(capsys, *paths, "--against", paths[0])
