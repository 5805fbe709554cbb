"""Speed of training: the progress line, and how long the devices wait for data."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax

from xclip_jax.core.console import format_duration

T = TypeVar("T")

# Input stalls above this fraction of the step time are reported.
INPUT_BOUND = 0.05


class Progress:
    """Training speed and time left, without pauses and the first step, which compiles."""

    def __init__(
        self,
        steps: int,
        batch: int,
        terms: Callable[[Mapping[str, float]], Sequence[str]] = lambda metrics: (),
    ) -> None:
        """Begin to count.

        Args:
          steps: of the whole run.
          batch: samples of a step.
          terms: metrics -> the objective's parts of the line.
        """
        self.steps, self.batch, self._terms = steps, batch, terms
        self._ended = 0
        self._first_end = self._last_end = 0.0  # without the pauses between them

    def tick(self) -> None:
        """Count a step; to be called when the devices have computed it, which may be before or after its dispatch."""
        self._last_end = time.perf_counter()
        if not self._ended:
            self._first_end = self._last_end
        self._ended += 1

    def pause(self, seconds: float) -> None:
        """Leave the last `seconds`, as of an evaluation, out of the speed."""
        self._first_end += seconds
        self._last_end += seconds

    def samples_per_second(self) -> float:
        """Return the training speed since the first step of this process has ended, 0 until the second has."""
        elapsed = self._last_end - self._first_end
        return (self._ended - 1) * self.batch / elapsed if self._ended > 1 and elapsed > 0 else 0.0

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return the line that is printed for a step."""
        speed = self.samples_per_second()
        left = format_duration((self.steps - step) * self.batch / speed) if speed else ""
        parts = [f"step {step}/{self.steps}", f"loss {metrics['loss']:.3f}", *self._terms(metrics)]
        if skipped := metrics.get("skipped_steps"):
            parts.append(f"skipped {skipped:.0f}")
        if (share := metrics.get("data/wait_share", 0.0)) > INPUT_BOUND:
            parts.append(f"input-bound: {share:.0%}")
        if mfu := metrics.get("mfu"):
            parts.append(f"MFU {mfu:.1%}")
        shown = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        return "  ".join([*parts, f"{shown} samples/s, {left} left" if speed else "(compiled)"])


class InputStallTimer:
    """Measures how long the devices are idle because the next batch is not ready.

    A loop that waits for data while the devices compute loses nothing: a thread notes when each step ends.

    Attributes:
      total: seconds since the first step.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Start the thread, which calls `on_end` whenever a step has ended."""
        self._on_end = on_end
        self._steps: queue.Queue[jax.Array | None] = queue.Queue()
        self._started = self._ended = 0
        self._ended_at = self._since = time.perf_counter()
        self._seconds = self.total = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while (value := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # the loop raises it too
                value.block_until_ready()
            self._ended_at = time.perf_counter()
            self._ended += 1
            self._on_end()
            self._steps.task_done()
        self._steps.task_done()

    def settle(self) -> None:
        """Wait until the thread has noted the end of every step; no longer than the devices compute them."""
        self._steps.join()

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, timed."""
        began = time.perf_counter()
        for batch in batches:
            if self._started and self._started == self._ended:
                stalled = time.perf_counter() - max(began, self._ended_at)
                self._seconds += stalled
                self.total += stalled
            yield batch
            began = time.perf_counter()

    def step_started(self, value: jax.Array) -> None:
        """Count a step; to be called with one of its results as soon as it is dispatched."""
        if not self._started:
            self.share()  # the time before the first step, as of starting workers, does not count
        self._started += 1
        self._steps.put(value)

    def share(self) -> float:
        """Return the stalled share of the time since the last call."""
        now = time.perf_counter()
        share = self._seconds / max(now - self._since, 1e-9)
        self._since, self._seconds = now, 0.0
        return share

    def close(self) -> None:
        """End the thread."""
        self._steps.put(None)
