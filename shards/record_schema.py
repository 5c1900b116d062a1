"""Columns of the records in a shard: Arrow IPC streams that `shards.writing.writer` writes and the trainer reads."""

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

TEMPORAL_SCHEMA = pa.schema(
    [
        *RECORD_SCHEMA,
        # Between the training sequence and the validation target, and between what precedes it and the test target.
        ("valid_context_items", pa.list_(pa.int32())),
        ("valid_context_times", pa.list_(pa.int64())),
        ("test_context_items", pa.list_(pa.int32())),
        ("test_context_times", pa.list_(pa.int64())),
    ]
)
"""Columns of a temporal split (`shards.partitions.temporal`)."""
