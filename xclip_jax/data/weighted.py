"""A semaphore for things of different sizes, such as images that threads decode at the same time."""

import contextlib
import threading
from collections.abc import Iterator


class WeightedSemaphore:
    """What threads hold at once adds up to `limit` at most; they get it in the order in which they ask for it.

    A thread must not ask for more while it holds something: two that do would wait for each other.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._next = threading.Lock()  # of those that wait the first has it, and none that needs less overtakes it
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Context that holds `amount`, or all of `limit` where that is less; waits until as much is free."""
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
