"""One process of a run in progress: its log, its checkpoints, its watchdog and its signals."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from xclip_jax.core import console
from xclip_jax.core.console import log0
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import TooManyUnreadable
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.processes.interrupt import PreemptionHandler
from xclip_jax.processes.watchdog import CHECKPOINT, EVALUATION, Watchdog
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import MetricLogger
from xclip_jax.train.prepare import Run
from xclip_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Session:
    """A run in this process, and everything the training loop reports to.

    Attributes:
      run: the run.
      log: its metrics.
      checkpointer: its checkpoints.
      watch: ends a process that hangs.
      stop: receives signals.
    """

    run: Run
    log: MetricLogger
    checkpointer: Checkpointer
    watch: Watchdog
    stop: PreemptionHandler

    def check(self) -> None:
        """Raise `Interrupted` if the run should stop here, or `UserError` for too many bad samples."""
        self.stop.check()
        self.log.ledger.check()

    def end_step(self, step: int) -> None:
        """Note that `step` is dispatched: from now on there is something to save."""
        self.watch.step = step
        self.stop.can_save = True

    @contextlib.contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Name a phase in which this process must progress, see `Watchdog.phase`.

        Interrupts leave it between two batches, and a signal to a run of one process leaves it at once.
        """

        def observe(all_processes: bool) -> None:
            self.watch.progress()
            if all_processes:
                self.stop.check()

        with self.watch.phase(name), console.observing_progress(observe), self.stop.interruptible():
            yield

    def save(self, state: TrainState, step: int) -> None:
        """Write the log, which a resumed run does not write again, and then a checkpoint."""
        self.log.write()
        batch = self.run.config.data.batch
        counters = self.log.ledger.counters
        position = {"samples": step * batch, "batch": batch, "seed": self.run.config.seed, "counters": counters}
        with self.watch.phase(CHECKPOINT), self.log.clock.exclude_from_goodput():
            self.checkpointer.save(state, position)
        self.watch.saved = step

    def evaluate(
        self, evaluators: Sequence[Evaluator], step: int, variables: Variables
    ) -> tuple[list[Result], dict[str, str]]:
        """Evaluate and log the results; the speed excludes the time that it takes.

        Returns:
          The results, and the reason per set that failed: after the last step for any reason, during training for
          unreadable images, which may be readable again later.
        """
        last = step == self.run.config.steps
        results: list[Result] = []
        failed: dict[str, str] = {}
        self.log.flush()
        with self.log.clock.exclude_from_speed():
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
            self.log.write_results(step, results)
            if results and not (last and failed):
                self.log.end_evaluation(step, results)
            if results and not last:
                log0(f"step {step}: {tables.headlines(results)}")
        return results, failed
