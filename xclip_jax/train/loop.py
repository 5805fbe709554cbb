"""The training loop: batches, steps, checkpoints and evaluations on the way."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.console import log0
from xclip_jax.data import loader
from xclip_jax.data.ledger import Ledger
from xclip_jax.evaluators import registry, summary
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.result import Result
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.interrupt import PreemptionHandler
from xclip_jax.train.job import Job
from xclip_jax.train.log import MetricLogger, is_due
from xclip_jax.train.state import TrainState


def train(
    job: Job, state: TrainState, log: MetricLogger, checkpointer: Checkpointer, preemption: PreemptionHandler
) -> tuple[TrainState, bool]:
    """Train `state` to the end of the run, or to an interrupt.

    Returns:
      The state, and whether the run was interrupted.
    """
    config, experiment, ledger = job.config, job.experiment, log.ledger
    start, b = int(state.step), experiment.data.batch
    batches = _batches(job, start, ledger)
    # A run that stopped between a checkpoint and the evaluation of the same step makes that evaluation now.
    if _evaluates(job, start) and not log.has_evaluation(start):
        _evaluate(job, start, state, log)
    step, stopped = start, False
    for step, batch in enumerate(log.stalls(batches), start + 1):
        # Steps are dispatched without waiting: this batch travels to the devices while they compute the last step.
        state, metrics = experiment.compiled(state, loader.to_global(batch, experiment.mesh))
        log.log_step(step, metrics)
        checkpointer.raise_failure()  # of a save in the background
        stopped = preemption.requested(step)
        if is_due(config.checkpoint.every, step) or step == config.steps or stopped:
            log.flush()  # raises before a state that is not finite is saved
            position = {"samples": step * b, "batch": b, "seed": config.seed, "counters": ledger.counters}
            checkpointer.save(state, position)
        if stopped:
            break
        if _evaluates(job, step):
            _evaluate(job, step, state, log)
    log.flush()
    return state, stopped


def run_evaluators(evaluators: Sequence[Evaluator], variables: Mapping[str, Any]) -> list[Result]:
    """Return the results of all evaluators; an exception names the evaluator that raised it."""
    return [result for evaluator in evaluators for result in registry.measure(evaluator, variables)]


def _batches(job: Job, start: int, ledger: Ledger) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches from step `start` on to the last."""
    config, experiment = job.config, job.experiment
    return loader.batches(
        loader.sample_order(job.sources, experiment.data, config.seed),
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
        host=job.host,
        hosts=job.hosts,
        ledger=ledger,
    )


def _evaluates(job: Job, step: int) -> bool:
    return bool(job.during) and is_due(job.config.eval.every, step) and 0 < step < job.config.steps


def _evaluate(job: Job, step: int, state: TrainState, log: MetricLogger) -> None:
    """Evaluate the model on the way, and leave the time that it takes out of the speed."""
    began = time.perf_counter()
    log.flush()
    results = run_evaluators(job.during, state.variables(ema=job.config.eval.ema))
    log.write_results(step, results)
    log.end_evaluation(step, results)
    log0(f"step {step}: {summary.headlines(results)}")
    log.pause(time.perf_counter() - began)
