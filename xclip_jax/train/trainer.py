"""A run: checks everything, builds the parts in order and goes round the loop. No mathematics here."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax import metrics
from xclip_jax.config.schema import Config, resolve
from xclip_jax.data import loader, sources
from xclip_jax.data.ledger import Ledger
from xclip_jax.errors import UserError, describe
from xclip_jax.evaluators import Encoder, Evaluator, registry, summary
from xclip_jax.metrics import say
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.report import html, picture
from xclip_jax.train.build import Parts, build
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.interrupt import EXIT_RESUMABLE, PreemptionHandler
from xclip_jax.train.run_folder import RunFolder
from xclip_jax.train.state import TrainState, create
from xclip_jax.weights import read_initial, start


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run is made of; all of it is checked and opened before anything is written.

    Attributes:
      config, parts, folder: the config, what follows from it, and where the run is kept.
      host, hosts: which part of each batch this process loads, of how many.
      initial: tensors of `init.weights` that a new run starts from.
      sources: training data, with a fingerprint of each.
      during: evaluators of `eval.sets`, run every `eval.every` steps.
      final: those of `eval.sets` and `eval.final_sets`, run at the end.
      encoder: what the evaluators share.
    """

    config: Config
    parts: Parts
    folder: RunFolder
    host: int
    hosts: int
    initial: Mapping[str, np.ndarray]
    sources: list[sources.Source]
    fingerprints: list[dict[str, Any]]
    during: list[Evaluator]
    final: list[Evaluator]
    encoder: Encoder


def run(config: ml_collections.ConfigDict | Config) -> dict[str, float]:
    """Train, or resume training, to `config.steps` and return the results of the last evaluation.

    Everything goes to the folder `config.run`, see `run_folder`. The same call on the same folder resumes, or returns
    the results of a run that is complete. Nothing is written before the config, the folder, the sources and the
    evaluation sets are checked.

    Raises:
      UserError: bad input, or values that are not finite.
      SystemExit: a signal asked to stop; the status is `EXIT_RESUMABLE`.
    """
    config = resolve(config)
    folder = RunFolder(config.run)
    folder.check(config)
    if (results := folder.completed(config)) is not None:
        say(f"{folder.path} is complete at step {config.steps}; to train again, use a different --config.run")
        return results
    with PreemptionHandler() as preemption:
        job = _open(config, folder)
        with folder.claimed(config, job.fingerprints):
            with Checkpointer(folder.path, keep=config.checkpoint.keep) as checkpointer:
                state, log, stopped = _train(job, checkpointer, preemption)
            if stopped:
                log.close()
                say(f"stopped at step {int(state.step)} of {config.steps}; run the same command to resume")
                raise SystemExit(EXIT_RESUMABLE)
            return _finish(job, state, log)


def _open(config: Config, folder: RunFolder) -> _Run:
    """Build and open everything that a run needs, so that what is missing shows before it is written or trained."""
    built = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=folder.tokenizer(config)))
    parts = build(built)
    classes = parts.objective.classes
    host, hosts = batch_part(parts.mesh)
    opened = loader.open_sources(parts.data, classes, parts.objective.fields)
    fingerprints = [sources.card(source) for source in opened]
    folder.check_sources(config, fingerprints)
    starts = config.init.weights and folder.latest_step() is None
    initial = read_initial(config, parts.abstract) if starts else {}
    encoder = make_encoder(config, parts, fingerprints[0].get("classes"))
    specs = tuple(dict.fromkeys((*config.eval.sets, *config.eval.final_sets)))
    evaluators = dict(zip(specs, registry.open_all(specs, encoder, parts.data.dir), strict=True))
    during = [evaluators[spec] for spec in config.eval.sets] if config.eval.every else []
    final = list(evaluators.values())
    return _Run(config, parts, folder, host, hosts, initial, opened, fingerprints, during, final, encoder)


def _train(job: _Run, checkpointer: Checkpointer, preemption: PreemptionHandler) -> tuple[TrainState, "Log", bool]:
    """Make or restore the state and train it. Returns it, the log, and whether the run was interrupted."""
    config, parts = job.config, job.parts
    pairs = sum(map(len, job.sources))
    count = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
    items = "items" if parts.objective.labelled else "pairs"
    say(
        f"{config.objective.name}: {count:,} parameters, {pairs:,} {items}, {config.steps} steps of "
        f"{parts.data.batch} on {jax.device_count()} {jax.devices()[0].device_kind}, in {job.folder.path}"
    )
    if checkpointer.latest() is None:
        state, position = create(parts.init, parts.abstract), {"samples": 0}
        if job.initial:
            state = start(job.initial, state)
    else:
        state, position = checkpointer.restore_finite(parts.abstract)
        say(f"resuming at step {int(state.step)}, sample {position['samples']:,}")
    ledger = Ledger(
        job.folder.path, max_bad=parts.data.max_bad, start=position["samples"], counters=position.get("counters")
    )
    log = Log(config, parts, job.folder, int(state.step), pairs, ledger)
    preemption.saves = True
    state, stopped = _loop(job, state, log, checkpointer, preemption)
    preemption.saves = False
    return state, log, stopped


