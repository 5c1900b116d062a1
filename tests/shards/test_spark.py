"""Builds by Spark, the real engine in local mode, give the bytes of a build in one process."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shards_helpers import all_bytes, options, titles_of, write_csv
from test_out_of_core import events_of_many

from shards.__main__ import main
from shards.build import build, prepare
from shards.manifest import DatasetError
from shards.partitions.spark import SparkEngine, spark_session
from shards.partitions.temporal import TemporalSplit
from shards.readers.reviews import read_events
from shards.readers.sources import Columns

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    with spark_session("local[2]") as session:
        yield session


@pytest.mark.parametrize(
    "temporal",
    [
        TemporalSplit(quantile=0.7, target="random"),
        TemporalSplit(quantile=0.7, target="successive", validation="by-user", validation_users=7),
    ],
    ids=["by-time", "by-user"],
)
def test_spark_gives_the_same_bytes(tmp_path: Path, spark: Any, temporal: TemporalSplit) -> None:
    events = events_of_many()
    paths = tuple(write_csv(tmp_path / f"{part}.csv", events[part::3]) for part in range(3))
    titles = titles_of(events[:1])
    meta = write_csv(tmp_path / "meta.csv", [(item, title, "") for item, title in titles.items()], "item,title,brand")
    common: dict[str, Any] = {"source": "table", "missing_title": "official", "bad_times": "drop"}
    given = options(
        paths,
        meta,
        **common,
        temporal=temporal,
        iterate=True,
        min_item=10,
        min_train=2,
        user_fraction=0.8,
    )
    ours = build(tmp_path / "local", given)
    theirs = build(tmp_path / "spark", given, spark=spark)
    assert theirs.fingerprint == ours.fingerprint
    assert all_bytes(tmp_path / "spark") == all_bytes(tmp_path / "local")


def test_bad_input_is_named_as_in_one_process(tmp_path: Path, spark: Any) -> None:
    bad = write_csv(tmp_path / "r.csv", events_of_many())
    broken = tmp_path / "broken.csv"
    broken.write_text("user,item\na,b\n")
    for given in (
        options(bad, source="table", missing_title="official"),
        options((bad, broken), source="table", missing_title="official"),
        options(bad, source="table", bad_times="drop"),
    ):
        with pytest.raises(DatasetError) as ours:
            build(tmp_path / "out", given)
        with pytest.raises(DatasetError) as theirs:
            build(tmp_path / "out", given, spark=spark)
        assert str(theirs.value) == str(ours.value)
    assert not (tmp_path / "out").exists()


def test_notes_and_relative_paths(
    tmp_path: Path, spark: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_csv(tmp_path / "r.csv", events_of_many())
    monkeypatch.chdir(tmp_path)
    given = options(Path("r.csv"), source="table", missing_title="official", bad_times="drop", columns=Columns())
    with caplog.at_level(logging.INFO):
        prepare(given, SparkEngine(spark))
    assert [line for line in caplog.messages if "r.csv: times read as ms by their size" in line]


def test_a_failing_task_is_one_line(tmp_path: Path, spark: Any) -> None:
    read = partial(read_events, "table", columns=Columns(), user_fraction=1.0, seed=0)
    paths = (write_csv(tmp_path / "r.csv", events_of_many()),)
    parts, _ = SparkEngine(spark).partitioned(read, paths, 0, Counter(), None)

    def fail(_: Any) -> int:
        raise RuntimeError("the disk of an executor is full")

    for results in (parts.each(fail), parts.stream(fail)):
        with pytest.raises(DatasetError) as error:
            list(results)
        assert str(error.value) == "Spark failed: RuntimeError: the disk of an executor is full"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"ties": "file"}, "--ties file"),
        ({"columns": Columns(time_unit="order")}, "--time-unit order"),
        ({"user_sample": "official", "user_fraction": 0.5}, "--user-sample official"),
        ({"source": "recbole"}, "--source recbole"),
    ],
)
def test_what_depends_on_the_order_of_files_is_refused(tmp_path: Path, changes: dict[str, Any], option: str) -> None:
    given = options(write_csv(tmp_path / "r.csv", events_of_many()), **{"source": "table", **changes})
    session: Any = SimpleNamespace(sparkContext=None)  # refused before it is used
    with pytest.raises(DatasetError, match=f"{option} reads all files in order"):
        build(tmp_path / "out", given, spark=session)


def test_options_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews = write_csv(tmp_path / "r.csv", events_of_many())
    command = ["build", str(tmp_path / "out"), "--source", "table", "--reviews", str(reviews)]
    assert main([*command, "--spark-master", "spark://host:7077"]) == 2
    assert "--spark-master is not for --engine local" in capsys.readouterr().err
    assert main([*command, "--engine", "spark", "--workers", "2"]) == 2
    assert "--workers is not for --engine spark" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert main([*command, "--engine", "spark"]) == 2
    assert "--engine spark needs " in capsys.readouterr().err
