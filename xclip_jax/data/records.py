"""Reads records ahead in threads; any fault of a record becomes a `BadSample`."""

import collections
import contextlib
import hashlib
import itertools
import multiprocessing.pool
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import Record, Source

MAX_THREADS = 16  # most threads, besides data.threads, for reading all records of a source at the start
READ_TIMEOUT = 300.0  # seconds to wait for a record before counting it as bad
_CHUNK = 32  # records that a thread reads one after another

T = TypeVar("T")


def read(source: Source, index: int) -> Record | BadSample:
    """Return record `index` of `source`, or a `BadSample` with the reason why it is unusable, see `as_bad_sample`."""
    try:
        return source[index]
    except Exception as error:
        return as_bad_sample(error)


def read_all(places: Sequence[tuple[Source, int]]) -> list[Record | BadSample]:
    """Return `read(source, index)` for each of `places`, and raise its errors.

    After `READ_TIMEOUT`, for example on an unresponsive disk, a record becomes a `BadSample`. Its read keeps a thread
    until the disk answers or the process ends.
    """

    def read_into(
        results: queue.SimpleQueue[Any], rest: Sequence[tuple[Source, int]], given_up: threading.Event
    ) -> None:
        try:
            for source, index in rest:
                results.put(read(source, index))
                if given_up.is_set():
                    return
        except BaseException as error:  # raised by the waiting thread
            results.put(error)

    done: list[Record | BadSample] = []
    while len(done) < len(places):
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        given_up = threading.Event()
        arguments = (results, places[len(done) :], given_up)
        threading.Thread(target=read_into, args=arguments, daemon=True, name="read").start()
        try:
            while len(done) < len(places):
                result = results.get(timeout=READ_TIMEOUT)
                if isinstance(result, BaseException) and not isinstance(result, BadSample):
                    raise result
                done.append(result)
        except queue.Empty:
            given_up.set()
            done.append(BadSample("read takes too long", f"more than {READ_TIMEOUT:g} s"))
    return done


def read_each(
    places: Iterable[tuple[Source, int]], take: Callable[[Record], T], *, threads: int
) -> Iterator[T | BadSample]:
    """Yield `take(record)` for each of `places`, in order, or the `BadSample` of an unusable record.

    Some `places`, (source, index), are read ahead. `take` is called in the threads; its result should be small, and a
    record for which it raises is bad. Neither a caller that stops iterating nor interpreter exit waits for reads.
    """

    def taken(record: Record | BadSample) -> T | BadSample:
        try:
            return record if isinstance(record, BadSample) else take(record)
        except Exception as error:
            return as_bad_sample(error)

    def work(chunk: Sequence[tuple[Source, int]]) -> list[T | BadSample]:
        return [taken(record) for record in read_all(chunk)]

    remaining = iter(places)
    waiting = collections.deque()
    with thread_pool(threads) as pool:
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            waiting.append(pool.apply_async(work, (chunk,)))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().get()
        while waiting:
            yield from waiting.popleft().get()


def reading_digest(numbers: np.ndarray, unreadable: int) -> dict[str, Any]:
    """Return JSON by which two readings of a source can be compared: a digest of `numbers`, and the bad records."""
    digest = hashlib.blake2b(np.ascontiguousarray(numbers, "<i8").tobytes(), digest_size=8).hexdigest()
    return {"digest": digest, "unreadable": unreadable}


def as_bad_sample(error: Exception) -> BadSample:
    """Convert an error of reading or decoding a record to a `BadSample`, with the error's class as its reason.

    A `UserError` or `MemoryError` is raised, since it affects more than the record.
    """
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (UserError, MemoryError)):
        raise error
    if isinstance(error, UnicodeDecodeError):
        return BadSample("caption is not UTF-8", str(error))
    return BadSample(type(error).__name__, str(error))


def cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_pool(threads: int = 0) -> multiprocessing.pool.ThreadPool:
    """Return a pool of `threads`, 0 for one per core.

    Unlike for concurrent.futures, interpreter exit does not wait for the threads, which may read an unresponsive disk.
    """
    return multiprocessing.pool.ThreadPool(threads or cores())


class ThreadPrefetcher(Sequence):
    """Sequence of make(0), make(1), ..., computed ahead in threads; each item may be read once, by any thread.

    Errors of `make` are raised on access to the item. The end of a `with` block ends the threads.
    """

    def __init__(self, make: Callable[[int], Any], n: int, *, threads: int = 0, window: int = 256) -> None:
        """Compute `make` of the indices below `n` in threads, 0 for one per core, from the first access on.

        Up to `window` items are computed ahead; accesses within it may be in any order.
        """
        self._make = make
        self._n = n
        self._window = window
        self._pool = thread_pool(threads)
        self._results: dict[int, multiprocessing.pool.AsyncResult[Any]] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:  # ty: ignore[incompatible-method-override] no slices
        index = range(self._n)[index]
        with self._lock:
            while self._next < min(self._n, index + 1 + self._window):
                self._results[self._next] = self._pool.apply_async(self._make, (self._next,))
                self._next += 1
            result = self._results.pop(index)
        return result.get()

    def __enter__(self) -> "ThreadPrefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()  # without waiting: a read may never end


def _next(elements: Iterator[T]) -> tuple[list[T], BaseException | None]:
    """Return the next element, if any, and any error: pools pass on an `Exception` only."""
    try:
        return list(itertools.islice(elements, 1)), None
    except BaseException as error:
        return [], error


def interruptible_iterator(elements: Iterator[T], check: Callable[[], None]) -> Iterator[T]:
    """Yield `elements`, requested by a thread, and call `check` every 0.2 s while waiting.

    If `check` raises, the thread is abandoned; otherwise `elements` is closed at the end.
    """
    with thread_pool(1) as pool:
        request = pool.apply_async(_next, (elements,))
        try:
            while True:
                while not request.ready():
                    request.wait(0.2)
                    if not request.ready():
                        check()
                following, error = request.get()
                if error is not None:
                    raise error
                if not following:
                    return
                yield following[0]
                request = pool.apply_async(_next, (elements,))
        finally:
            if request.ready():
                with contextlib.suppress(Exception):
                    getattr(elements, "close", lambda: None)()
