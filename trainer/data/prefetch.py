"""Prepares the next items of an iterator in a thread, while the caller works on the current one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

ItemT = TypeVar("ItemT")


class Prefetched(Generic[ItemT]):
    """The items of `source`, in order, prepared by a thread.

    An exception of the source is raised here when its item is asked for, not earlier, with its type and traceback.

    The thread ends with the source, after an exception, and on `close`, which also happens when the object is collected
    and before the interpreter exits. It cannot be interrupted: `close` waits until the item in work is done.

    Args:
        source: used by the thread alone from now on.
        ahead: most items that are kept ready, at least 1.
    """

    def __init__(self, source: Iterator[ItemT], ahead: int) -> None:
        line: _Line[ItemT] = _Line(threading.Semaphore(ahead))
        # A daemon, because the interpreter joins all other threads before it calls the finalizers that end this one.
        thread = threading.Thread(target=_fill, args=(line, source), name="prefetch", daemon=True)
        self._line = line
        self._finalizer = weakref.finalize(self, _end, line, thread)
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        if not self._finalizer.alive:
            raise StopIteration
        found = self._line.ready.get()
        self._line.room.release()
        if isinstance(found, _Raised):
            self.close()
            raise found.error
        return found

    def close(self) -> None:
        """End the thread and drop what it has prepared; no more items follow."""
        self._finalizer()


@dataclass(frozen=True)
class _Raised:
    error: BaseException
    """`StopIteration` at the end of the source."""


@dataclass
class _Line(Generic[ItemT]):
    """What thread and consumer share. The thread has no reference to the `Prefetched`, which can so be collected."""

    room: threading.Semaphore
    """How many more items may be prepared."""
    ready: SimpleQueue[ItemT | _Raised] = field(default_factory=SimpleQueue)
    closed: bool = False


def _fill(line: _Line[ItemT], source: Iterator[ItemT]) -> None:
    """Work of the thread."""
    try:
        while line.room.acquire() and not line.closed:
            line.ready.put(next(source))
    except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread, which would wait forever without it
        line.ready.put(_Raised(error))


def _end(line: _Line[ItemT], thread: threading.Thread) -> None:
    line.closed = True
    line.room.release()
    if thread is not threading.current_thread():  # where the garbage collector may run this
        thread.join()
