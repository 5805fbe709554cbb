"""A run from its config to its results: check, build, claim the folder, train, evaluate."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import log0
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError
from xclip_jax.data.ledger import Ledger
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.results import Result, flat, from_json
from xclip_jax.models.two_towers import Variables
from xclip_jax.processes import runtime
from xclip_jax.processes.interrupt import Interrupted, PreemptionHandler
from xclip_jax.processes.watchdog import COMPILATION, RESTORE, Watchdog
from xclip_jax.train import checks
from xclip_jax.train.callbacks import Callback, classes
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.job import Job
from xclip_jax.train.log import MetricLogger
from xclip_jax.train.loop import evaluating, train
from xclip_jax.train.recovery import SkippedSteps
from xclip_jax.train.state import TrainState, create
from xclip_jax.train.training_folder import TrainingFolder
from xclip_jax.train.weights import init_from_weights


def run(
    config: ml_collections.ConfigDict | Config, callbacks: Sequence[Callback] = (), *, uptime: float = 0.0
) -> dict[str, float]:
    """Train, or resume training, to `config.steps` and return the results of the last evaluation.

    Everything goes to the folder `config.run`, see `core.run_folder`, once all is checked. The same call on the same
    folder resumes, or returns the results of a run that is complete.

    Args:
      config: of the run.
      callbacks: receive metrics, results and the trained model, before the callbacks of `log.callbacks`.
      uptime: seconds that the process has run for, which the goodput counts as start-up.

    Raises:
      UserError: bad input, or values that are not finite.
      SystemExit: a signal asked to stop; the status is `EXIT_RESUMABLE`.
    """
    began = time.perf_counter() - uptime
    config = resolve(config)
    folder = TrainingFolder(config.run)
    folder.check(config)
    with PreemptionHandler() as stop, Watchdog(folder, stop, limit=config.log.stall_limit) as watch:
        checks.check_same_config(config, folder)
        if (results := folder.completed(config)) is not None:
            if folder.moved_sources(config):  # two recipes may have one folder
                _ = Job(config, folder).fingerprints
            log0(f"{folder.path} is complete at step {config.steps}; to train again, use a different --config.run")
            return results
        job = Job(config, folder)
        job.compiling = watch.compiling
        watch.step = watch.saved = folder.latest_step() or 0
        checks.require(job)
        callbacks = [*callbacks, *(made() for made in classes(config))]
        job.prepare()
        checks.check_same_data(job)
        facts = (job.experiment.length_groups, job.experiment.text_rows, job.initial[1])
        with folder.claimed(config, job.fingerprints, *facts):
            # A process that fails ends before its checkpointer is closed, which would wait for the others.
            checkpoints = Checkpointer(folder.path, keep=config.checkpoint.keep)
            with checkpoints as checkpointer, runtime.ends_all():
                state, stopped, log = _train(job, checkpointer, watch, stop, callbacks, began)
            stop.saves = False
            try:
                if not stopped:
                    with contextlib.suppress(Interrupted):
                        return _finish(job, state, log, watch, stop, callbacks)
                watch.enter("")
                log.close()
                log.show_report(int(state.step))
            finally:
                log.end()
            log0(f"stopped at step {int(state.step)} of {config.steps}; run the same command to resume")
            raise SystemExit(EXIT_RESUMABLE)


def _train(
    job: Job,
    checkpointer: Checkpointer,
    watch: Watchdog,
    stop: PreemptionHandler,
    callbacks: Sequence[Callback],
    began: float,
) -> tuple[TrainState, bool, MetricLogger]:
    """Train a new or restored state; return it, whether the run was interrupted, and the log."""
    config, experiment = job.config, job.experiment
    log0(
        f"{config.objective.name}: {experiment.num_parameters:,} parameters, {job.num_samples:,} "
        f"{'items' if experiment.objective.labelled else 'pairs'}, {config.steps:,} steps of {config.data.batch} "
        f"({job.epochs:.3g} epochs) on {jax.device_count()} {jax.devices()[0].device_kind}, in {job.folder.path}"
    )
    position: dict[str, Any] = {"samples": 0}
    watch.enter(COMPILATION)
    if checkpointer.latest() is None:
        if step := job.folder.last_logged_step():
            log0(f"WARNING: there is no checkpoint, so the run starts again; metrics up to step {step} are dropped")
        state = create(experiment.init, experiment.abstract)
        if job.initial[0]:
            state = init_from_weights(job.initial[0], state)
        del job.initial  # as large as the model
    else:
        watch.enter(RESTORE)
        state, position = checkpointer.restore_good(experiment.abstract)
        watch.enter(COMPILATION)
        log0(f"resuming at step {int(state.step)}, sample {position['samples']:,}")
    ledger = Ledger(
        job.folder.path,
        max_bad_fraction=experiment.config.data.max_bad_fraction,
        start=position["samples"],
        counters=position.get("counters"),
    )
    watch.step = watch.saved = int(state.step)
    skipped = SkippedSteps(job, int(state.step), ledger, checkpointer)
    log = MetricLogger(job, int(state.step), ledger, skipped, callbacks, began=began, on_step_end=watch.end_step)
    try:
        for callback in callbacks:
            callback.on_start(job, int(state.step))
        return *train(job, state, log, checkpointer, watch, stop), log
    except BaseException:
        log.end()
        raise


def _finish(
    job: Job,
    state: TrainState,
    log: MetricLogger,
    watch: Watchdog,
    stop: PreemptionHandler,
    callbacks: Sequence[Callback],
) -> dict[str, float]:
    """Make the last evaluation: results.json, the table, and the callbacks; `UserError` for sets that failed."""
    config, began = job.config, time.perf_counter()
    variables, step = state.variables(ema=config.eval.ema), int(state.step)
    results, failed = _evaluate(job, variables, step, log, watch, stop)
    watch.enter("")
    log.close()
    if results and not failed:  # before the run is complete: one that ends in a callback is evaluated again
        log.end_evaluation(step, results)
    if jax.process_index() == 0:
        details = {"failed": failed} if failed else {}
        job.folder.write_results(config, results, seconds=time.perf_counter() - began, **details)
    if results:
        log0(tables.render(results))
    earlier = job.folder.read_evaluations() if results else []
    if before := [record for line in earlier if line["step"] == 0 for record in line["records"]]:
        log0(f"before -> after: {tables.headlines(results, from_json(before))}")
    if failed:
        multihost_utils.sync_global_devices("results are written")  # the error of another process would end process 0
        raise UserError(
            f"{len(failed)} of {len(job.final)} evaluation sets failed ({', '.join(failed)}); "
            f"{job.folder.results_file} has the others. Run the same command to evaluate again."
        )
    try:
        for callback in callbacks:
            with evaluating(watch, stop, ""):
                callback.on_end(job, variables, results)
    except Interrupted:
        log0(f"the report was interrupted; xclip-jax report {config.run} makes it")
        raise
    log.show_report(step)
    log0(f"model: {config.run}; load it with xclip_jax.load({config.run!r}), see README for evaluate, embed and export")
    return flat(results)


def _evaluate(
    job: Job, variables: Variables, step: int, log: MetricLogger, watch: Watchdog, stop: PreemptionHandler
) -> tuple[list[Result], dict[str, str]]:
    """Return the results of all sets, and for each that failed the reason."""
    results: list[Result] = []
    failed = {}
    for evaluator in job.final:
        try:
            with evaluating(watch, stop):
                values = registry.measure(evaluator, variables)
        except Exception as error:
            failed[evaluator.name] = registry.note_failure(evaluator, error)
        else:
            results += values
            log.write_results(step, values)
    return results, failed
