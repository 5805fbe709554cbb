"""Worker processes that only their parent ends: they ignore signals to the process group, and exit when it dies."""

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

from xclip_jax.errors import UserError

# A terminal's Ctrl-C, and a batch system that ends a job, send these to the whole process group.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def prepare(*_: int) -> None:
    """Ignore signals, and exit when the parent does. Called in each worker when it starts."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("prepare must be called in a worker process")

    def watch() -> None:
        parent.join()
        os._exit(1)

    # Not PR_SET_PDEATHSIG: Linux sends it at the end of the parent's thread that started the worker, which is sooner.
    threading.Thread(target=watch, daemon=True).start()


def shielded(elements: Iterator[Any]) -> Iterator[Any]:
    """Yield `elements`, whose first `next` starts workers, with signals blocked in these until `prepare` is called.

    A thread requests the first element: threads and processes that it starts inherit its blocked signals. The calling
    thread continues to handle them.

    Raises:
      UserError: a worker was killed.
    """

    def first() -> list[Any]:
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
            raise UserError(_death(int(match[1]))) from error
        raise


def _death(code: int) -> str:
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    reason = "most often too little memory" if code == -signal.SIGKILL else "its own error is above"
    return f"a reading process was ended by {by}, {reason}; lower data.workers, or run the same command again."