def make_encoder(
    config: ml_collections.ConfigDict | Config, parts: Parts, classes: Sequence[str] | None = None
) -> Encoder:
    """What the evaluators share: one compiled function for each modality. `classes` are those of a fine-tuned model."""
    return Encoder(
        parts.model,
        parts.tokenizer,
        text_length=parts.length,
        preprocessing=parts.preprocessing,
        mesh=parts.mesh,
        batch=config.eval.batch,
        tau=parts.objective.tau,
        classes=classes,
    )


def evaluate(evaluators: Sequence[Evaluator], variables: Mapping[str, Any]) -> dict[str, float]:
    """Results of all evaluators; an exception names the evaluator that raised it."""
    results = {}
    for evaluator in evaluators:
        results |= registry.measure(evaluator, variables)[0]
    return results


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _loop(
    job: _Run, state: TrainState, log: "Log", checkpointer: Checkpointer, preemption: PreemptionHandler
) -> tuple[TrainState, bool]:
    """Train to the end, or to an interrupt. Returns the state and whether it was interrupted."""
    config, parts, ledger = job.config, job.parts, log.ledger
    start, b = int(state.step), parts.data.batch
    batches = loader.batches(
        loader.sample_order(job.sources, parts.data, config.seed),
        loader.Transform(parts.data, parts.size, parts.tokenizer, parts.length, parts.objective.fields),
        batch=b, start=start, stop=config.steps, seed=config.seed,
        host=job.host, hosts=job.hosts, ledger=ledger,
    )  # fmt: skip
    # A run that stopped between a checkpoint and the evaluation of the same step makes that evaluation now.
    if job.during and _due(config.eval.every, start) and 0 < start < config.steps and not log.evaluated(start):
        log.evaluate(start, job.during, state.variables(ema=config.eval.ema))
    step, stopped = start, False
    for step in range(start + 1, config.steps + 1):
        # Steps run on while the host goes ahead: this batch travels to the devices while they are busy with the last.
        state, values = parts.compiled(state, loader.to_global(log.waiting.next(batches), parts.mesh))
        log.after(step, values)
        stopped = preemption.requested(step)
        if _due(config.checkpoint.every, step) or step == config.steps or stopped:
            log.flush()  # raises before a state that is not finite is saved
            position = {"samples": step * b, "batch": b, "seed": config.seed, "counters": ledger.counters}
            checkpointer.save(state, position)
        if stopped:
            break
        if job.during and _due(config.eval.every, step) and step < config.steps:
            log.evaluate(step, job.during, state.variables(ema=config.eval.ema))
    log.flush()
    return state, stopped


