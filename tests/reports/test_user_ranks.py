"""Ranks of users beside the results, paired differences, and the popularity baseline."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import result

from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.popularity import popularity_ranks
from trainer.evaluation.ranking import Ranks, bootstrap, metrics_per_target
from trainer.reports.user_ranks import UserRanks, paired_difference, read_ranks, write_ranks


def ranks_of(*greater: int, users: int = 0) -> UserRanks:
    column = np.array(greater)
    return UserRanks(np.arange(users, users + len(column)), Ranks(column, 0 * column, 0 * column + 100))


def test_ranks_are_read_back_as_written(tmp_path: Path) -> None:
    of = result(0.3)
    write_ranks(tmp_path, of, ranks_of(3, 0, 50))
    write_ranks(tmp_path, replace(of, history="shuffled"), ranks_of(9, 9, 9))
    found = read_ranks(tmp_path, of)
    assert found.user_U.tolist() == [0, 1, 2]
    assert found.ranks.greater.tolist() == [3, 0, 50]
    assert found.metric("HR@10", "expectation").tolist() == [1.0, 1.0, 0.0]
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == [
        "test-retrieval-sampled-original.npz",
        "test-retrieval-sampled-shuffled.npz",
    ]


def test_lists_are_read_back_as_written(tmp_path: Path) -> None:
    write_ranks(tmp_path, result(0.3), replace(ranks_of(3, 0), top_TK=np.array([[4, 2], [1, 0]])))
    assert read_ranks(tmp_path, result(0.3)).top_TK.tolist() == [[4, 2], [1, 0]]
    write_ranks(tmp_path, result(0.3), ranks_of(3, 0))
    assert read_ranks(tmp_path, result(0.3)).top_TK.shape == (2, 0)


def test_lists_of_other_users_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, result(0.3), replace(ranks_of(3, 0), top_TK=np.array([[4, 2]])))
    with pytest.raises(ValueError, match="its lists are not whole numbers of the same targets"):
        read_ranks(tmp_path, result(0.3))


def test_missing_damaged_and_stale_ranks_name_the_cure(tmp_path: Path) -> None:
    of = result(0.3)
    cure = f"write them with `llm-srec evaluate {tmp_path} --split test`"
    with pytest.raises(ValueError, match="needs every user's rank") as missing:
        read_ranks(tmp_path, of)
    write_ranks(tmp_path, of, ranks_of(3))
    with pytest.raises(ValueError, match="different checkpoint or dataset") as stale:
        read_ranks(tmp_path, replace(of, step=2))
    path = tmp_path / "ranks/test-retrieval-sampled-original.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged") as damaged:
        read_ranks(tmp_path, of)
    assert all(str(error.value).endswith(cure) for error in (missing, stale, damaged))


@pytest.mark.parametrize("compressed", [True, False])
def test_ranks_made_to_fill_the_memory_are_refused(tmp_path: Path, compressed: bool) -> None:
    of = result(0.3)
    write_ranks(tmp_path, of, ranks_of(3))
    path = tmp_path / "ranks/test-retrieval-sampled-original.npz"
    evaluation = np.array([of.dataset_fingerprint, str(of.step)])
    columns = dict.fromkeys(("user", "greater", "ties", "candidates"), np.zeros(1, np.int64))
    write: Any = np.savez_compressed if compressed else np.savez
    write(path, evaluation=evaluation, **columns)
    if not compressed:
        header = {"descr": "<i8", "fortran_order": False, "shape": (1 << 60,)}
        with zipfile.ZipFile(path, "a") as file, file.open("user.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ValueError, match="is damaged"):
        read_ranks(tmp_path, of)


@pytest.mark.parametrize("name", ["user", "greater", "candidates"])
@pytest.mark.parametrize("column", [np.zeros(2, np.int64), np.zeros((1, 1), np.int64), np.zeros(1), np.array(["x"])])
def test_columns_that_are_no_ranks_are_refused(tmp_path: Path, name: str, column: np.ndarray) -> None:
    of = result(0.3)
    write_ranks(tmp_path, of, ranks_of(3))
    columns = dict.fromkeys(("user", "greater", "ties", "candidates"), np.zeros(1, np.int64)) | {name: column}
    evaluation = np.array([of.dataset_fingerprint, str(of.step)])
    np.savez(tmp_path / "ranks/test-retrieval-sampled-original.npz", evaluation=evaluation, **columns)
    with pytest.raises(ValueError, match=r"is damaged .*not whole numbers of the same targets"):
        read_ranks(tmp_path, of)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    of = result(0.3)
    write_ranks(tmp_path, of, ranks_of(3))
    with open(tmp_path / "ranks/test-retrieval-sampled-original.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="is damaged"):
        read_ranks(tmp_path, of)


def test_a_paired_difference_is_that_of_the_users_differences() -> None:
    rng = np.random.default_rng(0)
    hard_U = rng.integers(5, 60, 300)
    worse = UserRanks(np.arange(300), Ranks(hard_U + 1, 0 * hard_U, 0 * hard_U + 100))
    better = UserRanks(np.arange(300), Ranks(hard_U, 0 * hard_U, 0 * hard_U + 100))
    found = paired_difference(better, worse, "MRR", "expectation")
    mine, its = (metrics_per_target(some.ranks)["MRR"] for some in (better, worse))
    assert found.value == pytest.approx(float((mine - its).mean()))
    assert found.low > 0, "the same small gain for everyone is certain"
    assert bootstrap(mine, 0).low < bootstrap(its, 0).high, "though the two intervals overlap"
    reverse = paired_difference(worse, better, "MRR", "expectation")
    assert (reverse.value, reverse.low) == pytest.approx((-found.value, -found.high))


def test_different_users_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"different users: .*evaluation\.users"):
        paired_difference(ranks_of(1, 2), ranks_of(1, 2, users=5), "MRR", "expectation")


def test_popularity_by_hand(world: Path) -> None:
    dataset = open_dataset(world, full_check=False)
    [users] = read_in_order(dataset.path, dataset.manifest)
    count = np.bincount(users.train.item_E, minlength=dataset.num_items + 1)
    user_U, sampled = popularity_ranks(dataset, "test", "sampled")
    _, full = popularity_ranks(dataset, "test", "full")
    _, with_seen = popularity_ranks(dataset, "test", "full_with_seen")
    histories, target_U = users.targets("test")
    assert user_U.tolist() == histories.user_U.tolist()
    stored = dataset.candidates("retrieval", "test")
    for row, (user, target) in enumerate(zip(user_U, target_U, strict=True)):
        others = [int(item) for item in stored[user]]
        own = set(histories.take(slice(row, row + 1)).item_E.tolist())
        rest = [item for item in range(1, dataset.num_items + 1) if item not in own | {int(target)}]
        everything = [item for item in range(1, dataset.num_items + 1) if item != target]
        for found, candidates in ((sampled, others), (full, rest), (with_seen, everything)):
            assert found.greater[row] == sum(count[item] > count[target] for item in candidates)
            assert found.ties[row] == sum(count[item] == count[target] for item in candidates)
            assert found.candidates[row] == len(candidates) + 1
