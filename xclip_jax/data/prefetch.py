"""Reading ahead in threads and worker processes, so that devices need not wait for a disk or a decoder."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing.pool
import multiprocessing.resource_tracker
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from xclip_jax.core.errors import UserError

T = TypeVar("T")

# A terminal's Ctrl-C, and a batch system that ends a job, send these to the whole process group.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORKER_ENDINGS = {
    signal.SIGKILL: "most often too little memory",
    signal.SIGBUS: "most often too little shared memory (docker run --shm-size)",
}


def thread_pool(threads: int = 0) -> multiprocessing.pool.ThreadPool:
    """Return a pool of `threads`, 0 for one a core, that a process may leave behind when it exits.

    Not an executor of concurrent.futures: Python's exit waits for its threads, forever if a disk does not answer.
    """
    return multiprocessing.pool.ThreadPool(threads or os.cpu_count())


class ThreadPrefetcher(Sequence):
    """make(0), make(1), ..., computed ahead in threads; each may be read once. `with` ends the threads.

    An error of `make` is raised when its item is read.
    """

    def __init__(self, make: Callable[[int], Any], n: int, *, threads: int = 0, window: int = 256) -> None:
        """Work starts with the first access.

        Args:
          make: function of an index below `n`; called in threads.
          n: number of items.
          threads: 0 for one a core.
          window: number of items that are computed ahead; the order of accesses may differ within it.

        Raises:
          UserError: a negative number of threads.
        """
        if threads < 0:
            raise UserError(f"threads is {threads}; it must be 0, for one a core, or more.")
        self._make, self._n, self._window = make, n, window
        self._pool = thread_pool(threads)
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
        self._pool.terminate()  # without waiting: a read may never end


class WeightedSemaphore:
    """Limits a sum over threads, such as the pixels that are decoded at the same time. Requests are served in order.

    A thread must not request more while it holds some: two such threads would wait for each other.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._next = threading.Lock()  # held by the first in the queue, so that smaller requests cannot overtake it
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Context that holds `amount`, or all of `limit` if that is less; waits until as much is free."""
        amount = min(amount, self.limit)
        with self._next, self._changed:
            self._changed.wait_for(lambda: self._held + amount <= self.limit)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify()


def interruptible_iterator(elements: Iterator[T], check: Callable[[], None], seconds: float = 0.2) -> Iterator[T]:
    """Yield `elements`, and call `check` every `seconds` while the next one is not ready.

    A thread requests the elements. If `check` raises, that thread is left behind; otherwise `elements` is closed at the
    end.
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


def init_worker(*_: int) -> None:
    """Initialise a worker process: ignore signals to the process group, and exit when the parent does."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("init_worker must be called in a worker process")

    def watch() -> None:
        parent.join()
        os._exit(1)

    # Not PR_SET_PDEATHSIG: Linux sends it at the end of the parent's thread that started the worker, which is sooner.
    threading.Thread(target=watch, daemon=True).start()


def start_workers_with_signals_blocked(elements: Iterator[T]) -> Iterator[T]:
    """Yield `elements`, whose first `next` starts worker processes, with signals blocked in them until `init_worker`.

    A thread requests the first element: threads and processes that it starts inherit its blocked signals. The calling
    thread continues to handle them.

    Raises:
      UserError: a worker was killed.
    """

    def first() -> list[T]:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        return list(itertools.islice(elements, 1))

    # Otherwise it would be started with the first worker, and unblock the signals.
    multiprocessing.resource_tracker.ensure_running()
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        try:
            yield from pool.submit(first).result()
        finally:
            pool.shutdown(wait=False)
        yield from elements
    except RuntimeError as error:
        if match := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):
            raise UserError(_describe_worker_exit(int(match[1]))) from error
        raise


def _describe_worker_exit(code: int) -> str:
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    reason = _WORKER_ENDINGS.get(-code, "its own error is above")
    return f"a reading process was ended by {by}, {reason}; lower data.workers, or run the same command again."
