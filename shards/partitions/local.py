"""Builds on this machine: small input in memory, large in files beside the dataset, which several processes share."""

import contextlib
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.manifest import DatasetError
from shards.partitions.blocks import (
    PART_BITS,
    Block,
    Cutter,
    Piece,
    joined,
    places,
    ranked,
    read_piece,
    write_block,
)
from shards.partitions.engine import EVENTS_IN_MEMORY, Read
from shards.partitions.events import Events
from shards.partitions.parts import LocalParts, Pool, read_part, run_in_order, shown_reading, write_part
from shards.partitions.worker import begin, cores

_BYTES_FOR_A_POOL = 64 << 20
"""Smaller input is read before a pool has started."""


@dataclass(frozen=True)
class CutFile:
    """A file of events, cut into blocks: their folders, the file with raw ids of items by their codes in them, and what
    was dropped, by reason."""

    blocks: list[Path]
    items: Path
    counts: Counter[str]


class LocalEngine:
    """Builds on this machine.

    Args:
        scratch: an empty folder for the files; None keeps all events in memory.
        pool: reads files and changes parts, if there are files; None: this process does.
        limit: events in memory.
    """

    def __init__(self, scratch: Path | None = None, pool: Pool | None = None, *, limit: int = EVENTS_IN_MEMORY) -> None:
        self._scratch, self._pool, self._limit = scratch, pool, limit

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], order_option: str | None
    ) -> tuple[LocalParts[Events], pl.Series]:
        """See `Engine.partitioned`."""
        if self._pool is not None and self._scratch is not None and order_option is None and len(paths) > 1:
            limit = self._limit // self._pool.processes
            cut = partial(_cut_file, read=read, seed=seed, scratch=self._scratch, limit=limit)
            tasks = [partial(cut, number, path) for number, path in enumerate(paths)]
            files = list(run_in_order(self._pool, tasks, "reading", "files"))
            for file in files:
                counts.update(file.counts)
            return self._parts(self._scratch, files)
        cutter, blocks = _cut(shown_reading(read(paths, counts=counts), paths), seed, self._scratch, self._limit, "all")
        if blocks and self._scratch is not None:
            return self._parts(self._scratch, [_finished(cutter, blocks, self._scratch, "all", counts)])
        if not cutter.held:
            return LocalParts([]), cutter.items()
        items, number_N = ranked(cutter.items())
        return LocalParts([joined([(cutter.cut(bits=0).piece(0), number_N)])]), items

    def _parts(self, scratch: Path, files: list[CutFile]) -> tuple[LocalParts[Events], pl.Series]:
        """The parts of all files, in a file each."""
        items = pl.Series("item", [], pl.String)
        for file in files:
            items = pl.concat([items, _ids(file.items)]).unique()
        items = items.sort()
        write_part(scratch / "items", items)
        tasks = [partial(_write_places, file.items, scratch / "items") for file in files]
        numbers = run_in_order(self._pool, tasks, "numbering items", "files")
        cut = [(file.blocks, number) for file, number in zip(files, numbers, strict=True)]
        parts = [partial(_write_part, scratch / f"part-{part:02d}", part, cut) for part in range(1 << PART_BITS)]
        written = [path for path in run_in_order(self._pool, parts, "partitioning") if path is not None]
        return LocalParts(written, self._pool), items


def _cut_file(number: int, path: Path, read: Read, seed: int, scratch: Path, limit: int) -> CutFile:
    counts: Counter[str] = Counter()
    cutter, blocks = _cut(read((path,), counts=counts), seed, scratch, limit, str(number))
    return _finished(cutter, blocks, scratch, str(number), counts)


def _cut(
    frames: Iterable[pl.DataFrame], seed: int, scratch: Path | None, limit: int, name: str
) -> tuple[Cutter, list[Path]]:
    """The folders of blocks of events beyond the limit, and a cutter that holds the rest."""
    cutter = Cutter(seed)
    blocks: list[Path] = []
    for frame in frames:
        cutter.add(frame)
        if scratch is not None and cutter.held > limit:
            blocks.append(_written(cutter.cut(), scratch, f"{name}-{len(blocks)}"))
    return cutter, blocks


def _finished(cutter: Cutter, blocks: list[Path], scratch: Path, name: str, counts: Counter[str]) -> CutFile:
    """All blocks, with what the cutter holds."""
    if cutter.held:
        blocks = [*blocks, _written(cutter.cut(), scratch, f"{name}-{len(blocks)}")]
    items = scratch / f"items-{name}"
    write_part(items, cutter.items())
    return CutFile(blocks, items, counts)


def _written(block: Block, scratch: Path, name: str) -> Path:
    folder = scratch / f"block-{name}"
    write_block(folder, block)
    return folder


def _ids(path: Path) -> pl.Series:
    return cast(pl.Series, read_part(path))


def _write_places(ids: Path, among: Path) -> Path:
    """Write the places of a file's items among all, in the order of their codes."""
    file = ids.with_name(f"{ids.name}.npy")
    np.save(file, places(_ids(ids), _ids(among)))
    return file


def _write_part(path: Path, part: int, cut: list[tuple[list[Path], Path]]) -> Path | None:
    """Write the part of all blocks; None: it has no events.

    Args:
        cut: for each file the folders of its blocks, and the file with the numbers of its items.
    """

    def pieces() -> Iterator[tuple[Piece, npt.NDArray[np.uint32]]]:
        for blocks, numbers in cut:
            number_N = np.load(numbers)
            for block in blocks:
                yield read_piece(block, part), number_N

    if not any(blocks for blocks, _ in cut):
        return None
    events = joined(pieces())
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
    """An engine with `workers` processes, which end with it; with none but this one for input below `pool_bytes`.

    Raises:
        DatasetError: `workers` is less than 1.
    """
    if workers < 1:
        raise DatasetError(f"--workers {workers}: give at least 1")
    if workers == 1 or sum(path.stat().st_size for path in paths) < pool_bytes:
        yield LocalEngine(scratch, limit=limit)
        return
    # Not a fork: it would copy the locks of polars' threads as they are at that moment.
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger("shards").getEffectiveLevel()
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, context, begin, (level, max(cores() // workers, 1)))
    try:
        yield LocalEngine(scratch, Pool(executor, workers), limit=limit)
    except BaseException:
        # A task may be a large file, and nobody needs its result any more.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
