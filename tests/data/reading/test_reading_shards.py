"""Reading users from tars: they equal what was written, and errors name the damaged file."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from data_helpers import to_lists
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.manifest import DatasetError, Manifest, read_manifest
from trainer.data.raw.users import find_users
from trainer.data.reading import shards
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.sample_order import epoch_windows
from trainer.data.reading.shards import epoch_batches, read_in_order, read_shards, read_users


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(world, tmp_path / "copied")


def everyone(path: Path, group: int = 16) -> Users:
    return Users.concatenate(list(read_in_order(path, read_manifest(path), group)))


def reviews(world: Path) -> list[list[tuple[int, int]]]:
    """(item, time) of each user in time order, from the raw files that the world was built from."""
    catalog = pl.read_parquet(world / "catalog.parquet").select("item", pl.col("raw_id").alias("raw"))
    users = pl.read_parquet(world / "users.parquet").select("user", pl.col("raw_id").alias("raw_user"))
    raw = pl.read_parquet(world.parent / "raw" / "reviews.parquet")
    joined = raw.join(catalog, left_on="item", right_on="raw").join(users, left_on="user", right_on="raw_user")
    sequences: list[list[tuple[int, int]]] = [[] for _ in range(len(users))]
    for user, item, time in joined.select("user_right", "item_right", "time").sort("time").iter_rows():
        sequences[user].append((item, time))
    return sequences


def test_reading_is_what_was_written(world: Path) -> None:
    users = everyone(world)
    written = reviews(world)
    assert users.train.user_U.tolist() == list(range(61))
    assert to_lists(users.whole()) == written
    assert to_lists(users.train) == [user[:-2] for user in written]
    assert users.valid_item_U.tolist() == [user[-2][0] for user in written]
    assert users.valid_time_U.tolist() == [user[-2][1] for user in written]
    assert users.test_item_U.tolist() == [user[-1][0] for user in written]


@pytest.mark.parametrize("group", [1, 2, 16])
def test_groups_of_shards_change_nothing(world: Path, group: int) -> None:
    assert to_lists(everyone(world, group).whole()) == to_lists(everyone(world).whole())


def test_shards_are_read_in_the_requested_order(world: Path) -> None:
    manifest = read_manifest(world)
    found = read_shards(world, manifest, [2, 0]).train.user_U.tolist()
    shards = [list(range(shard.first_user, shard.first_user + shard.users)) for shard in manifest.shards]
    assert found == shards[2] + shards[0]


@pytest.mark.parametrize("user", [0, 19, 20, 21, 40, 60])
def test_one_user_is_read(world: Path, user: int) -> None:
    one = read_users(world, read_manifest(world), np.array([user])).whole()
    assert one.user_U.tolist() == [user]
    assert to_lists(one) == [reviews(world)[user]]


def batches(
    world: Path, *, batch_size: int = 7, shuffle_shards: int = 2, seed: int = 0, epoch: int = 0, first: int = 0
) -> Iterator[Users]:
    return epoch_batches(
        world,
        read_manifest(world),
        batch_size=batch_size,
        shuffle_shards=shuffle_shards,
        seed=seed,
        epoch=epoch,
        first_step=first,
    )


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 9])
@pytest.mark.parametrize("batch_size", [1, 7, 20, 61, 100])
def test_an_epoch_is_every_user_once(world: Path, batch_size: int, shuffle_shards: int) -> None:
    epoch = list(batches(world, batch_size=batch_size, shuffle_shards=shuffle_shards))
    assert [len(users) for users in epoch[:-1]] == [batch_size] * (len(epoch) - 1)
    together = Users.concatenate(epoch)
    assert sorted(together.train.user_U.tolist()) == list(range(61))
    # Users still have their own items.
    back = together.take(np.argsort(together.train.user_U))
    assert to_lists(back.whole()) == to_lists(everyone(world).whole())


def sequence(world: Path, *, seed: int = 0, epoch: int = 0, first: int = 0) -> list[list[int]]:
    return [users.train.user_U.tolist() for users in batches(world, seed=seed, epoch=epoch, first=first)]


def test_epochs_and_seeds_differ(world: Path) -> None:
    orders = {str(sequence(world, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert sequence(world, seed=1, epoch=2) == sequence(world, seed=1, epoch=2)


@pytest.mark.parametrize("step", range(11))
def test_resuming_gives_the_suffix(world: Path, step: int) -> None:
    assert sequence(world, epoch=1, first=step) == sequence(world, epoch=1)[step:]


def test_resuming_does_not_read_earlier_shards(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def noted(path: Path, manifest: Manifest, shards: list[int]) -> Users:
        read.extend(shards)
        return read_shards(path, manifest, shards)

    monkeypatch.setattr(shards, "read_shards", noted)
    order = [shard for window in epoch_windows([20, 20, 21], 1, 0, 0) for shard in window.shards]
    users = [read_manifest(world).shards[shard].users for shard in order]
    for first, left in [(0, 3), (users[0] - 1, 3), (users[0], 2), (users[0] + users[1], 1), (61, 0)]:
        read.clear()
        list(batches(world, batch_size=1, shuffle_shards=1, first=first))
        assert read == order[3 - left :]


def refused(path: Path, manifest: Manifest, name: str) -> str:
    with pytest.raises(DatasetError) as caught:
        read_shards(path, manifest, range(len(manifest.shards)))
    assert str(path / name) in str(caught.value)
    assert "again" in str(caught.value)
    return str(caught.value)


def test_missing_tar_is_named(copied: Path) -> None:
    (copied / "shard-000001.tar").unlink()
    refused(copied, read_manifest(copied), "shard-000001.tar")


@pytest.mark.parametrize("bytes_left", [0, 1, 511, 512, 600, 1024, 3072, 3584, 6144])
def test_truncated_tar_is_named(copied: Path, bytes_left: int) -> None:
    tar = copied / "shard-000001.tar"
    with tarfile.open(tar) as file:
        assert [member.offset for member in file][1:] == [3072, 6144], "this test must include cuts between members"
    tar.write_bytes(tar.read_bytes()[:bytes_left])
    refused(copied, read_manifest(copied), "shard-000001.tar")


def test_a_count_that_differs_from_the_manifest_is_named(copied: Path) -> None:
    manifest = read_manifest(copied)
    shards = [dataclasses.replace(shard, users=shard.users + (n == 2)) for n, shard in enumerate(manifest.shards)]
    message = refused(copied, dataclasses.replace(manifest, shards=tuple(shards)), "shard-000002.tar")
    assert "holds 21 users" in message
    assert "says 22" in message


def test_swapped_tars_are_named(copied: Path) -> None:
    """The number of users is the same but the users differ, which WebDataset and Arrow do not notice."""
    manifest = read_manifest(copied)
    assert manifest.shards[0].users == manifest.shards[1].users
    shutil.copy(copied / "shard-000000.tar", copied / "shard-000001.tar")
    assert "does not hold the users" in refused(copied, manifest, "shard-000001.tar")


def test_items_that_do_not_exist_are_named(copied: Path) -> None:
    manifest = read_manifest(copied)
    refused(copied, dataclasses.replace(manifest, num_items=39), "shard-000000.tar")


def test_a_record_that_is_not_arrow_is_named(copied: Path) -> None:
    with tarfile.open(copied / "shard-000000.tar", "w") as tar:
        member = tarfile.TarInfo("00000000.arrow")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    refused(copied, read_manifest(copied), "shard-000000.tar")


def test_offsets_that_run_backwards_are_named(copied: Path) -> None:
    """Arrow validates the offsets of a list only on request."""
    tar = copied / "shard-000000.tar"
    with tarfile.open(tar) as file:
        members = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    name, content = next(iter(members.items()))
    batch = pa.ipc.open_stream(content).read_next_batch()
    items = batch.column("items")
    offsets = items.offsets.to_numpy().copy()
    offsets[1], offsets[2] = offsets[2], offsets[1]
    broken = pa.ListArray.from_buffers(items.type, len(items), [None, pa.py_buffer(offsets)], children=[items.values])
    sink = io.BytesIO()
    columns = [broken if field.name == "items" else batch.column(field.name) for field in batch.schema]
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    members[name] = sink.getvalue()
    with tarfile.open(tar, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    refused(copied, read_manifest(copied), "shard-000000.tar")


def test_a_tar_of_something_else_is_named(copied: Path) -> None:
    with tarfile.open(copied / "shard-000000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"), io.BytesIO())
    refused(copied, read_manifest(copied), "shard-000000.tar")


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10239), st.integers(1, 255))
def test_a_flipped_byte_is_harmless_or_an_error_with_a_name(copied: Path, place: int, flip: int) -> None:
    """Any other exception would show a traceback without the file. Only `data.verify` catches changed values."""
    tar = copied / "shard-000001.tar"
    whole = tar.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= flip
    tar.write_bytes(damaged)
    message = ""
    try:
        read_shards(copied, read_manifest(copied), [1])
    except DatasetError as error:
        message = str(error)
    finally:
        tar.write_bytes(whole)
    assert not message or str(tar) in message


def test_open_dataset(world: Path) -> None:
    dataset = open_dataset(world, full_check=True)
    raw = pl.read_parquet(world.parent / "raw" / "items.parquet")
    title = dict(zip(raw["item"], raw["title"], strict=True))
    catalog = pl.read_parquet(world / "catalog.parquet")
    assert dataset.titles == tuple(title[item] for item in catalog.sort("item")["raw_id"])
    assert dataset.num_items == len(dataset.titles) == 40
    assert dataset.candidates("retrieval", "valid").shape == (61, 19)
    assert dataset.candidates("title", "test").shape == (61, 5)
    for raw_id, user in pl.read_parquet(world / "users.parquet").select("raw_id", "user").head(3).iter_rows():
        assert find_users(world, [raw_id]) == user
    with pytest.raises(DatasetError, match="'nobody'"):
        find_users(world, ["nobody"])


def test_only_the_full_check_sees_a_flipped_byte(copied: Path) -> None:
    tar = copied / "shard-000002.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    open_dataset(copied, full_check=False)
    with pytest.raises(DatasetError, match="shard-000002"):
        open_dataset(copied, full_check=True)
    tar.write_bytes(damaged[:-1])
    with pytest.raises(DatasetError, match="shard-000002"):
        open_dataset(copied, full_check=False)


def test_candidates_of_other_users_are_refused(copied: Path) -> None:
    dataset = open_dataset(copied, full_check=False)
    np.save(copied / "candidates" / "retrieval-test.npy", np.ones((60, 19), np.int32))
    with pytest.raises(DatasetError, match="retrieval-test"):
        dataset.candidates("retrieval", "test")


def replace_catalog(path: Path, catalog: pl.DataFrame) -> None:
    """Write a different catalog, and its size in the manifest."""
    old = read_manifest(path).file("catalog.parquet").bytes
    catalog.write_parquet(path / "catalog.parquet")
    new = (path / "catalog.parquet").stat().st_size
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace(f'"bytes": {old}', f'"bytes": {new}'))


def test_the_catalog_is_in_the_order_of_item_ids(copied: Path) -> None:
    titles = open_dataset(copied, full_check=False).titles
    replace_catalog(copied, pl.read_parquet(copied / "catalog.parquet").reverse())
    assert open_dataset(copied, full_check=False).titles == titles


def test_a_catalog_with_gaps_is_refused(copied: Path) -> None:
    replace_catalog(copied, pl.read_parquet(copied / "catalog.parquet").with_columns(pl.col("item") + 1))
    with pytest.raises(DatasetError, match="number items 1 to 40"):
        open_dataset(copied, full_check=False)
