"""Results survive crashes, and nothing in them is skipped silently."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.ranking import Estimate
from trainer.reports.results import Result, append, latest, read, utc_now

RESULT = Result(
    run="llm_srec-1",
    system="LLM-SRec",
    dataset="Scientific",
    dataset_fingerprint="9f2c",
    config_hash="a1b2",
    commit="0123abc",
    split="test",
    task="retrieval",
    candidates="sampled",
    num_candidates=100,
    history="original",
    tie="expectation",
    step=1200,
    users=27_601,
    metrics={"NDCG@10": Estimate(0.3388, 0.3351, 0.3425), "HR@10": Estimate(0.5, 0.4941, 0.506)},
    seconds=812.5,
    tokens=12_345_678,
    peak_memory_bytes=41_000_000_000,
    device="NVIDIA RTX A6000",
    created="2025-03-08T12:00:00+00:00",
)


def changed(**values: Any) -> Result:
    return replace(RESULT, **values)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "results.jsonl"
    second = changed(step=1300, run="Übung “1”\n", num_candidates=None, candidates="full")
    append(path, RESULT)
    append(path, second)
    assert read(path) == [RESULT, second]
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["metrics"]["HR@10"] == {"value": 0.5, "low": 0.4941, "high": 0.506}


def test_a_cut_line_damages_itself_alone_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    append(path, RESULT)
    whole = path.read_bytes()
    length = len(whole) // 2
    # Cuts after the first byte of the second line, in its middle, and just before its brace.
    for cut in (1, length // 2, length - 2):
        path.write_bytes(whole[: length + cut])
        append(path, changed(step=7))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read(path) == [RESULT, changed(step=7)]
        assert [record.getMessage() for record in caplog.records] == [f"{path}:2: damaged line of {cut} bytes skipped"]


def test_a_line_that_lost_only_its_newline_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    path.write_bytes(path.read_bytes()[:-1])
    append(path, changed(step=7))
    assert read(path) == [RESULT, changed(step=7)]
    assert not caplog.records


@pytest.mark.parametrize("damage", [b"12", b'"text"', b"[1]", b"[" * 100_000, b"\xff\xfe{", b"null"])
def test_lines_that_are_not_objects_are_damaged(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(damage + b"\n\n")
    assert read(path) == []
    assert f"{path}:1: damaged line" in caplog.text


def rewrite(path: Path, **values: Any) -> None:
    append(path, RESULT)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}) + "\n")


def test_unknown_fields_are_an_error_that_names_the_version(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rewrite(path, version=5, energy_joules=3)
    with pytest.raises(
        ValueError,
        match=r"results\.jsonl:1: unknown field energy_joules: written in format version 5, .* version 4",
    ):
        read(path)


def test_results_from_before_tasks_existed_are_retrieval(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "task"}
    path.write_text(json.dumps(old | {"version": 1}) + "\n")
    assert read(path) == [RESULT]


def test_results_from_before_lists_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    new = json.loads(path.read_text())
    old = {key: value for key, value in new.items() if key not in ("totals", "later_training")}
    path.write_text(json.dumps(old | {"version": 3}) + "\n")
    assert read(path) == [RESULT]


@pytest.mark.parametrize("values", [{"totals": {"coverage@10": float("nan")}}, {"later_training": float("inf")}])
def test_totals_that_are_not_finite_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not finite"):
        changed(**values)


def test_missing_fields_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"version": 0, "run": "a"}\n')
    with pytest.raises(ValueError, match=r":1: missing field candidates, .*version 0"):
        read(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "train"}, "split: Input should be 'valid' or 'test'"),
        ({"metrics": {"HR@10": {"value": 0.5}}}, r"metrics\.HR@10\.low: Field required"),
        (
            {"metrics": {"HR@10": {"value": "0.5", "low": 0, "high": 1}}},
            r"HR@10\.value: Input should be a valid",
        ),
        ({"metrics": [1]}, "metrics: Input should be a"),
        ({"created": "yesterday"}, "yesterday"),
    ],
)
def test_wrong_values_name_the_line(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rewrite(path, **values)
    with pytest.raises(ValueError, match=rf"results\.jsonl:1: .*{message}"):
        read(path)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="HR@10 is not finite"):
        changed(metrics={"HR@10": Estimate(broken, 0.0, 1.0)})


@pytest.mark.parametrize("created", ["2025-03-08T12:00:00", "2025-03-08T12:00:00+01:00"])
def test_times_are_utc(created: str) -> None:
    with pytest.raises(ValueError, match="must be in UTC"):
        changed(created=created)
    assert changed(created=utc_now()).created > "2025"


def test_a_missing_file_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "results.jsonl")


def test_latest_is_the_newest_of_each_kind() -> None:
    newer = changed(step=2, created="2025-03-08T12:00:01+00:00")
    # Same instant as `newer`, written with Z; the later one in the file counts.
    newest = changed(step=3, created="2025-03-08T12:00:01Z")
    others = [
        changed(history="shuffled"),
        changed(split="valid"),
        changed(candidates="full"),
        changed(num_candidates=20),
        changed(tie="optimistic"),
        changed(run="b"),
        changed(system="SASRec"),
        changed(dataset_fingerprint="ffff"),
    ]
    assert latest([RESULT, newer, newest, *others]) == [newest, *others]
    assert latest([newest, *others, RESULT]) == [newest, *others]
    assert latest([]) == []
