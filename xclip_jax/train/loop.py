"""The training loop: batches, steps, checkpoints and evaluations during training."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from xclip_jax.core import console
from xclip_jax.core.console import log0
from xclip_jax.core.errors import describe, redact
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import loader
from xclip_jax.data.ledger import TooManyBadSamples
from xclip_jax.data.records import interruptible_iterator
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import TooManyUnreadable
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.processes.interrupt import Interrupted, PreemptionHandler
from xclip_jax.processes.watchdog import CHECKPOINT, COMPILATION, DATA, EVALUATION, STEP, Watchdog
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.job import Job
from xclip_jax.train.log import MetricLogger, is_due
from xclip_jax.train.state import TrainState

_PERFETTO = "perfetto_trace.json.gz"


def train(
    job: Job, state: TrainState, log: MetricLogger, checkpointer: Checkpointer, watch: Watchdog, stop: PreemptionHandler
) -> tuple[TrainState, bool]:
    """Train `state` to the end of the run, or save it at an interrupt. Returns it, and whether it was interrupted."""
    config, experiment, start = job.config, job.experiment, int(state.step)
    step, tracer = start, StepTracer(config.log.profile, job.folder, log.clock.pause)
    arrays = batches(job, start, log, watch, stop)  # closed last: it may take long

    def save(*, regular: bool = False) -> None:
        watch.enter(CHECKPOINT)
        with _logged(log, checkpointer):
            # Skipped steps change no parameters, and their checkpoints would push out earlier ones.
            if regular and log.skipped.in_a_row:
                return
            with log.clock.stall():
                b = job.config.data.batch
                position = {"samples": step * b, "batch": b, "seed": job.config.seed, "counters": log.ledger.counters}
                checkpointer.save(state, position)
            watch.saved = step

    try:
        stop.check()
        log.ledger.check()
        # A run that stopped between a checkpoint and the evaluation of the same step makes that evaluation now.
        if (due := _due(job, start)) and not log.has_evaluation(start):
            _evaluate(due, start, state.variables(ema=config.eval.ema), log, watch, stop)
        for batch in arrays:
            state, metrics = tracer(step + 1, experiment.compiled, state, batch)
            step, watch.step, stop.saves = step + 1, step + 1, True
            log.log_step(step, metrics)
            checkpointer.raise_failure()  # of a save in the background
            if log.skipped.exceeded:
                with log.clock.stall():
                    state = log.skipped.rewind(state)
            stop.check()
            log.ledger.check()
            if is_due(config.checkpoint.every, step) or step == config.steps:
                save(regular=step < config.steps)
            if due := _due(job, step):
                _evaluate(due, step, state.variables(ema=config.eval.ema), log, watch, stop)
        log.flush()
        log.ledger.check()
        return state, False
    except Interrupted:
        if step > start:
            save()
        return state, True
    except Exception as error:
        if step > start and _can_save_after(error, watch.phase):
            save()
            if step in checkpointer.steps():  # waits for the save: each of several processes ends as soon as it raises
                error.add_note(f"the state of step {step} is saved")
        raise
    finally:
        watch.enter(CHECKPOINT)  # closing the checkpointer waits for a save
        tracer.close()


@contextlib.contextmanager
def _logged(log: MetricLogger, checkpointer: Checkpointer) -> Iterator[None]:
    """Log the last step before a save in this context: a run that resumes does not log the steps before it again.

    The error of a disk that refuses the log is raised after the save, which may go to another disk.
    """
    try:
        log.write()
    except OSError:
        yield
        checkpointer.steps()  # waits for the save
        raise
    yield


def batches(
    job: Job, start: int, log: MetricLogger, watch: Watchdog, stop: PreemptionHandler
) -> Iterator[dict[str, jax.Array]]:
    """Yield the global batches from step `start` to the end of the run, {"image": (b, h, w, 3), "text": (b, n), ...}.

    The clock of `log` measures waits, and an interrupt does not wait for the next batch.
    """
    experiment, part = job.experiment, job.part
    config = experiment.config
    rows = loader.batches(
        job.order,
        experiment.transform(),
        batch=config.data.batch,
        start=start,
        stop=config.steps,
        seed=config.seed,
        host=part.number,
        hosts=part.count,
        shards=part.shards,
        ledger=log.ledger,
    )
    sources = redact(f" from {', '.join(job.config.data.sources)}")
    watch.enter(DATA, sources)
    for local in log.clock.timed(interruptible_iterator(rows, stop.check_alone)):
        watch.enter(STEP if stop.saves else COMPILATION)
        # Steps are dispatched without waiting: this batch travels to the devices while they compute the last step.
        yield loader.to_global(local, experiment.mesh)
        watch.enter(DATA, sources)


def _can_save_after(error: Exception, phase: str) -> bool:
    """Whether the state of the last step is whole after an error, and all processes are there to save it."""
    # With several processes the others have already dispatched the next step, which donates the state, so only errors
    # that all raise at the same step can be saved. An error in a step may leave no state.
    alone = jax.process_count() == 1
    return isinstance(error, TooManyBadSamples) or (alone and phase in (DATA, EVALUATION))


@contextlib.contextmanager
def evaluating(watch: Watchdog, stop: PreemptionHandler, phase: str = EVALUATION) -> Iterator[None]:
    """Evaluate in this context: an interrupt leaves it between two batches, a signal to a single process at once."""

    def observe(all_processes: bool) -> None:
        watch.beat()
        if all_processes:
            stop.check()

    watch.enter(phase)
    with console.observing_progress(observe), stop.interruptible():
        yield


def _due(job: Job, step: int) -> Sequence[Evaluator]:
    """Return the evaluators that run after `step`, or before the first step if it is 0; the last step has its own."""
    if step == 0:
        return job.before
    return job.during if step < job.config.steps and is_due(job.config.eval.every, step) else ()


def _evaluate(
    evaluators: Sequence[Evaluator],
    step: int,
    variables: Variables,
    log: MetricLogger,
    watch: Watchdog,
    stop: PreemptionHandler,
) -> None:
    """Evaluate before or during training; the speed excludes the time that it takes.

    A set whose images cannot be read during training is a warning: at the end of the run they may be readable again.
    """
    log.flush()
    results: list[Result] = []
    with log.clock.pause():
        with evaluating(watch, stop):
            for evaluator in evaluators:
                try:
                    results += registry.measure(evaluator, variables)
                except TooManyUnreadable as error:
                    if step == 0:
                        raise
                    log0(f"WARNING: {evaluator.name} has no result of step {step}: {error}")
        if results:
            log.write_results(step, results)
            log.end_evaluation(step, results)
            log0(f"step {step}: {tables.headlines(results)}")


class StepTracer:
    """Runs the steps, and traces the steps of `log.profile` with JAX's profiler; a trace that fails is a warning.

    The trace starts when the steps before it have ended, and ends when the traced ones have.
    """

    def __init__(
        self,
        steps: Sequence[int],
        folder: RunReader,
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Trace from the first to the last of `steps`, or nothing, into `folder`, in the context `pause`."""
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._path, self._pause = folder.profile, pause
        self._local: tempfile.TemporaryDirectory[str] | None = None  # the profiler cannot write to a bucket

    def __call__(self, step: int, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, the results of step number `step`."""
        if step in self._steps and self._local is None:
            jax.block_until_ready(args)
            with self._guarded():
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # Python calls of data threads would fill the trace
                local = tempfile.TemporaryDirectory(prefix="xclip_jax_profile_", ignore_cleanup_errors=True)
                jax.profiler.start_trace(local.name, create_perfetto_trace=True, profiler_options=options)
                self._local = local
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = function(*args)
        if self._local is not None and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """Write a trace that is in progress, such as one that an interrupt cut short."""
        if self._local is not None:
            folder, self._local = self._local, None
            steps, self._steps = self._steps, range(0)
            with self._guarded(), folder as local:
                jax.profiler.stop_trace()
                for file in filter(pathlib.Path.is_file, pathlib.Path(local).rglob("*")):
                    copy = self._path / file.relative_to(local)
                    if jax.process_count() > 1 and copy.name == _PERFETTO:  # without a host in its name
                        copy = copy.with_name(f"process-{jax.process_index()}.{copy.name}")
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
                log0(
                    f"profile of steps {steps[0]} to {steps[-1]}: {self._path}; open it with xprof --logdir "
                    f"{self._path} (pip install xprof), or its {_PERFETTO} at https://ui.perfetto.dev"
                )

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with self._pause():
                yield
        except Exception as error:
            self._steps = range(0)
            log0(f"WARNING: the steps of log.profile cannot be traced: {describe(error)}")
