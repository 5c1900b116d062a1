"""Columns of the records in a shard: Arrow IPC streams that `shards.writer` writes and the trainer reads."""

import pyarrow as pa

RECORD_SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("items", pa.list_(pa.int32())),
        ("times", pa.list_(pa.int64())),
        ("valid_item", pa.int32()),
        ("valid_time", pa.int64()),
        ("test_item", pa.int32()),
        ("test_time", pa.int64()),
    ]
)
