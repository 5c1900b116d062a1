"""Writes sequences as tars of Arrow records, and the tables of a dataset. Same bytes for the same pyarrow version.

Why 1,024 users per record, measured with 65,536 users of 14 events at random (so incompressible) milliseconds:

    users per record    bytes per user    decoded users per CPU second    decoding one record
                 256               136                         680,000                0.38 ms
               1,024               129                       2,110,000                0.49 ms
               4,096               127                       4,410,000                0.93 ms

256 pays for tar and Arrow headers. 4,096 saves another 1 % of bytes, but a shuffling reader then holds four times the
users for each one it wants. Decoding is far from being the bottleneck of a trainer either way.
"""

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import (
    CATALOG_NAME,
    USERS_NAME,
    DatasetError,
    FileEntry,
    ShardEntry,
    file_sha256,
)
from shards.record_schema import RECORD_SCHEMA, TEMPORAL_SCHEMA
from shards.sequences import Part, Sequences

USERS_PER_RECORD = 1024
USERS_PER_SHARD = 65_536


@dataclass(frozen=True)
class Layout:
    """Distribution of users over files: shard s has users `bounds[s]:bounds[s+1]`, in records of `users_per_record`."""

    bounds: tuple[int, ...]
    users_per_record: int


def plan_layout(num_users: int, shards: int | None, users_per_record: int | None) -> Layout:
    """Distribute users evenly over shards. None selects the defaults: at most `USERS_PER_SHARD`, `USERS_PER_RECORD`.

    Raises:
        DatasetError: less than 1 shard or user per record, or more shards than users.
    """
    count = shards if shards is not None else -(-num_users // USERS_PER_SHARD)
    if count < 1:
        raise DatasetError(f"--shards {count}: give at least 1")
    if count > num_users:
        raise DatasetError(f"--shards {count:,} for {num_users:,} users: lower --shards to at most {num_users:,}")
    per_record = users_per_record if users_per_record is not None else USERS_PER_RECORD
    if per_record < 1:
        raise DatasetError(f"--users-per-record {per_record}: give at least 1")
    bounds = tuple(num_users * shard // count for shard in range(count + 1))
    return Layout(bounds, min(per_record, -(-num_users // count)))


def write_shards(directory: Path, sequences: Sequences, layout: Layout) -> tuple[ShardEntry, ...]:
    """Write `shard-000000.tar ...`; records are numbered across all shards."""
    entries = []
    record = 0
    for shard, (first, last) in enumerate(zip(layout.bounds[:-1], layout.bounds[1:], strict=True)):
        name = f"shard-{shard:06d}.tar"
        starts = range(first, last, layout.users_per_record)
        with tarfile.open(directory / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for start in starts:
                stop = min(start + layout.users_per_record, last)
                _add(tar, f"{record:08d}.arrow", encode_record(sequences, start, stop))
                record += 1
        entry = _entry(directory, name)
        entries.append(ShardEntry(name, entry.bytes, entry.sha256, first, last - first, len(starts)))
    return tuple(entries)


def encode_record(sequences: Sequences, start: int, stop: int) -> bytes:
    """Encode users `start:stop` as an Arrow IPC stream (zstd) of one record batch."""
    users = slice(start, stop)
    train = Part(sequences.offsets, sequences.items, sequences.times)
    columns = [
        pa.array(np.arange(start, stop, dtype=np.int32)),
        *_lists(train, start, stop),
        pa.array(sequences.valid_items[users]),
        pa.array(sequences.valid_times[users]),
        pa.array(sequences.test_items[users]),
        pa.array(sequences.test_times[users]),
    ]
    schema = RECORD_SCHEMA
    if sequences.contexts is not None:
        schema = TEMPORAL_SCHEMA
        for part in (sequences.contexts.valid, sequences.contexts.test):
            columns += _lists(part, start, stop)
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, schema, options=options) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _lists(part: Part, start: int, stop: int) -> tuple[pa.Array, pa.Array]:
    """Items and times of users `start:stop`, a list per user."""
    offsets = part.offsets[start : stop + 1]
    events = slice(offsets[0], offsets[-1])
    local = pa.array((offsets - offsets[0]).astype(np.int32))
    return (
        pa.ListArray.from_arrays(local, pa.array(part.items[events])),
        pa.ListArray.from_arrays(local, pa.array(part.times[events])),
    )


def write_tables(directory: Path, catalog: pl.DataFrame, sequences: Sequences) -> tuple[FileEntry, ...]:
    """Write `catalog.parquet` and `users.parquet`."""
    item = pa.array(catalog["item"].to_numpy(), pa.int32())
    texts = {name: pa.array(catalog[name].to_list(), pa.string()) for name in catalog.columns if name != "item"}
    pq.write_table(pa.table({"item": item, **texts}), directory / CATALOG_NAME, compression="zstd")
    user = pa.array(np.arange(sequences.num_users, dtype=np.int32))
    raw_id = pa.array(sequences.user_ids.to_list(), pa.string())
    pq.write_table(pa.table({"user": user, "raw_id": raw_id}), directory / USERS_NAME, compression="zstd")
    return _entry(directory, CATALOG_NAME), _entry(directory, USERS_NAME)


def write_candidates(
    directory: Path, name: str, blocks: Iterable[npt.NDArray[np.int32]], shape: tuple[int, int]
) -> FileEntry:
    """Write `candidates/<name>.npy` block by block, as one C-order int32 array of `shape` (users, candidates).

    A plain .npy, so that the trainer can memory-map it.
    """
    path = directory / "candidates" / f"{name}.npy"
    path.parent.mkdir(exist_ok=True)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<i4")), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype="<i4").tobytes())
    return _entry(directory, f"candidates/{name}.npy")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member whose header is reproducible: no user, group or modification time."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(content))


def _entry(directory: Path, name: str) -> FileEntry:
    path = directory / name
    return FileEntry(name, path.stat().st_size, file_sha256(path))