class Log:
    """Writes metrics a step late, so that the host never waits for the step that it has just started."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        folder: RunFolder,
        start: int,
        pairs: int,
        ledger: Ledger,
    ) -> None:
        self.config, self.parts, self.folder, self.pairs, self.ledger = config, parts, folder, pairs, ledger
        # A run that resumes at its last step makes the last evaluation again.
        self.writer = None
        if jax.process_index() == 0:
            self.writer = metrics.Writer(folder.path, step=start, evaluations=start - (start == config.steps))
        self.progress = metrics.Progress(start, config.steps, parts.data.batch, parts.objective.progress)
        self.waiting = metrics.Waiting()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._warned: set[str] = set()

    def after(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was started, and writes those of the last one if they are due."""
        self.flush(always=False)
        self._pending = (step, values)
        self.waiting.started(values["loss"])
        self.progress.tick(step)

    def flush(self, always: bool = True) -> None:
        """Writes what is pending, if it is due or `always`; waits for it."""
        if self._pending is None:
            return
        step, values = self._pending
        if not always and not (_due(self.config.log.every, step) or step == 1):
            return
        self._pending = None
        samples = step * self.parts.data.batch
        self.ledger.sync(samples)
        scalars = {key: float(value) for key, value in jax.device_get(values).items()}
        # The loss is that of the parameters before the update, the norm of the update that of the state to be saved.
        for name in ("loss", "grad_norm", "update_norm"):
            if not math.isfinite(scalars[name]):
                self._raise_not_finite(step, name, scalars[name])
        scalars |= {
            "lr": float(self.parts.schedule(step - 1)),
            "samples": samples,
            "tokens": self.ledger.counters["tokens"],
            "epoch": samples / self.pairs,
            "data/bad": self.ledger.bad,
            "data/bad_share": self.ledger.share,
            "data/wait_share": self.waiting.share(),
            "samples_per_second": self.progress.samples_per_second(step),
        }
        if self.writer:
            self.writer.write(step, scalars)
        say(self.progress.line(step, scalars))
        self._alarm(step, scalars)

    def _raise_not_finite(self, step: int, name: str, value: float) -> None:
        saved = self.folder.latest_step()
        last = "there is no checkpoint yet" if saved is None else f"the last checkpoint is of step {saved}"
        raise UserError(
            f"{name.replace('_', ' ')} of step {step} is {value} and is not saved; {last}. Lower optim.lr, "
            "lengthen optim.warmup or set optim.clip=1, under a different --config.run."
        )

    def _alarm(self, step: int, scalars: dict[str, float]) -> None:
        """Says each kind of collapse once, when it is first seen."""
        if step < self.config.log.alarms_after:
            return
        for warning in self.parts.objective.alarms(scalars):
            kind = warning.split(":")[0]
            if kind not in self._warned:
                self._warned.add(kind)
                say(f"WARNING, step {step}: {warning}")

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl had results of `step` when the run resumed; the same answer on every process."""
        value = self.writer is not None and self.writer.has_evaluation(step)
        if jax.process_count() == 1:
            return value
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))

    def write(self, step: int, results: Mapping[str, float]) -> None:
        """Write results of an evaluation to metrics.jsonl and TensorBoard."""
        if self.writer and results:
            self.writer.write(step, results)

    def evaluate(self, step: int, evaluators: Sequence[Evaluator], variables: Mapping[str, Any]) -> None:
        """Run an evaluation, write its results, and keep its time out of the speed."""
        began = time.perf_counter()
        self.flush()
        results = evaluate(evaluators, variables)
        self.write(step, results)
        say(f"step {step}: {summary.headlines(results)}")
        self.progress.pause(time.perf_counter() - began)
        self.waiting.share()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        self.waiting.close()
        self.ledger.close()
        if self.ledger.bad:
            counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.ledger.counters["bad"].items())
            say(f"bad samples so far: {counts}; see {self.ledger.path}")
        if self.writer:
            self.writer.close()


def _finish(job: _Run, state: TrainState, log: "Log") -> dict[str, float]:
    """The last evaluation: results.json, the table, the picture and the report."""
    config, began = job.config, time.perf_counter()
    variables, step = state.variables(ema=config.eval.ema), int(state.step)
    results, failed = {}, {}
    for evaluator in job.final:
        try:
            values = evaluate([evaluator], variables)
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the others would wait for this process in the next set
            failed[evaluator.name] = describe(error)
            say(f"{evaluator.name} failed: {type(error).__name__}: {describe(error)}")
        else:
            results |= values
            log.write(step, values)
    log.close()
    if jax.process_index() == 0:
        more = {"failed": failed} if failed else {}
        job.folder.write_results(config, results, seconds=time.perf_counter() - began, **more)
    if results:
        say(summary.render(results))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(job.final)} evaluation sets failed ({', '.join(failed)}); "
            f"{job.folder.results_file} has the others. Run the same command to evaluate again."
        )
    if config.eval.report:
        try:
            _report(job, variables)
        except Exception as error:  # the run is complete and its results are written
            say(f"no report: {type(error).__name__}: {error}; python -m xclip_jax.report {config.run} tries again")
    say(f"model: {config.run}; load it with xclip_jax.load({config.run!r}), see README for evaluate, embed and export")
    return results


def _report(job: _Run, variables: Mapping[str, Any]) -> None:
    """What the run leaves for people to look at."""
    config, folder = job.config, job.folder.path
    specs = (*config.eval.final_sets, *config.eval.sets)
    examples = html.make(folder, job.parts, job.encoder, variables, specs)
    say(f"report: {folder / html.NAME}")
    if jax.process_index() == 0 and (examples.named or examples.clusters):
        title = f"What {config.objective.name} learned in {config.steps} steps of {job.parts.data.batch} pairs"
        picture.draw(folder / "picture.png", examples, title=title)
        say(f"picture: {folder / 'picture.png'}")
