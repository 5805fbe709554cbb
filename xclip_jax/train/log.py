"""Metrics of a run: clock, metrics.jsonl, results.jsonl, trackers, progress line, callbacks, warnings of collapses."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_duration, log0
from xclip_jax.core.json_lines import JsonLines
from xclip_jax.data.ledger import BadSampleLog
from xclip_jax.evaluators.results import Result, flat, to_json
from xclip_jax.train import cost
from xclip_jax.train.callbacks import Callback, Trackers
from xclip_jax.train.prepare import Run, is_due
from xclip_jax.train.recovery import SkippedSteps

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
        """Start the clock of a process that `began`, by `time.perf_counter`, and starts or resumes at step `start`.

        `lines` are metrics logged by earlier processes, in order, including steps after `start`. The thread calls
        `on_step_end` when the devices have computed a step.
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
    def exclude(self, *, speed: bool = False) -> Iterator[None]:
        """Exclude work other than training from the goodput and, with `speed`, also from speed and waits."""
        began = time.perf_counter()
        try:
            yield
        finally:
            lost = time.perf_counter() - began
            self._lost += lost
            if speed:
                self._paused += lost
                self.wait_share()

    def steps_per_second(self) -> float:
        """Return the speed since the last call, or since the first step; 0 until the second step ends."""
        steps, time_before = self._measured
        if self._ended > steps and self._last_end > time_before:
            self._speed = (self._ended - steps) / (self._last_end - time_before)
            self._measured = (self._ended, self._last_end)
        return self._speed

    def goodput(self, step: int, wasted: int) -> dict[str, float]:
        """Return "goodput", "wall_seconds" and "useful_seconds" up to `step`, the last ended one.

        This process skipped or undid `wasted` steps.
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


def progress_line(step: int, metrics: Mapping[str, float], config: Config, terms: Sequence[str] = ()) -> str:
    """Return the printed line of a step; `terms` are the objective's parts of it."""
    parts = [f"step {step}/{config.steps}", f"loss {metrics['loss']:.3f}", *terms]
    if metrics.get("mfu"):
        parts.append(f"MFU {metrics['mfu']:.1%}")
    speed = metrics.get("samples_per_second")
    if speed:  # unknown after the first step
        left = format_duration((config.steps - step) * config.data.batch / speed)
        parts.append(f"{speed:,.2f} samples/s, {left} left")
    return "  ".join(parts)


