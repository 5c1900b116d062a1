"""Decodes the records of a shard. A shard may come from anyone: nothing in it, nor in its name, is run, and no record
takes far more memory than the file takes on disk."""

import re
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.manifest import MAX_EXPANSION
from shards.record_schema import RECORD_SCHEMA, TEMPORAL_SCHEMA

_SMALL = 16 << 20
"""A record may decode to this many bytes, however well it is compressed."""

_RECORD_NAME = re.compile(r"[0-9]{8,12}\.arrow")

UNREADABLE = (tarfile.TarError, OSError, ValueError, KeyError, EOFError, pa.ArrowException)
"""Errors of a damaged shard."""


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Record batches of a shard, in order, with the columns of `shards.record_schema`.

    Raises:
        one of `UNREADABLE`: as `members` and `decode_batch`.
    """
    for member in members(path):
        yield decode_batch(member["data"])


def members(path: Path) -> Iterator[dict[str, Any]]:
    """Name and content of each file in a plain tar, as webdataset takes them.

    Raises:
        one of `UNREADABLE`: the file is damaged, compressed as a whole, or holds more than plain files.
    """
    # Opened here, because webdataset's own opener gives a name such as `pipe:COMMAND` to a shell and unpacks compressed
    # tars of any size. It also reads sparse files, whose size in the header is not that on disk.
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse() or member.size > size:
                raise ValueError(f"{member.name[:40]!r} in it is not a plain file")
            if not _RECORD_NAME.fullmatch(member.name):
                raise ValueError(f"{member.name[:40]!r} in it is not the name of a record")
            content = tar.extractfile(member)
            assert content is not None, "a regular file has content"
            yield {"fname": member.name, "data": content.read(), "__url__": str(path)}


def decode_batch(payload: bytes) -> pa.RecordBatch:
    """One record: an Arrow IPC stream with one batch.

    Raises:
        ValueError: other columns than those of a record, missing values, or far more data than bytes.
        pa.ArrowException: not an intact Arrow stream.
    """
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(payload))
    try:
        schema = pa.ipc.read_schema(messages.read_next_message())
        message = messages.read_next_message()
    except StopIteration:
        raise ValueError("a record in it is cut short") from None
    known = schema.equals(RECORD_SCHEMA) or schema.equals(TEMPORAL_SCHEMA)
    if not known or message.type != "record batch":
        raise ValueError(f"a record in it has the columns {', '.join(schema.names)[:80]}, or columns of other types")
    if (size := _decoded_bytes(message)) > max(_SMALL, MAX_EXPANSION * len(payload)):
        raise ValueError(f"a record of {len(payload):,} bytes in it would decode to {size:,}")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)  # or list offsets out of range would go unnoticed
    return batch


def _decoded_bytes(message: pa.ipc.Message) -> int:
    """Bytes that the buffers of a record batch take once decompressed, as they say themselves; decodes nothing.

    Arrow allocates what they say before it decompresses. It offers no limit, hence this look into the message, which is
    a flatbuffer: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
    """
    facts, body = message.metadata.to_pybytes(), message.body
    header, buffers, compression = 2, 2, 3  # slots of the table Message, and of the table RecordBatch in it
    try:
        batch = _pointed_at(facts, _pointed_at(facts, 0), header)
        places = _pointed_at(facts, batch, buffers)
        (count,) = struct.unpack_from("<I", facts, places)
        found = struct.iter_unpack("<qq", facts[places + 4 :][: 16 * count])
        if _field(facts, batch, compression) is None:
            return sum(length for _, length in found)
        return sum(_decompressed_bytes(body, offset, length) for offset, length in found)
    except struct.error:
        raise ValueError("a record in it is not a record batch") from None


def _decompressed_bytes(body: pa.Buffer, offset: int, length: int) -> int:
    """Decompressed size of a buffer, which precedes its content; -1 there: this one is not compressed."""
    if length < 8 or not 0 <= offset <= body.size - 8:
        return max(length, 0)
    size: int = struct.unpack("<q", body[offset : offset + 8].to_pybytes())[0]
    return max(size, length)


def _pointed_at(facts: bytes, place: int, slot: int | None = None) -> int:
    """Where the reference at a place of a flatbuffer points, or that in a slot of the table there.

    Raises:
        struct.error: there is no such slot, or no such place.
    """
    if slot is not None:
        if (field := _field(facts, place, slot)) is None:
            raise struct.error
        place = field
    further: int = struct.unpack_from("<I", facts, place)[0]
    return place + further


def _field(facts: bytes, table: int, slot: int) -> int | None:
    """The place of a field of a flatbuffer's table; None if the table leaves it out."""
    slots = table - int(struct.unpack_from("<i", facts, table)[0])
    size = int(struct.unpack_from("<H", facts, slots)[0])
    offset = int(struct.unpack_from("<H", facts, slots + 4 + 2 * slot)[0]) if 4 + 2 * slot < size else 0
    return table + offset if offset else None
