"""Prefetching in threads, so that devices need not wait for a disk or a decoder."""

import contextlib
import multiprocessing.pool
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from xclip_jax.errors import UserError

T = TypeVar("T")


class ThreadPrefetcher(Sequence):
    """make(0), make(1), ..., computed ahead in threads; each may be read once. `with` ends the threads.

    An error of `make` is raised where its item is read.
    """

    def __init__(self, make: Callable[[int], Any], n: int, *, threads: int = 0, window: int = 256) -> None:
        """Work starts with the first access.

        Args:
          make: function of an index below `n`; called in threads.
          n: number of items.
          threads: 0 for one a core.
          window: number of items that are computed ahead; the order of accesses may differ within it.

        Raises:
          UserError: a number of threads below 0.
        """
        if threads < 0:
            raise UserError(f"threads is {threads}; it must be 0, for one a core, or more.")
        self._make, self._n, self._window = make, n, window
        # Not an executor of concurrent.futures: Python's exit waits for its threads, for ever where a disk does not
        # answer.
        self._pool = multiprocessing.pool.ThreadPool(threads or os.cpu_count())
        self._results: dict[int, multiprocessing.pool.AsyncResult[Any]] = {}
        self._next = 0

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:  # ty: ignore[incompatible-method-override] no slices
        if not 0 <= index < self._n:
            raise IndexError(index)
        while self._next < min(self._n, index + 1 + self._window):
            self._results[self._next] = self._pool.apply_async(self._make, (self._next,))
            self._next += 1
        try:
            return self._results.pop(index).get()
        except UserError as error:
            raise error.with_traceback(None) from error.__cause__  # without the calls of the thread

    def __enter__(self) -> "ThreadPrefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()  # without waiting: one that reads may never end


def patient(elements: Iterator[T], check: Callable[[], None], seconds: float = 0.2) -> Iterator[T]:
    """Yield `elements`, each requested in a thread of its own, and call `check` every `seconds` while they do not come.

    `check` may raise: the thread that waits is then left behind. Otherwise `elements` are closed at the end.
    """
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def read() -> None:
        while requests.get():
            try:
                results.put((next(elements), None))
            except BaseException as error:
                results.put((None, error))
                break
        with contextlib.suppress(Exception):
            getattr(elements, "close", lambda: None)()

    reader = threading.Thread(target=read, daemon=True, name="batches")
    reader.start()
    waiting = False
    try:
        while True:
            requests.put(True)
            waiting = True
            while waiting:
                try:
                    element, error = results.get(timeout=seconds)
                    waiting = False
                except queue.Empty:
                    check()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield element
    finally:
        requests.put(False)
        if not waiting:
            reader.join()
