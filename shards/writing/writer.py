"""Writes sequences as tars of Arrow records, and the tables of a dataset. Same bytes for the same pyarrow version.

Why 1,024 users per record, measured with 65,536 users of 14 events at random (so incompressible) milliseconds:

    users per record    bytes per user    decoded users per CPU second    decoding one record
                 256               136                         680,000                0.38 ms
               1,024               129                       2,110,000                0.49 ms
               4,096               127                       4,410,000                0.93 ms

256 pays for tar and Arrow headers. 4,096 saves another 1 % of bytes, but a shuffling reader then holds four times the
users for each one it wants. Decoding is far from being the bottleneck of a trainer either way.
"""

import contextlib
import io
import itertools
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
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
from shards.partitions.engine import Parts, identity
from shards.record_schema import RECORD_SCHEMA, TEMPORAL_SCHEMA
from shards.sequences import Part, Sequences, regrouped

USERS_PER_RECORD = 1024
USERS_PER_SHARD = 65_536
_ROW_GROUP = 1 << 20
"""Rows of a row group of `users.parquet`."""


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


def write_shards(directory: Path, parts: Parts[Sequences], layout: Layout) -> tuple[ShardEntry, ...]:
    """Write `shard-000000.tar ...`; records are numbered across all shards."""
    entries = []
    record = 0
    size = layout.users_per_record
    starts = [start for first, last in itertools.pairwise(layout.bounds) for start in range(first, last, size)]
    blocks = regrouped(parts.stream(identity, "shards"), [*starts, layout.bounds[-1]])
    for shard, (first, last) in enumerate(itertools.pairwise(layout.bounds)):
        name = f"shard-{shard:06d}.tar"
        records = -(-(last - first) // size)
        untrained = 0
        with tarfile.open(directory / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for block in itertools.islice(blocks, records):
                _add(tar, f"{record:08d}.arrow", encode_record(block))
                record += 1
                untrained += int((np.diff(block.offsets) == 0).sum())
        entry = _entry(directory, name)
        entries.append(ShardEntry(name, entry.bytes, entry.sha256, first, last - first, records, untrained))
    return tuple(entries)


def encode_record(sequences: Sequences) -> bytes:
    """Encode users as an Arrow IPC stream (zstd) of one record batch."""
    first = sequences.first_user
    columns = [
        pa.array(np.arange(first, first + sequences.num_users, dtype=np.int32)),
        *_lists(sequences.train),
        pa.array(sequences.valid_items),
        pa.array(sequences.valid_times),
        pa.array(sequences.test_items),
        pa.array(sequences.test_times),
    ]
    schema = RECORD_SCHEMA
    if sequences.contexts is not None:
        schema = TEMPORAL_SCHEMA
        for part in (sequences.contexts.valid, sequences.contexts.test):
            columns += _lists(part)
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, schema, options=options) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _lists(part: Part) -> tuple[pa.Array, pa.Array]:
    """Items and times, a list per user."""
    offsets = pa.array(part.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(part.items)), pa.ListArray.from_arrays(
        offsets, pa.array(part.times)
    )


def write_catalog(directory: Path, catalog: pl.DataFrame) -> FileEntry:
    """Write `catalog.parquet`."""
    item = pa.array(catalog["item"].to_numpy(), pa.int32())
    texts = {name: pa.array(catalog[name].to_list(), pa.string()) for name in catalog.columns if name != "item"}
    pq.write_table(pa.table({"item": item, **texts}), directory / CATALOG_NAME, compression="zstd")
    return _entry(directory, CATALOG_NAME)


def write_users(directory: Path, parts: Parts[Sequences]) -> FileEntry:
    """Write `users.parquet`."""
    schema = pa.schema([("user", pa.int32()), ("raw_id", pa.string())])
    total = 0
    held: list[pl.Series] = []
    with pq.ParquetWriter(directory / USERS_NAME, schema, compression="zstd") as writer:

        def write(ids: pl.Series) -> None:
            nonlocal total
            user = pa.array(np.arange(total, total + len(ids), dtype=np.int32))
            raw_id = ids.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
            writer.write_table(pa.table([user, raw_id], schema=schema))
            total += len(ids)

        for ids in parts.each(attrgetter("user_ids")):
            held.append(ids)
            while sum(map(len, held)) >= _ROW_GROUP:
                together = pl.concat(held, rechunk=True)
                write(together[:_ROW_GROUP])
                held = [together[_ROW_GROUP:]]
        if rest := sum(map(len, held)):
            write(pl.concat(held, rechunk=True)[:rest])
    return _entry(directory, USERS_NAME)


def write_candidates(
    directory: Path, widths: Mapping[str, int], num_users: int, blocks: Iterable[Mapping[str, npt.NDArray[np.int32]]]
) -> list[FileEntry]:
    """Write `candidates/<name>.npy`, each as one C-order int32 array of shape (`num_users`, width).

    Plain .npy, so that the trainer can memory-map them.

    Args:
        widths: candidates per user, by name.
        blocks: rows of all arrays, in order.
    """
    folder = directory / "candidates"
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in widths}
        for name, width in widths.items():
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype("<i4")),
                "fortran_order": False,
                "shape": (num_users, width),
            }
            np.lib.format.write_array_header_1_0(files[name], header)
        for block in blocks:
            for name, rows in block.items():
                files[name].write(np.ascontiguousarray(rows, dtype="<i4").data)
    return [_entry(directory, f"candidates/{name}.npy") for name in widths]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member whose header is reproducible: no user, group or modification time."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(content))


def _entry(directory: Path, name: str) -> FileEntry:
    path = directory / name
    return FileEntry(name, path.stat().st_size, file_sha256(path))
