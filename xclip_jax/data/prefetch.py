"""Items that threads make before they are asked for, so that devices need not wait for a disk or a decoder."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any

from xclip_jax.errors import UserError


class Ahead(Sequence):
    """make(0), make(1), ..., each to be asked for once; `with` ends the threads.

    An error of `make` is raised where its item is asked for.
    """

    def __init__(self, make: Callable[[int], Any], n: int, *, threads: int = 0, window: int = 256) -> None:
        """Starts nothing yet.

        Args:
          make: of an index below `n`; called in threads.
          n: how many items there are.
          threads: 0 for one a core.
          window: how many are made ahead; they may be asked for in another order within so many.

        Raises:
          UserError: a number of threads below 0.
        """
        if threads < 0:
            raise UserError(f"threads is {threads}; it must be 0, for one a core, or more.")
        self._make, self._n, self._window = make, n, window
        self._pool = concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count())
        self._waiting: dict[int, concurrent.futures.Future] = {}
        self._next = 0

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._n:
            raise IndexError(index)
        while self._next < min(self._n, index + 1 + self._window):
            self._waiting[self._next] = self._pool.submit(self._make, self._next)
            self._next += 1
        return self._waiting.pop(index).result()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
