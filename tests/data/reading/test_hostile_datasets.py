"""A dataset that comes from anyone: no name and no content of it runs code, fills the memory or ends in a traceback."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.manifest import DatasetError, Manifest, file_sha256, read_manifest
from trainer.data.raw.users import find_users
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.records import decode
from trainer.data.reading.shards import read_shards


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may tamper with."""
    return shutil.copytree(world, tmp_path / "copied")


def list_anew(path: Path, name: str) -> None:
    """Write the size and hash that a file has now into the manifest, as whoever made a hostile dataset would."""
    content = json.loads((path / "manifest.json").read_text())
    [entry] = [entry for entry in (*content["shards"], *content["files"]) if entry["name"] == name]
    entry |= {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(content))


def refused(path: Path, *, holds: str, manifest: Manifest | None = None) -> None:
    """Reading the first shard fails, in one line that names it and the cure."""
    with pytest.raises(DatasetError, match=holds) as caught:
        read_shards(path, manifest or read_manifest(path), [0])
    assert "shard-000000.tar" in str(caught.value)
    assert "copy the dataset again or rebuild it" in str(caught.value)


def test_no_name_of_a_shard_is_run(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset's opener gives `pipe:COMMAND` to a shell. Neither a shard nor a dataset folder is opened by it."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(copied)
    shard = dataclasses.replace(manifest.shards[0], name="pipe:touch ran; cat copied/shard-000000.tar")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_shards(Path("."), dataclasses.replace(manifest, shards=(shard,)), [0])
    (tmp_path / "pipe:touch ran; cat .").mkdir()
    folder = Path("pipe:touch ran; cat .") / "copied"
    shutil.copytree(copied, folder)
    assert len(read_shards(folder, manifest, [0])) == manifest.shards[0].users
    assert not (tmp_path / "ran").exists()


def test_a_compressed_tar_is_refused(copied: Path) -> None:
    """A megabyte of gzip can hold a gigabyte of tar."""
    tar = copied / "shard-000000.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    refused(copied, holds="cannot be read")


def sparse(name: str) -> tarfile.TarInfo:
    """A member of 8 GB of zeros that takes 512 bytes in the tar."""
    member = tarfile.TarInfo(name)
    member.type, member.pax_headers = tarfile.REGTYPE, {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": name,
        "GNU.sparse.size": str(8 << 30), "GNU.sparse.map": f"{8 << 30},0",
    }  # fmt: skip
    return member


def linked(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


@pytest.mark.parametrize("member", [sparse, linked])
def test_members_other_than_plain_files_are_refused(copied: Path, member: Callable[[str], tarfile.TarInfo]) -> None:
    with tarfile.open(copied / "shard-000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member("00000000.arrow"))
    refused(copied, holds="is not a plain file")


def rewrite(tar: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the content of a tar's first record."""
    with tarfile.open(tar) as file:
        members = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    first = min(members)
    members[first] = change(members[first])
    with tarfile.open(tar, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def encoded(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def with_column(name: str, column: pa.Array) -> Callable[[bytes], bytes]:
    def change(payload: bytes) -> bytes:
        batch = pa.ipc.open_stream(payload).read_next_batch()
        columns = [column if field.name == name else batch.column(field.name) for field in batch.schema]
        return encoded(pa.RecordBatch.from_arrays(columns, batch.schema.names))

    return change


def test_a_record_that_decodes_to_far_more_than_its_size_is_refused(copied: Path) -> None:
    """Found before anything is decompressed: 82 KB of zstd would take gigabytes."""
    zeros = np.zeros(10_000_000, np.int64)
    offsets = pa.array([0] * 8 + [len(zeros)], pa.int32())

    def bomb(payload: bytes) -> bytes:
        payload = with_column("items", pa.ListArray.from_arrays(offsets, pa.array(zeros.astype(np.int32))))(payload)
        return with_column("times", pa.ListArray.from_arrays(offsets, pa.array(zeros)))(payload)

    rewrite(copied / "shard-000000.tar", bomb)
    before = pa.default_memory_pool().max_memory()
    refused(copied, holds=r"a record of [\d,]+ bytes in it would decode to 12\d,\d+,\d+")
    assert pa.default_memory_pool().max_memory() == before


@pytest.mark.parametrize(
    ("name", "column", "holds"),
    [
        ("test_item", pa.array([41] * 8, pa.int32()), "users and items that the manifest says"),
        ("valid_item", pa.array([-1] * 8, pa.int32()), "users and items that the manifest says"),
        ("valid_item", pa.array([None] * 8, pa.int32()), "a value in it is missing"),
        ("test_time", pa.array(["x"] * 8), "columns of other types"),
        ("items", pa.array([[1, 2]] * 8, pa.list_(pa.int32())), "do not belong together"),
        ("items", pa.array([None] * 8, pa.list_(pa.int32())), "do not belong together"),
    ],
)
def test_columns_that_are_no_record_are_refused(copied: Path, name: str, column: pa.Array, holds: str) -> None:
    rewrite(copied / "shard-000000.tar", with_column(name, column))
    refused(copied, holds=holds)


def test_a_record_without_compression_is_read(copied: Path) -> None:
    def plain(payload: bytes) -> bytes:
        sink = io.BytesIO()
        batch = pa.ipc.open_stream(payload).read_next_batch()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue()

    rewrite(copied / "shard-000000.tar", plain)
    list_anew(copied, "shard-000000.tar")
    manifest = read_manifest(copied)
    assert len(read_shards(copied, manifest, [0])) == manifest.shards[0].users


def test_every_cut_of_a_record_is_refused_or_harmless(world: Path) -> None:
    with tarfile.open(world / "shard-000000.tar") as tar:
        content = tar.extractfile(tar.getmembers()[0])
        assert content is not None
        payload = content.read()
    assert len(decode(payload)) == 8
    for length in range(0, len(payload) - 8, 7):  # the last eight bytes only say that nothing follows
        with pytest.raises((ValueError, OSError)):
            decode(payload[:length])


def save(path: Path, columns: dict[str, pa.Array]) -> None:
    """Write a table, and the manifest that fits it."""
    old = read_manifest(path.parent).file(path.name).bytes
    pq.write_table(pa.Table.from_arrays(list(columns.values()), list(columns)), path, compression="zstd")
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"bytes": {old}', f'"bytes": {path.stat().st_size}'))


ITEMS = pa.array(range(1, 41), pa.int32())


@pytest.mark.parametrize(
    ("columns", "holds"),
    [
        ({"item": ITEMS, "title": pa.array([b"\xff\xfe"] * 40, pa.binary())}, "column 'title' is binary"),
        ({"item": ITEMS, "title": pa.array([None] * 40, pa.string())}, "an item has no title"),
        ({"item": ITEMS.cast(pa.string()), "title": pa.array(["x"] * 40)}, "column 'item' is string"),
        ({"item": ITEMS.take(pa.array([0] * 41)), "title": pa.array(["x"] * 41)}, "41 items, but the manifest says 40"),
        ({"item": ITEMS, "title": pa.array(["x" * 2_000_000] * 40)}, "its texts would take 80,000,000 bytes"),
        (
            {"item": ITEMS, "title": pa.array([bytes([255])] * 40, pa.binary()).view(pa.string())},
            "not (valid )?UTF-?8|UTF8",
        ),
    ],
)
def test_catalogs_that_are_none(copied: Path, columns: dict[str, pa.Array], holds: str) -> None:
    save(copied / "catalog.parquet", columns)
    with pytest.raises(DatasetError, match=f"catalog.parquet is damaged .*({holds})"):
        open_dataset(copied, full_check=False)


def test_a_table_that_is_not_parquet_is_named(copied: Path) -> None:
    for name, read in (("catalog.parquet", lambda: open_dataset(copied, full_check=False)),
                       ("users.parquet", lambda: find_users(copied, ["u1"]))):  # fmt: skip
        (copied / name).write_bytes(b"x" * (copied / name).stat().st_size)
        with pytest.raises(DatasetError, match=f"{name} is damaged .*rebuild it"):
            read()


def test_a_duplicated_column_is_named(copied: Path) -> None:
    table = pq.read_table(copied / "users.parquet")
    pq.write_table(pa.Table.from_arrays([*table.columns, table["user"]], ["user", "raw_id", "user"]),
                   copied / "users.parquet")  # fmt: skip
    with pytest.raises(DatasetError, match=r"users\.parquet is damaged .*2 columns 'user'"):
        find_users(copied, ["u1"])


def test_a_folder_whose_name_is_a_pattern(world: Path, tmp_path: Path) -> None:
    """polars would read all folders that match."""
    folder = shutil.copytree(world, tmp_path / "a[b]*")
    assert open_dataset(folder, full_check=True).titles == open_dataset(world, full_check=True).titles


@pytest.mark.parametrize(
    "negatives",
    [np.ones((61, 18), np.int32), np.ones((61, 19), np.float32), np.ones(61 * 19, np.int32), np.array(["x"] * 61)],
)
def test_candidates_of_another_shape_are_refused(copied: Path, negatives: np.ndarray) -> None:
    dataset = open_dataset(copied, full_check=False)
    np.save(copied / "candidates" / "retrieval-test.npy", negatives)
    with pytest.raises(DatasetError, match=r"retrieval-test\.npy is damaged .*rebuild"):
        dataset.candidates("retrieval", "test")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_candidates_that_are_no_array_are_refused(copied: Path, content: bytes) -> None:
    dataset = open_dataset(copied, full_check=False)
    (copied / "candidates" / "retrieval-test.npy").write_bytes(content)
    with pytest.raises(DatasetError, match=r"retrieval-test\.npy is damaged"):
        dataset.candidates("retrieval", "test")


@pytest.mark.parametrize("item", [0, -1, 41, 2**31 - 1])
def test_candidates_that_do_not_exist_are_refused(copied: Path, item: int) -> None:
    negatives = np.load(copied / "candidates" / "retrieval-test.npy")
    negatives[3, 4] = item
    np.save(copied / "candidates" / "retrieval-test.npy", negatives)
    list_anew(copied, "candidates/retrieval-test.npy")
    dataset = open_dataset(copied, full_check=False)
    assert dataset.candidates_of("retrieval", "test", np.array([2, 4])).shape == (2, 19)
    with pytest.raises(DatasetError, match=r"retrieval-test\.npy is damaged .*not between 1 and 40"):
        dataset.candidates_of("retrieval", "test", np.array([2, 3]))
