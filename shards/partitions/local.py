"""Builds on this machine: small input in memory, large in files beside the dataset, which several processes share."""

import contextlib
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.manifest import DatasetError
from shards.partitions.blocks import PART_BITS, Block, Cutter, joined, ranked, read_piece, write_block
from shards.partitions.engine import Read
from shards.partitions.events import Events
from shards.partitions.parts import LocalParts, in_order, shown_reading, write_part
from shards.partitions.worker import begin

EVENTS_IN_MEMORY = 4_000_000
"""More events than this are written to files: about 0.6 GB. Shared by all processes."""
_BYTES_FOR_A_POOL = 64 << 20
"""Smaller input is read before a pool has started."""


class LocalEngine:
    """Builds on this machine.

    Args:
        scratch: an empty folder for the files; None keeps all events in memory.
        pool: processes to read files and to change parts, if there are files; None: this process does.
        processes: their number.
        limit: events in memory.
    """

    def __init__(
        self,
        scratch: Path | None = None,
        pool: Executor | None = None,
        processes: int = 1,
        *,
        limit: int = EVENTS_IN_MEMORY,
    ) -> None:
        self._scratch, self._pool, self._limit = scratch, pool, limit // processes

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], together: str | None
    ) -> tuple[LocalParts[Events], pl.Series]:
        """See `Engine.partitioned`."""
        if self._pool is not None and self._scratch is not None and together is None and len(paths) > 1:
            cut = partial(_cut_file, read=read, seed=seed, scratch=self._scratch, limit=self._limit)
            tasks = [partial(cut, number, path) for number, path in enumerate(paths)]
            files = list(in_order(self._pool, tasks, "reading", "files"))
            for file in files:
                counts.update(file.counts)
            return self._parts(self._scratch, files)
        frames = shown_reading(read(paths, counts=counts), paths)
        cutter, blocks = _cut(frames, seed, self._scratch, self._limit, "all")
        if blocks and self._scratch is not None:
            return self._parts(self._scratch, [_File(blocks, cutter.items(), counts)])
        items, number_N = ranked(cutter.items())
        return LocalParts([joined([(cutter.cut(bits=0).piece(0), number_N)])]), items

    def _parts(self, scratch: Path, files: "list[_File]") -> tuple[LocalParts[Events], pl.Series]:
        """The parts of all files, in a file each."""
        items = pl.concat([file.items for file in files]).unique().sort()
        places = pl.DataFrame({"item": items}).with_row_index("place")
        numbers = []
        for number, file in enumerate(files):
            place_N = pl.DataFrame({"item": file.items}).join(places, on="item", how="left", maintain_order="left")
            numbers.append(scratch / f"items-{number}.npy")
            np.save(numbers[-1], place_N["place"].to_numpy())
        blocks = [(block, path) for file, path in zip(files, numbers, strict=True) for block in file.blocks]
        tasks = [partial(_write_part, scratch / f"part-{part:02d}", part, blocks) for part in range(1 << PART_BITS)]
        written = [path for path in in_order(self._pool, tasks, "partitioning") if path is not None]
        return LocalParts(written, self._pool), items


@dataclass(frozen=True)
class _File:
    """What was read: folders of blocks, raw ids of items by their codes in them, and what was dropped, by reason."""

    blocks: list[Path]
    items: pl.Series
    counts: Counter[str]


def _cut_file(number: int, path: Path, read: Read, seed: int, scratch: Path, limit: int) -> _File:
    counts: Counter[str] = Counter()
    cutter, blocks = _cut(read((path,), counts=counts), seed, scratch, limit, str(number))
    if cutter.held:
        blocks.append(_written(scratch, f"{number}-last", cutter.cut()))
    return _File(blocks, cutter.items(), counts)


def _cut(
    frames: Iterator[pl.DataFrame], seed: int, scratch: Path | None, limit: int, name: str
) -> tuple[Cutter, list[Path]]:
    """The folders of blocks of events beyond the limit, and a cutter that holds the rest."""
    cutter = Cutter(seed)
    blocks: list[Path] = []
    for frame in frames:
        cutter.add(frame)
        if scratch is not None and cutter.held > limit:
            blocks.append(_written(scratch, f"{name}-{len(blocks)}", cutter.cut()))
    if scratch is not None and blocks and cutter.held:
        blocks.append(_written(scratch, f"{name}-{len(blocks)}", cutter.cut()))
    return cutter, blocks


def _written(scratch: Path, name: str, block: Block) -> Path:
    folder = scratch / f"block-{name}"
    write_block(folder, block)
    return folder


def _write_part(path: Path, part: int, blocks: list[tuple[Path, Path]]) -> Path | None:
    """Write the part of all blocks; None: it has no events.

    Args:
        blocks: folders of blocks, and the file with the numbers of their item codes.
    """
    numbers: dict[Path, npt.NDArray[np.uint32]] = {file: np.load(file, mmap_mode="r") for _, file in blocks}
    events = joined((read_piece(folder, part), numbers[file]) for folder, file in blocks)
    if not events.frame.height:
        return None
    write_part(path, events)
    return path


@contextlib.contextmanager
def local_engine(
    scratch: Path,
    workers: int,
    paths: tuple[Path, ...],
    *,
    limit: int = EVENTS_IN_MEMORY,
    pool_bytes: int = _BYTES_FOR_A_POOL,
) -> Iterator[LocalEngine]:
    """An engine with `workers` processes, which end with it; with none but this one for input below `pool_bytes`."""
    if workers < 1:
        raise DatasetError(f"--workers {workers}: give at least 1")
    if workers == 1 or sum(path.stat().st_size for path in paths) < pool_bytes:
        yield LocalEngine(scratch, limit=limit)
        return
    # Not a fork: it would copy the locks of polars' threads as they are at that moment.
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger("shards").getEffectiveLevel()
    pool = ProcessPoolExecutor(workers, context, begin, (level, max((os.cpu_count() or 1) // workers, 1)))
    try:
        yield LocalEngine(scratch, pool, workers, limit=limit)
    finally:
        pool.shutdown(cancel_futures=True)