class MetricLogger:
    """Logs metrics one step late, so the host never waits for the step just dispatched.

    Attributes:
      ledger: counts samples; synchronised between processes at logged steps.
      clock: measures speed and goodput.
      skipped: counts skipped steps, which are not logged.
    """

    def __init__(
        self,
        run: Run,
        start: int,
        ledger: BadSampleLog,
        skipped: SkippedSteps,
        callbacks: Sequence[Callback] = (),
        *,
        began: float,
        on_step_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the metrics of a run that starts or resumes at step `start`; see `Clock` for the last two arguments."""
        self.ledger = ledger
        self.skipped = skipped
        self._run = run
        self._callbacks = callbacks
        self._warned: set[str] = set()  # names of diagnosed collapses
        experiment = run.experiment
        devices = experiment.mesh.devices
        flops = cost.step_flops(run.config, experiment.length_groups, experiment.text_rows[0])
        self._flops = (flops or 0.0) / run.config.data.batch  # of a sample; 0 if unknown, like the peak FLOP/s
        self._peak = cost.PEAK_FLOPS.get(devices.flat[0].device_kind, 0.0) * devices.size
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        first = jax.process_index() == 0
        before = run.folder.read_metrics() if first else []
        # The last evaluation is repeated by a run that resumes at its last step, the first without a checkpoint.
        last = start - (start in (0, run.config.steps))
        self._metrics = JsonLines(
            run.folder.metrics_file, lambda line: line["step"] <= (start if "loss" in line else last), writes=first
        )
        self._evaluated = {line["step"] for line in self._metrics.kept if "loss" not in line}
        self._results = JsonLines(run.folder.results_log_file, lambda x: x["step"] in self._evaluated, writes=first)
        del self._metrics.kept, self._results.kept  # large in a long run
        self._trackers = Trackers(run.folder, run.config, start) if first else None
        self.clock = Clock(began, start, before, on_step_end)

    def log_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a dispatched step, and log those before it if they are due."""
        if self._pending:
            self.skipped.check(*self._pending)
            if is_due(self._run.config.log.every, self._pending[0]) or self._pending[0] == 1:
                self.flush()
        self._pending = (step, metrics)
        self.clock.step_started(metrics["loss"])
        if self.skipped.in_a_row:  # a rewind must come at the same step however the run was interrupted
            self.skipped.check(step, metrics)

    def flush(self) -> None:
        """Wait for the last step and log its metrics, unless they are logged already.

        `UserError` for too many skipped steps in a row (`Diverged`), or processes that read different samples.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        self.ledger.sync(step * self._run.config.data.batch)
        if self.skipped.check(step, metrics):
            return  # its values are in skipped_steps.jsonl
        scalars = {key: float(value) for key, value in jax.device_get(metrics).items() if key != "skipped"}
        self.clock.wait_for_steps()  # the speed counts this step
        config = self._run.config
        objective = self._run.experiment.objective
        samples = step * config.data.batch
        speed = self.clock.steps_per_second() * config.data.batch
        scalars |= {
            "lr": float(self._run.experiment.schedule(step - 1)),
            "samples": samples,
            "tokens": self.ledger.counters["tokens"],
            "epoch": samples / self._run.num_samples,
            "data/bad": self.ledger.bad,
            "data/bad_share": self.ledger.share,
            "data/wait_share": self.clock.wait_share(),
            "skipped_steps": self.skipped.total,
            "samples_per_second": speed,
        }
        if speed and self._flops:
            scalars["model_flops_per_second"] = speed * self._flops
            scalars |= {"mfu": speed * self._flops / self._peak} if self._peak else {}
        scalars |= self.clock.goodput(step, len(self.skipped.wasted))
        log0(progress_line(step, scalars, config, objective.progress(scalars)))
        for warning in objective.alarms(scalars) if step >= config.alarm_step else ():  # "NAME: fault"
            name = warning.split(":")[0]
            if name not in self._warned:
                self._warned.add(name)
                log0(f"WARNING, step {step}: {warning}")
        self._write(step, scalars)
        for callback in self._callbacks:
            callback.on_log(step, scalars)

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl had results of `step` when the run resumed, the same on every process."""
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(step in self._evaluated)))

    def write_results(self, step: int, results: Sequence[Result]) -> None:
        """Write evaluation results of all sets or some to the run's files and the trackers."""
        # results.jsonl first: a resumed run does not repeat an evaluation listed in metrics.jsonl.
        self._results.append({"step": step, "records": to_json(results)})
        self._results.flush()
        self._write(step, flat(results))
        self._metrics.flush()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._metrics.append({"step": step} | dict(scalars))
        if self._trackers:
            self._trackers.log(step, scalars)

    def end_evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Pass the results of all sets to the callbacks."""
        for callback in self._callbacks:
            callback.on_evaluation(step, results)

    @property
    def _files(self) -> Sequence[JsonLines]:
        return self.ledger.file, self.skipped.file, self._results, self._metrics

    def write(self) -> None:
        """Log the last step and write lines buffered for a bucket, which may refuse them with a warning."""
        self.flush()
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Log and write the rest; `OSError` if a store refuses a file."""
        self.write()
        for file in self._files:
            file.close()

    def end(self) -> None:
        """Write buffered lines, and close the trackers and the clock, also after an error."""
        self.clock.close()
        for file in self._files:
            file.flush()
        if self._trackers:
            self._trackers.close()
