"""Batches of a run, from its sources to arrays on the devices, watched and timed."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

from xclip_jax.core.errors import public
from xclip_jax.data import loader
from xclip_jax.data.ledger import Ledger
from xclip_jax.data.records import interruptible_iterator
from xclip_jax.processes.interrupt import PreemptionHandler
from xclip_jax.processes.watchdog import COMPILATION, DATA, STEP, Watchdog
from xclip_jax.train.job import Job

T = TypeVar("T")

INPUT_BOUND = 0.05  # share of the time spent waiting for data above which it is reported


def batches(
    job: Job, start: int, ledger: Ledger, timer: "InputStallTimer", watch: Watchdog, stop: PreemptionHandler
) -> Iterator[dict[str, jax.Array]]:
    """Yield the global batches from step `start` to the end of the run, {"image": (b, h, w, 3), "text": (b, n), ...}.

    `timer` measures how long the devices wait for a batch, `watch` is told what the run waits for, and an interrupt
    by `stop` does not wait for the next batch.
    """
    experiment, part = job.experiment, job.part
    config, data = experiment.config, experiment.config.data
    rows = loader.batches(
        job.order,
        loader.Transform(
            data,
            experiment.image_size,
            experiment.tokenizer,
            experiment.context_length,
            experiment.objective.fields,
        ),
        batch=data.batch,
        start=start,
        stop=config.steps,
        seed=config.seed,
        host=part.number,
        hosts=part.count,
        shards=part.shards,
        ledger=ledger,
    )
    sources = public(f" from {', '.join(job.config.data.sources)}")
    watch.enter(DATA, sources)
    for local in timer(interruptible_iterator(rows, stop.check_alone)):
        watch.enter(STEP if stop.saves else COMPILATION)
        # Steps are dispatched without waiting: this batch travels to the devices while they compute the last step.
        yield loader.to_global(local, experiment.mesh)
        watch.enter(DATA, sources)


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
