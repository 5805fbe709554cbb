"""The clock of a run: speed, the devices' waits for data, and goodput."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax

T = TypeVar("T")

INPUT_BOUND = 0.05  # share of the time spent waiting for data above which it is reported
WALL, USEFUL = "wall_seconds", "useful_seconds"


class Clock:
    """Measures the time of a run, over this process and earlier ones. A thread records when the devices end a step.

    Goodput is useful time over wall time. Wall time is the sum over the run's processes, each from its start to its
    last line of metrics. Useful is the time since the first dispatched step, without lost time (evaluations,
    checkpoints, rewinds, traces), waits for data, and the shares of skipped or undone steps. Work of earlier processes
    after the restored checkpoint is not useful.
    """

    def __init__(
        self,
        began: float,
        start: int = 0,
        lines: Iterable[Mapping[str, float]] = (),
        on_step_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the clock.

        Args:
          began: start of the process, by `time.perf_counter`.
          start: the step that it starts or resumes from.
          lines: metrics logged by earlier processes, in order, including steps after `start`.
          on_step_end: called in the thread when the devices have computed a step.
        """
        self._began = began
        self._start = start
        self._on_step_end = on_step_end
        self._wall = self._useful = 0.0  # accumulated by earlier processes
        for line in lines:
            self._wall = max(self._wall, line.get(WALL, 0.0))
            if line["step"] <= start:
                self._useful = line.get(USEFUL, self._useful)
        self._first: float | None = None  # when the first step was dispatched
        self._lost = self._paused = self._waited = self._waited_lately = 0.0
        self._started = self._ended = 0
        self._since = self._ended_at = time.perf_counter()
        self._last_end = 0.0  # of a step, without pauses
        self._speed = 0.0
        self._measured = (1, 0.0)  # steps and time at the last measurement of the speed
        self._steps: queue.Queue[jax.Array | None] = queue.Queue()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while (value := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # the loop raises it too
                value.block_until_ready()
            self.step_ended()
            self._steps.task_done()
        self._steps.task_done()

    def step_ended(self) -> None:
        """Record the end of a step on the devices, before or after its dispatch is recorded."""
        self._ended_at = time.perf_counter()
        self._last_end = self._ended_at - self._paused
        if not self._ended:
            self._measured = (1, self._last_end)
        self._ended += 1
        self._on_step_end()

    def step_started(self, value: jax.Array) -> None:
        """Record a dispatched step; `value` is any of its outputs. Time before the first one counts as start-up."""
        if self._first is None:
            self._first = time.perf_counter()
            self._lost = 0.0
            self.wait_share()
        self._started += 1
        self._steps.put(value)

    def wait_for_steps(self) -> None:
        """Wait until the end of every dispatched step is recorded."""
        self._steps.join()

    def count_waits(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, and measure the waits of idle devices."""
        began = time.perf_counter()
        for batch in batches:
            if self._started and self._started == self._ended:
                waited = time.perf_counter() - max(began, self._ended_at)
                self._waited += waited
                self._waited_lately += waited
            yield batch
            began = time.perf_counter()

    def wait_share(self) -> float:
        """Return the fraction of the time since the last call that the devices waited for data."""
        now = time.perf_counter()
        share = self._waited_lately / max(now - self._since, 1e-9)
        self._since = now
        self._waited_lately = 0.0
        return share

    @contextlib.contextmanager
    def exclude_from_goodput(self) -> Iterator[None]:
        """Exclude work that training waits for, such as a checkpoint, from the goodput."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lost += time.perf_counter() - began

    @contextlib.contextmanager
    def exclude_from_speed(self) -> Iterator[None]:
        """Exclude work other than training, such as an evaluation, from goodput, speed and waits."""
        began = time.perf_counter()
        try:
            with self.exclude_from_goodput():
                yield
        finally:
            self._paused += time.perf_counter() - began
            self.wait_share()

    def steps_per_second(self) -> float:
        """Return the speed since the last call, or since the first step; 0 until the second step ends."""
        steps, time_before = self._measured
        if self._ended > steps and self._last_end > time_before:
            self._speed = (self._ended - steps) / (self._last_end - time_before)
            self._measured = (self._ended, self._last_end)
        return self._speed

    def goodput(self, step: int, wasted: int) -> dict[str, float]:
        """Return "goodput", "wall_seconds" and "useful_seconds" up to `step`.

        Args:
          step: the last ended step.
          wasted: steps skipped or undone by this process.
        """
        now = time.perf_counter()
        computing = 0.0 if self._first is None else max(0.0, now - self._first - self._lost - self._waited)
        steps = max(step - self._start, 1)
        wall = self._wall + now - self._began
        useful = max(0.0, self._useful + computing * (steps - wasted) / steps)
        return {"goodput": useful / wall if wall > 0 else 0.0, WALL: wall, USEFUL: useful}

    def close(self) -> None:
        """End the thread."""
        self._steps.put(None)
