"""Users of the records in a shard, which may come from anyone (`shards.stored.records`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from webdataset.tariterators import group_by_keys

from shards.stored.records import UNREADABLE, decode_batch, members
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users

__all__ = ["UNREADABLE", "decode", "read_records"]


def read_records(path: Path) -> Iterator[Users]:
    """Users of each record of a shard, in order.

    Raises:
        one of `UNREADABLE`: the file is damaged, compressed as a whole, or decodes to more than is allowed.
    """
    for sample in group_by_keys(members(path)):
        yield decode(sample["arrow"])


def decode(payload: bytes) -> Users:
    """Users of one record: an Arrow IPC stream with one batch.

    Raises:
        ValueError: other columns than those of a record, missing values, or far more data than bytes.
        pa.ArrowException: not an intact Arrow stream.
    """
    return _users(decode_batch(payload))


def _users(batch: pa.RecordBatch) -> Users:
    def column(name: str) -> IntArray:
        return _integers(batch.column(name))

    def lists(items: str, times: str) -> Histories:
        item_column, time_column = batch.column(items), batch.column(times)
        offset_U1 = _integers(item_column.offsets)
        same = np.array_equal(offset_U1, _integers(time_column.offsets))
        if offset_U1[0] != 0 or item_column.null_count or not same:
            raise ValueError("the items and times in it do not belong together")
        return Histories(column("user"), offset_U1, _integers(item_column.values), _integers(time_column.values))

    is_temporal = "valid_context_items" in batch.schema.names
    return Users(
        lists("items", "times"),
        column("valid_item"),
        column("valid_time"),
        column("test_item"),
        column("test_time"),
        lists("valid_context_items", "valid_context_times") if is_temporal else None,
        lists("test_context_items", "test_context_times") if is_temporal else None,
    )


def _integers(values: pa.Array) -> IntArray:
    if values.null_count:
        raise ValueError("a value in it is missing")
    numbers: IntArray = values.to_numpy().astype(np.int64)
    return numbers
