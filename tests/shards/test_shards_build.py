"""The command line, the folder that appears complete or not at all, and the statistics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards_helpers import all_bytes, options, titles_of, world, write_amazon, write_csv

import shards.build
from shards.__main__ import main
from shards.build import build
from shards.manifest import DatasetError, read_manifest, verify
from shards.statistics import TABLE_10, paper_row, stats_text


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_amazon(tmp_path / "input", world())


def arguments(out: Path, files: tuple[Path, Path], *more: str) -> list[str]:
    reviews, meta = map(str, files)
    base = ["build", str(out), "--source", "amazon2023", "--reviews", reviews, "--meta", meta]
    return [*base, "--negatives", "5", "--title-negatives", "3", *more]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a command that must fail with exit code 2; returns its error line."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    return last


def test_build_verify_stats(tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/er/out"
    assert main(arguments(out, files)) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for words in ("reading 1 review file", "k-core: 30 users, 30 items", "writing 1 shard", "done: "):
        assert words in captured.err
    assert left(out.parent) == ["out"]
    assert read_manifest(out).name == "Things"
    assert main(["verify", str(out)]) == 0
    assert "all 7 files are intact" in capsys.readouterr().out
    assert main(["stats", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Table 10" not in text
    assert main(["stats", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["users"], found["items"], found["interactions"]) == (30, 30, 360)
    assert (found["mean_length"], found["median_length"], found["paper"]) == (12.0, 12.0, None)
    assert found["fingerprint"] == read_manifest(out).fingerprint


def test_the_manifest_records_the_options(tmp_path: Path, files: tuple[Path, Path]) -> None:
    assert main(arguments(tmp_path / "out", files, "--seed", "7", "--iterate", "--min-item", "2", "--name", "N")) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.name == "N"
    assert dict(manifest.build) == {
        "source": "amazon2023",
        "seed": 7,
        "iterate": True,
        "min_user": 5,
        "min_item": 2,
        "min_train": 5,
        "user_fraction": 1.0,
        "missing_title": "error",
        "bad_times": "error",
    }


def test_a_table_through_the_command_line(tmp_path: Path) -> None:
    events = world()
    reviews = write_csv(tmp_path / "sales.csv", events, "who,what,when")
    meta = tmp_path / "m.csv"
    meta.write_text("what,called\n" + "".join(f"{item},{title}\n" for item, title in titles_of(events).items()))
    columns = "--user-column who --item-column what --time-column when --title-column called --time-unit ms"
    argv = f"build {tmp_path / 'out'} --source table --reviews {reviews} --meta {meta} --negatives 5 {columns}"
    assert main([*argv.split(), "--title-negatives", "3"]) == 0
    assert read_manifest(tmp_path / "out").name == "sales"


def test_overwrite(tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(arguments(out, files)) == 0  # an empty folder is fine
    before = all_bytes(out)
    message = failure(capsys, arguments(out, files, "--seed", "1"))
    assert "exists and is not empty: use --overwrite" in message
    assert all_bytes(out) == before
    assert main(arguments(out, files, "--seed", "1", "--overwrite")) == 0
    assert all_bytes(out) != before
    assert left(tmp_path) == ["input", "out"]


def test_overwrite_replaces_datasets_only(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    assert "is not a dataset" in failure(capsys, arguments(home, files, "--overwrite"))
    assert "is a file" in failure(capsys, arguments(home / "thesis.tex", files, "--overwrite"))
    assert left(home) == ["thesis.tex"]


def test_a_link_to_another_disk_is_followed(tmp_path: Path, files: tuple[Path, Path]) -> None:
    (tmp_path / "disk/data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/data")
    assert main(arguments(tmp_path / "link", files)) == 0
    assert (tmp_path / "link").is_symlink()
    read_manifest(tmp_path / "disk/data")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_build_leaves_everything_as_it_was(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    given = options(*files)
    if existing:
        build(tmp_path / "out", given)
    before = all_bytes(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.build, "write_candidates", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "out", given, overwrite=True)
    assert all_bytes(tmp_path) == before
    assert left(tmp_path) == (["input", "out"] if existing else ["input"])


def test_a_full_disk_is_one_line(
    tmp_path: Path,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.build, "write_shards", full_disk)
    assert "No space left on device: check disk space" in failure(capsys, arguments(tmp_path / "out", files))


def test_a_killed_build_leaves_nothing_that_looks_like_a_dataset(tmp_path: Path, files: tuple[Path, Path]) -> None:
    code = (
        "import sys, time, shards.build\n"
        "from shards.__main__ import main\n"
        "shards.build.write_manifest = lambda *_: (print('now', flush=True), time.sleep(60))\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(tmp_path / "out", files)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("manifest.json"))
    assert main(arguments(tmp_path / "out", files)) == 0


def test_two_builds_at_once_give_one_whole_dataset(tmp_path: Path, files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "shards", *arguments(tmp_path / "out", files)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert 0 in [process.returncode for process in running]
    assert not any("Traceback" in error for error in errors)
    verify(tmp_path / "out", read_manifest(tmp_path / "out"))


def test_all_readers_may_read_a_dataset(tmp_path: Path, files: tuple[Path, Path]) -> None:
    old = os.umask(0o022)
    try:
        build(tmp_path / "out", options(*files))
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--min-train", "1"], "--min-train 1"),
        (["--negatives", "500"], "lower --negatives to at most"),
        (["--shards", "31"], "--shards 31 for 30 users"),
        (["--user-fraction", "2"], "--user-fraction 2.0"),
        (["--min-user", "1000"], "lower --min-user or --min-item"),
        (["--title-column", "x"], "meta_Things.jsonl has no field 'x' (it has parent_asin, title, description)"),
        (["--time-unit", "s"], "in s is after the year 2100: set --time-unit ms"),
        (["--columns", "user,item,time"], "--no-header and --columns belong together"),
    ],
)
def test_errors_come_before_anything_is_written(
    tmp_path: Path,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert message in failure(capsys, arguments(tmp_path / "out", files, *more))
    assert left(tmp_path) == ["input"]


def test_verify_and_stats_of_bad_folders(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "stats"):
        assert "is not a dataset" in failure(capsys, [command, str(tmp_path)])
    assert main(arguments(tmp_path / "out", files)) == 0
    (tmp_path / "out/users.parquet").write_bytes(b"")
    assert "users.parquet has 0 bytes" in failure(capsys, ["verify", str(tmp_path / "out")])


def test_interrupt(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.build, "write_shards", interrupted)
    assert main(arguments(tmp_path / "out", files)) == 130
    assert left(tmp_path) == ["input"]


def test_the_papers_datasets_are_known_by_both_names(tmp_path: Path, files: tuple[Path, Path]) -> None:
    assert [row.name for row in TABLE_10] == ["Movies", "Scientific", "Electronics", "CDs"]
    assert [round(row.mean_length, 2) for row in TABLE_10] == [12.06, 11.27, 10.59, 15.40]
    for name in ("CDs", "cds_and_vinyl", "CDs_and_Vinyl"):
        assert paper_row(name) == TABLE_10[3]
    assert paper_row("ml-100k") is None
    manifest = build(tmp_path / "out", options(*files, name="Movies_and_TV"))
    text = stats_text(manifest)
    assert "Table 10, Movies" in text
    assert "11,947" in text


def test_the_command_itself(tmp_path: Path, files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "shards"]
    done = subprocess.run([*command, *arguments(tmp_path / "out", files)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    shutil.rmtree(tmp_path / "input")
    failed = subprocess.run(
        [*command, *arguments(tmp_path / "two", files)], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    start = time.monotonic()
    usage = subprocess.run([*command, "build", "--help"], capture_output=True, text=True, check=True)
    assert "--missing-title" in usage.stdout
    assert time.monotonic() - start < 5


def test_other_datasets_are_refused_by_library_callers_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="unknown source 'netflix'"):
        build(tmp_path / "out", options(write_csv(tmp_path / "r.csv", world()), source="netflix"))
    with pytest.raises(DatasetError, match="no review files"):
        build(tmp_path / "out", options((), source="table"))
