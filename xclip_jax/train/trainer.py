"""A run from its config to its results: prepare, claim the folder, train, evaluate."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import log0
from xclip_jax.core.errors import EXIT_RESUMABLE, UserError
from xclip_jax.data.ledger import BadSampleLog
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import flat
from xclip_jax.processes import runtime
from xclip_jax.processes.interrupt import Interrupted, PreemptionHandler
from xclip_jax.processes.watchdog import COMPILATION, RESTORE, Watchdog
from xclip_jax.train import checks, prepare
from xclip_jax.train.callbacks import Callback, check_names, classes
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import MetricLogger
from xclip_jax.train.loop import Session, train
from xclip_jax.train.prepare import Run
from xclip_jax.train.recovery import SkippedSteps
from xclip_jax.train.run_writer import RunWriter
from xclip_jax.train.state import TrainState, create
from xclip_jax.train.weights import init_from_weights


def run(
    config: ml_collections.ConfigDict | Config, callbacks: Sequence[Callback] = (), *, uptime: float = 0.0
) -> dict[str, float]:
    """Train, or resume training, to `config.steps` and return the results of the last evaluation.

    Files are written to the folder `config.run`, see `core.run_folder`, after all checks. The same call on the same
    folder resumes, or returns the results of a complete run.

    Args:
      config: the config of the run.
      callbacks: receive metrics, results and the trained model, before the callbacks of `log.callbacks`.
      uptime: age of the process in seconds, which the goodput counts as start-up.

    Raises:
      UserError: bad input, or too many steps with non-finite values.
      SystemExit: a signal asked to stop; the status is `EXIT_RESUMABLE`.
    """
    began = time.perf_counter() - uptime
    config = resolve(config)
    folder = RunWriter(config.run)
    folder.check(config)
    with PreemptionHandler() as stop, Watchdog(folder, stop, limit=config.log.stall_limit) as watch:
        checks.check_same_config(config, folder)
        results = folder.completed(config)
        if results is not None:
            log0(f"{folder.path} is complete at step {config.steps}; to train again, use a different --config.run")
            return results
        check_names(config)
        callbacks = [*callbacks, *(callback() for callback in classes(config))]
        prepared, initial = prepare.prepare(config, folder, lambda: watch.phase(COMPILATION))
        experiment = prepared.experiment
        checks.check_same_data(experiment, prepared.fingerprints, prepared.final_evaluators, initial)
        facts = (experiment.length_groups, experiment.text_rows, prepared.origin)
        with folder.claimed(config, prepared.fingerprints, *facts):
            # A process that fails ends before its checkpointer is closed, which would wait for the others.
            with Checkpointer(folder.path, keep=config.checkpoint.keep) as checkpointer, runtime.ends_all():
                epochs = config.steps * config.data.batch / prepared.num_samples
                log0(
                    f"{config.objective.name}: {experiment.num_parameters:,} parameters, {prepared.num_samples:,} "
                    f"samples, {config.steps:,} steps of {config.data.batch} ({epochs:.3g} epochs), in {folder.path}"
                )
                watch.enter(COMPILATION)
                state, position = _first_state(prepared, initial, checkpointer, watch)
                initial.clear()  # as large as the model
                step = int(state.step)
                ledger = BadSampleLog(
                    folder.path,
                    max_bad_fraction=config.data.max_bad_fraction,
                    start=position["samples"],
                    counters=position.get("counters"),
                )
                skipped = SkippedSteps(prepared, step, ledger, checkpointer)
                log = MetricLogger(prepared, step, ledger, skipped, callbacks, began=began, on_step_end=watch.end_step)
                session = Session(prepared, log, checkpointer, watch, stop)
                try:
                    for callback in callbacks:
                        callback.on_start(prepared, step)
                    state, stopped = train(session, state)
                except BaseException:
                    log.end()
                    raise
            stop.can_save = False
            try:
                if not stopped:
                    with contextlib.suppress(Interrupted):
                        return _finish(session, state, callbacks)
                watch.enter(None)
                log.close()
            finally:
                log.end()
            log0(f"stopped at step {int(state.step)} of {config.steps}; run the same command to resume")
            raise SystemExit(EXIT_RESUMABLE)


def _first_state(
    run: Run, initial: Mapping[str, np.ndarray], checkpointer: Checkpointer, watch: Watchdog
) -> tuple[TrainState, dict[str, Any]]:
    experiment = run.experiment
    if checkpointer.latest() is None:
        step = run.folder.last_logged_step()
        if step:
            log0(f"WARNING: there is no checkpoint, so the run starts again; metrics up to step {step} are dropped")
        state = create(experiment.init, experiment.abstract)
        return init_from_weights(initial, state) if initial else state, {"samples": 0}
    with watch.phase(RESTORE):
        state, position = checkpointer.restore_good(experiment.abstract)
    log0(f"resuming at step {int(state.step)}, sample {position['samples']:,}")
    return state, position


def _finish(session: Session, state: TrainState, callbacks: Sequence[Callback]) -> dict[str, float]:
    """Make the last evaluation, write results.json and call the callbacks; `UserError` for failed sets."""
    run = session.run
    config = run.config
    began = time.perf_counter()
    variables = state.variables(ema=config.eval.ema)
    step = int(state.step)
    # Callbacks are called before the run is complete: one that ends in a callback is evaluated again.
    results, failed = session.evaluate(run.final_evaluators, step, variables)
    session.watch.enter(None)
    session.log.close()
    if jax.process_index() == 0:
        details = {"failed": failed} if failed else {}
        run.folder.write_results(config, results, seconds=time.perf_counter() - began, **details)
    if results:
        log0(tables.render(results))
    if failed:
        multihost_utils.sync_global_devices("results are written")  # the error of another process would end process 0
        raise UserError(
            f"{len(failed)} of {len(run.evaluators)} evaluation sets failed ({', '.join(failed)}); "
            f"{run.folder.results_file} has the others. Run the same command to evaluate again."
        )
    try:
        for callback in callbacks:
            with session.phase(None):
                callback.on_end(run, variables, results)
    except Interrupted:
        log0(f"the report was interrupted; xclip-jax report {config.run} makes it")
        raise
    log0(f"model: {config.run}; load it with xclip_jax.load({config.run!r}), see README for evaluate, embed and export")
    return flat(results)
