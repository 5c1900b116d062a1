"""`--hash-users`: no file of the dataset and no line of the log holds a raw user id, and the key file undoes it."""

from __future__ import annotations

import stat
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shards_helpers import world, write_csv

from shards.__main__ import main
from shards.manifest import read_manifest

PLAIN = ["--negatives", "5", "--title-negatives", "3", "--missing-title", "official", "--time-unit", "ms"]


def build(out: Path, reviews: Path, *words: str) -> int:
    return main(["build", str(out), "--source", "table", "--reviews", str(reviews), *PLAIN, *words])


def users_of(dataset: Path) -> list[str]:
    found: list[str] = pq.read_table(dataset / "users.parquet")["raw_id"].to_pylist()
    return found


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "x.csv", world())


def test_no_raw_id_is_left_and_the_key_undoes_it(
    tmp_path: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, plain, hashed = tmp_path / "keys" / "users.key", tmp_path / "plain", tmp_path / "hashed"
    assert build(plain, reviews) == build(hashed, reviews, "--hash-users", str(key)) == 0
    assert "user-1" not in capsys.readouterr().err
    raw, hashes = users_of(plain), users_of(hashed)
    assert len(set(hashes)) == len(raw)
    assert all(len(text) == 32 and int(text, 16) >= 0 for text in hashes)
    for file in hashed.rglob("*"):
        assert file.is_dir() or b"user-1" not in file.read_bytes(), file
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    # Everything but the ids is as without the option: order, splits and negatives of users.
    first, second = read_manifest(plain), read_manifest(hashed)
    assert first.shards == second.shards
    different = {a.name for a, b in zip(first.files, second.files, strict=True) if a != b}
    assert different == {"users.parquet"}
    assert second.build["hash_users"] is True
    assert "hash_users" not in first.build
    # Undone, in either direction.
    assert main(["users", str(key), hashes[3], raw[7]]) == 0
    assert capsys.readouterr().out == f"{hashes[3]}\t{raw[3]}\n{hashes[7]}\t{raw[7]}\n"


def test_the_same_key_gives_the_same_hashes_and_keeps_older_users(tmp_path: Path, reviews: Path) -> None:
    key, other = tmp_path / "users.key", write_csv(tmp_path / "y.csv", [(f"new-{u}", i, t) for u, i, t in world()])
    words = ("--hash-users", str(key))
    assert build(tmp_path / "a", reviews, *words) == build(tmp_path / "b", other, *words) == 0
    assert build(tmp_path / "c", reviews, *words) == build(tmp_path / "d", reviews, "--hash-users", str(key) + "2") == 0
    assert read_manifest(tmp_path / "a").fingerprint == read_manifest(tmp_path / "c").fingerprint
    assert not set(users_of(tmp_path / "a")) & set(users_of(tmp_path / "d")), "another salt"
    for dataset in ("a", "b"):
        assert main(["users", str(key), *users_of(tmp_path / dataset)]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{out}/users.key"], "whoever gets the dataset would get the key: give a file elsewhere"),
        (["{reviews}"], "is not a key file of --hash-users ("),
        (["{folder}"], "is not a key file of --hash-users (Is a directory)"),
    ],
)
def test_key_files_that_cannot_be(
    tmp_path: Path, reviews: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out, before = tmp_path / "out", reviews.read_bytes()
    places = {"out": out, "reviews": reviews, "folder": tmp_path}
    assert build(out, reviews, "--hash-users", *(word.format(**places) for word in words)) == 2
    assert said in capsys.readouterr().err
    assert reviews.read_bytes() == before
    assert not out.exists()


def test_a_failed_build_leaves_no_key(tmp_path: Path, reviews: Path) -> None:
    assert build(tmp_path / "out", reviews, "--hash-users", str(tmp_path / "key"), "--negatives", "1000") == 2
    assert not (tmp_path / "key").exists()


def test_unknown_users_are_named(tmp_path: Path, reviews: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "users.key"
    assert build(tmp_path / "out", reviews, "--hash-users", str(key)) == 0
    assert main(["users", str(key), "nobody"]) == 2
    assert "the key has no user 'nobody': give a hash, or a raw id" in capsys.readouterr().err
