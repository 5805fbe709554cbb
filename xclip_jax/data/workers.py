"""Reading processes that only their parent ends: signals to the process group pass them by, and its death ends them."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# A terminal's Ctrl-C, and a batch system that ends a job, send these to the whole process group.
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def shielded(elements: Iterator[Any]) -> Iterator[Any]:
    """Yield `elements`, of which the first `next` starts processes, with SIGINT and SIGTERM blocked in these.

    A thread asks for the first element: the threads and processes that it starts inherit its blocked signals, from
    their first instruction on. The calling thread goes on handling them.
    """

    def first() -> list[Any]:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        return list(itertools.islice(elements, 1))

    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        yield from pool.submit(first).result()
    finally:
        pool.shutdown(wait=False)
    yield from elements


def end_with_parent(*_: int) -> None:
    """End this process as soon as its parent has ended in whatever way. Called in a worker when it starts."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
