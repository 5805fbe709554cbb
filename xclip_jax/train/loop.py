"""The training loop: batches, steps, checkpoints and evaluations during training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from xclip_jax.core import heartbeat
from xclip_jax.core.addresses import public
from xclip_jax.core.console import log0
from xclip_jax.data import loader
from xclip_jax.data.ledger import Ledger, TooManyBadSamples
from xclip_jax.data.records import interruptible_iterator
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.processes.interrupt import Interrupted, PreemptionHandler
from xclip_jax.processes.watchdog import CHECKPOINT, COMPILATION, DATA, EVALUATION, STEP, Watchdog
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.job import Job
from xclip_jax.train.log import MetricLogger, is_due
from xclip_jax.train.profile import StepTracer
from xclip_jax.train.state import TrainState


def train(
    job: Job, state: TrainState, log: MetricLogger, checkpointer: Checkpointer, watch: Watchdog, stop: PreemptionHandler
) -> tuple[TrainState, bool]:
    """Train `state` to the end of the run, or save it at an interrupt. Returns it, and whether it was interrupted."""
    config, experiment, start = job.config, job.experiment, int(state.step)
    step, tracer = start, StepTracer(config.log.profile, job.folder, log.pause)
    batches = log.stalls(_watched(_batches(job, start, log.ledger), job, watch, stop))  # closed last: it may take long

    def save(*, regular: bool = False) -> None:
        watch.enter(CHECKPOINT)
        log.write()  # what a checkpoint has counted is not made again by a run that resumes from it
        # Steps that are skipped one after another have the same parameters, and push the checkpoints before out.
        if not (regular and log.skipped.in_a_row):
            with log.stall():
                checkpointer.save(state, _position(job, step, log.ledger))
            watch.saved = step

    try:
        stop.check()
        log.ledger.check()
        # A run that stopped between a checkpoint and the evaluation of the same step makes that evaluation now.
        if _evaluates(job, start) and not log.has_evaluation(start):
            _evaluate(job, start, state, log, watch, stop)
        for batch in batches:
            watch.enter(STEP if stop.saves else COMPILATION)
            # Steps are dispatched without waiting: this batch travels to the devices while they compute the last step.
            state, metrics = tracer(step + 1, experiment.compiled, state, loader.to_global(batch, experiment.mesh))
            step, watch.step, stop.saves = step + 1, step + 1, True
            log.log_step(step, metrics)
            checkpointer.raise_failure()  # of a save in the background
            if log.skipped.exceeded:
                with log.stall():
                    state = log.skipped.rewind(state)
            stop.check()
            log.ledger.check()
            if is_due(config.checkpoint.every, step) or step == config.steps:
                save(regular=step < config.steps)
            if _evaluates(job, step):
                _evaluate(job, step, state, log, watch, stop)
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
            checkpointer.steps()  # waits for it: of several processes each ends as soon as it has raised
            error.add_note(f"the state of step {step} is saved")
        raise
    finally:
        watch.enter(CHECKPOINT)  # what is being saved is awaited when the checkpointer is closed
        tracer.close()


def _position(job: Job, step: int, ledger: Ledger) -> dict[str, Any]:
    """Where the run is in its data after `step`, as a checkpoint has it."""
    b = job.experiment.data.batch
    return {"samples": step * b, "batch": b, "seed": job.config.seed, "counters": ledger.counters}


def _can_save_after(error: Exception, phase: str) -> bool:
    """Whether the state of the last step is whole after an error, and all processes are there to save it."""
    # Of several processes one cannot save without the others, and these have begun the next step, which overwrites the
    # state, unless all meet the error at the same step. What fails in a step may leave no state.
    alone = jax.process_count() == 1
    return isinstance(error, TooManyBadSamples) or (alone and phase in (DATA, EVALUATION))


def _watched(
    batches: Iterator[dict[str, np.ndarray]], job: Job, watch: Watchdog, stop: PreemptionHandler
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches; an interrupt need not wait for one, and the watchdog knows where they come from."""
    sources = public(f" from {', '.join(job.config.data.sources)}")
    watch.enter(DATA, sources)
    for batch in interruptible_iterator(batches, stop.check_alone):
        yield batch
        watch.enter(DATA, sources)


def run_evaluators(evaluators: Sequence[Evaluator], variables: Variables) -> list[Result]:
    """Return the results of all evaluators; an exception names the evaluator that raised it."""
    results: list[Result] = []
    for evaluator in evaluators:
        heartbeat.beat()
        results += registry.measure(evaluator, variables)
    return results


@contextlib.contextmanager
def evaluating(watch: Watchdog, stop: PreemptionHandler, phase: str = EVALUATION) -> Iterator[None]:
    """Context of what evaluates: an interrupt leaves it between two batches, a signal to a single process at once."""

    def observe(alike: bool) -> None:
        watch.beat()
        if alike:
            stop.check()

    watch.enter(phase)
    with heartbeat.observed(observe), stop.interruptible():
        yield


def _batches(job: Job, start: int, ledger: Ledger) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches from step `start` on to the last."""
    config, experiment = job.config, job.experiment
    return loader.batches(
        job.order,
        loader.Transform(
            experiment.data,
            experiment.image_size,
            experiment.tokenizer,
            experiment.context_length,
            experiment.objective.fields,
        ),
        batch=experiment.data.batch,
        start=start,
        stop=config.steps,
        seed=config.seed,
        host=job.part.number,
        hosts=job.part.count,
        shards=job.part.shards,
        ledger=ledger,
    )


def _evaluates(job: Job, step: int) -> bool:
    return bool(job.during) and is_due(job.config.eval.every, step) and 0 < step < job.config.steps


def _evaluate(
    job: Job, step: int, state: TrainState, log: MetricLogger, watch: Watchdog, stop: PreemptionHandler
) -> None:
    """Evaluate the model on the way, and leave the time that it takes out of the speed."""
    log.flush()
    with log.pause():
        with evaluating(watch, stop):
            results = run_evaluators(job.during, state.variables(ema=job.config.eval.ema))
        log.write_results(step, results)
        log.end_evaluation(step, results)
        log0(f"step {step}: {tables.headlines(results)}")
