"""The training loop: batches, steps, checkpoints and evaluations during training."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax

from xclip_jax.core import console
from xclip_jax.core.console import log0
from xclip_jax.core.errors import redact
from xclip_jax.data import loader
from xclip_jax.data.ledger import TooManyBadSamples
from xclip_jax.data.records import interruptible_iterator
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import TooManyUnreadable
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.processes.interrupt import Interrupted, PreemptionHandler
from xclip_jax.processes.watchdog import CHECKPOINT, COMPILATION, DATA, EVALUATION, STEP, Watchdog
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import MetricLogger
from xclip_jax.train.prepare import Run, is_due
from xclip_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Session:
    """A run in this process, and everything that the training loop reports to: log, checkpoints, watchdog, signals."""

    run: Run
    log: MetricLogger
    checkpointer: Checkpointer
    watch: Watchdog
    stop: PreemptionHandler

    def check(self) -> None:
        """Raise `Interrupted` if the run should stop here, or `UserError` for too many bad samples."""
        self.stop.check()
        self.log.ledger.check()

    @contextlib.contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Enter a phase of the watchdog that an interrupt leaves between batches, or at once in a single process."""

        def observe(all_processes: bool) -> None:
            self.watch.progress()
            if all_processes:
                self.stop.check()

        with self.watch.phase(name), console.observing_progress(observe), self.stop.interruptible():
            yield

    def save(self, state: TrainState, step: int) -> None:
        """Write the log, which a resumed run does not repeat, and then a checkpoint."""
        self.log.write()
        batch = self.run.config.data.batch
        counters = self.log.ledger.counters
        position = {"samples": step * batch, "batch": batch, "seed": self.run.config.seed, "counters": counters}
        with self.watch.phase(CHECKPOINT), self.log.clock.exclude():
            self.checkpointer.save(state, position)

    def evaluate(
        self, evaluators: Sequence[Evaluator], step: int, variables: Variables
    ) -> tuple[list[Result], dict[str, str]]:
        """Evaluate and log the results; the measured speed excludes this time.

        Returns:
          The results, and the reasons of failed sets by name. Any failure is tolerated after the last step; during
          training only unreadable images are, which may be readable again later.
        """
        last = step == self.run.config.steps
        results: list[Result] = []
        failed: dict[str, str] = {}
        self.log.flush()
        with self.log.clock.exclude(speed=True):
            for evaluator in evaluators:
                try:
                    with self.phase(EVALUATION):
                        results += registry.measure(evaluator, variables)
                except Exception as error:
                    if last:
                        failed[evaluator.name] = registry.note_failure(evaluator, error)
                    elif step > 0 and isinstance(error, TooManyUnreadable):
                        failed[evaluator.name] = str(error)
                        log0(f"WARNING: {evaluator.name} has no result of step {step}: {error}")
                    else:
                        raise
            if results:
                self.log.write_results(step, results)
                if not (last and failed):
                    self.log.end_evaluation(step, results)
                if not last:
                    log0(f"step {step}: {tables.headlines(results)}")
        return results, failed


def train(session: Session, state: TrainState) -> tuple[TrainState, bool]:
    """Train `state` to the end of the run, or save it at an interrupt; return it, and whether it was interrupted."""
    run = session.run
    log = session.log
    config = run.config
    start = int(state.step)
    step = start
    arrays = batches(session, start)  # closed last: it may take long
    try:
        session.check()
        # The run may have stopped between a checkpoint and the evaluation of the same step.
        due = run.evaluators_of(start)
        if due and not log.has_evaluation(start):
            session.evaluate(due, start, state.variables(ema=config.eval.ema))
        for batch in arrays:
            state, metrics = run.experiment.compiled(state, batch)
            step += 1
            session.stop.can_save = True
            session.watch.enter(STEP)  # not the compilation, which a signal ends without a checkpoint
            log.log_step(step, metrics)
            session.checkpointer.raise_failure()  # of a save in the background
            if log.skipped.exceeded:
                with log.clock.exclude():
                    state = log.skipped.rewind(state)
            session.check()
            if step == config.steps:
                session.save(state, step)
            elif is_due(config.checkpoint.every, step):
                log.flush()
                # After skipped steps the parameters are unchanged, and a checkpoint would push out an earlier one.
                if not log.skipped.in_a_row:
                    session.save(state, step)
            due = run.evaluators_of(step)
            if due:
                session.evaluate(due, step, state.variables(ema=config.eval.ema))
        log.flush()
        log.ledger.check()
        return state, False
    except Interrupted:
        if step > start:
            session.save(state, step)
        return state, True
    except Exception as error:
        # Errors of data and evaluations leave the last state intact, an error in a step may not. Other processes have
        # already dispatched the next step, which donates the state, unless all raise the same error.
        alone = jax.process_count() == 1 and session.watch.current in (DATA, EVALUATION)
        if step > start and (alone or isinstance(error, TooManyBadSamples)):
            session.save(state, step)
            # Waits for the save: a process of several ends as soon as it raises.
            if step in session.checkpointer.steps():
                error.add_note(f"the state of step {step} is saved")
        raise
    finally:
        session.watch.enter(CHECKPOINT)  # closing the checkpointer waits for a save


def batches(session: Session, start: int) -> Iterator[dict[str, jax.Array]]:
    """Yield the global batches from step `start` to the end of the run, {"image": (b, h, w, 3), "text": (b, n), ...}.

    The clock measures waits, and an interrupt does not wait for the next batch.
    """
    run = session.run
    watch = session.watch
    config = run.experiment.config
    part = batch_part(run.experiment.mesh)
    rows = loader.batches(
        run.order,
        run.experiment.transform(),
        batch=config.data.batch,
        start=start,
        stop=config.steps,
        seed=config.seed,
        host=part.number,
        hosts=part.count,
        shards=part.shards,
        ledger=session.log.ledger,
    )
    sources = redact(f" from {', '.join(config.data.sources)}")
    watch.enter(DATA, sources)
    for local in session.log.clock.count_waits(interruptible_iterator(rows, session.stop.check_alone)):
        watch.enter(STEP if session.stop.can_save else COMPILATION)
        # Steps are dispatched without waiting: this batch travels to the devices while they compute the last step.
        yield loader.to_global(local, run.experiment.mesh)
        watch.enter(DATA, sources)
