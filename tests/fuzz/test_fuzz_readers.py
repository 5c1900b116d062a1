"""Review files that were mutated at random: a build ends well or in one line with exit code 2, whatever they hold.

`corpus/readers` has the files that once ended in something else. More examples: `FUZZ=2000 pytest tests/fuzz`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated

from shards.__main__ import main

CORPUS = Path(__file__).parent / "corpus" / "readers"
bounded = settings(
    deadline=None, max_examples=int(os.environ.get("FUZZ", "12")), derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip

EVENTS = [(f"u{n % 6}", f"i{(n * 7 + n // 6) % 20}", 1_600_000_000 + 1000 * n) for n in range(60)]


def lines(rows: list[str]) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def parquet() -> bytes:
    user, item, time = (list(column) for column in zip(*EVENTS, strict=True))
    sink = io.BytesIO()
    pl.DataFrame({"user": user, "item": item, "time": time}).write_parquet(sink)
    return sink.getvalue()


AMAZON = lines([json.dumps({"user_id": u, "parent_asin": i, "timestamp": 1000 * t, "rating": 5}) for u, i, t in EVENTS])
TITLES = lines([json.dumps({"parent_asin": f"i{n}", "title": f"Title &amp; {n}"}) for n in range(20)])
TABLE = lines(["user,item,time", *(f"{u},{i},{t}" for u, i, t in EVENTS)])
SMALL = ["--min-user", "1", "--min-item", "1", "--min-train", "2", "--negatives", "1", "--title-negatives", "1"]
PLAIN = ["--missing-title", "official", *SMALL]
Options = tuple[str, str, bytes, list[str]]
SOURCES: dict[str, Options] = {
    "amazon2023": ("amazon2023", "x.jsonl", AMAZON, SMALL),
    "table": ("table", "x.csv", TABLE, PLAIN),
    "jsonl": ("table", "x.jsonl", lines([json.dumps({"user": u, "item": i, "time": t}) for u, i, t in EVENTS]), PLAIN),
    "parquet": ("table", "x.parquet", parquet(), PLAIN),
    "recbole": (
        "recbole", "x.inter",
        lines(["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{t}" for u, i, t in EVENTS)]), PLAIN,
    ),
    "movielens": (
        "movielens", "ratings.dat", lines([f"{u[1:]}::{i[1:]}::5::{t}" for u, i, t in EVENTS]), PLAIN,
    ),
    "gzip": ("table", "x.csv.gz", gzip.compress(TABLE, mtime=0), PLAIN),
}  # fmt: skip


def check_build(source: str, content: bytes, titles: bytes = TITLES) -> None:
    """Build from a file with this content; anything but a dataset or one line with exit code 2 is an error."""
    kind, name, _, words = SOURCES[source]
    with tempfile.TemporaryDirectory() as folder:
        path, meta, out = Path(folder, "in", name), Path(folder, "in", "meta.jsonl"), Path(folder, "out")
        path.parent.mkdir()
        path.write_bytes(content)
        meta.write_bytes(titles)
        metas = ["--meta", str(meta)] if kind == "amazon2023" else []
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            code = main(["build", str(out), "--source", kind, "--reviews", str(path), *metas, *words])
        assert code in (0, 2)
        assert {inside.name for inside in Path(folder).iterdir()} <= {"in", "out"}
        assert {inside.name for inside in path.parent.iterdir()} == {name, "meta.jsonl"}
        assert out.exists() == (code == 0)
        errors = [line for line in printed.getvalue().splitlines() if line.startswith("error")]
        assert len(errors) == (code == 2)
        assert all(len(line) < 3000 and line.isprintable() for line in errors), errors


@pytest.mark.parametrize("source", SOURCES)
def test_the_files_that_are_mutated_are_valid(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    kind, name, content, words = SOURCES[source]
    with tempfile.TemporaryDirectory() as folder:
        path, meta, out = Path(folder, name), Path(folder, "meta.jsonl"), Path(folder, "out")
        path.write_bytes(content)
        meta.write_bytes(TITLES)
        metas = ["--meta", str(meta)] if kind == "amazon2023" else []
        code = main(["build", str(out), "--source", kind, "--reviews", str(path), *metas, *words])
        assert code == 0, capfd.readouterr().err


@pytest.mark.parametrize("source", SOURCES)
def test_mutated_reviews(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    @bounded
    @given(mutated(SOURCES[source][2]))
    def run(content: bytes) -> None:
        kept(source, content, check_build)

    run()
    assert "panicked" not in capfd.readouterr().err


def test_mutated_titles(capfd: pytest.CaptureFixture[str]) -> None:
    @bounded
    @given(mutated(TITLES))
    def run(titles: bytes) -> None:
        kept("titles", titles, lambda _, content: check_build("amazon2023", AMAZON, content))

    run()
    assert "panicked" not in capfd.readouterr().err


@bounded
@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8)), min_size=4, max_size=8))
def test_ids_of_any_text(pairs: list[tuple[str, str]]) -> None:
    content = lines([json.dumps({"user": u, "item": i, "time": 1_600_000_000 + n}) for n, (u, i) in enumerate(pairs)])
    kept("jsonl", content, check_build)


def kept(source: str, content: bytes, check: Callable[[str, bytes], None]) -> None:
    """Check, and with `FUZZ_KEEP=FOLDER` write the file of a failure there."""
    try:
        check(source, content)
    except BaseException:
        if folder := os.environ.get("FUZZ_KEEP"):
            Path(folder, f"{source}-{hash(content) & 0xFFFFFF:06x}").write_bytes(content)
        raise


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_files_that_once_failed(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = file.name.partition("-")[0]
    if source == "titles":
        check_build("amazon2023", AMAZON, file.read_bytes())
    else:
        check_build(source, file.read_bytes())
    assert "panicked" not in capfd.readouterr().err
