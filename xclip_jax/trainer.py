"""A run: builds the parts in order and goes round the loop. No mathematics here."""

import json
import math
import signal
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.experimental import multihost_utils

from xclip_jax import metrics
from xclip_jax.checkpoint import Checkpointer, write_json
from xclip_jax.data import loader, sources
from xclip_jax.data.ledger import Ledger
from xclip_jax.errors import UserError
from xclip_jax.evaluators import Encoder, sets, table
from xclip_jax.losses.noncontrastive import diagnose
from xclip_jax.metrics import say
from xclip_jax.parts import Parts, build
from xclip_jax.report import document, picture
from xclip_jax.state import TrainState, create
from xclip_jax.weights import start

# A resumed run may differ in these: they do not change what is learned.
FREE_KEYS = (
    "checkpoint.", "data.buffer", "data.cache", "data.dir", "data.max_bad", "data.threads", "data.workers", "eval.",
    "log.", "loss.", "mesh.", "optim.microbatches",
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; tuples become lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _lists(value)
    return flat


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


class Interrupt:
    """Turns the first SIGTERM or SIGINT into a request to save and stop; the second one acts at once.

    On several processes the request is agreed upon through JAX's coordination service, which watches SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        self._asked = True
        say(f"{signal.Signals(number).name}: saving, then stopping; once more to stop at once")
        signal.signal(number, self._old[number])

    def asked(self, step: int) -> bool:
        """Whether to stop at `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


def run(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Trains, or goes on training, to `config.steps` and returns the results of the last evaluation.

    Everything goes to the folder `config.run`: config.json, metrics.jsonl, tensorboard/, checkpoints/, results.json
    and, where eval.report is set, picture.png and report.html. The same call on the same folder resumes, or returns the
    results of a run that is complete.

    Raises:
      UserError: bad input, or a loss that is not finite.
    """
    folder = epath.Path(config.run)
    _claim(folder, config)
    results = folder / "results.json"
    with Checkpointer(folder, keep=config.checkpoint.keep) as checkpointer:
        if results.exists() and checkpointer.latest() == config.steps:
            say(f"{folder} is complete at step {config.steps}; delete it, or set another --config.run, to train anew.")
            return json.loads(results.read_text())["results"]
        parts = build(config)
        state, stopped = _train(config, parts, checkpointer, folder)
    if stopped:
        say(f"stopped at step {int(state.step)} of {config.steps}; the same command goes on from there")
        raise SystemExit(0)
    return _finish(config, parts, state, folder)


def _train(
    config: ml_collections.ConfigDict, parts: Parts, checkpointer: Checkpointer, folder: epath.Path
) -> tuple[TrainState, bool]:
    """Makes or restores the state and trains it. Returns it, and whether it was interrupted."""
    found = loader.open_sources(parts.data, parts.objective.classify.classes if parts.objective.classifies else 0)
    _check_data(folder, found)
    count = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
    items = "items" if parts.objective.classifies else "pairs"
    say(
        f"{config.objective.name}: {count:,} parameters, {sum(map(len, found)):,} {items}, {config.steps} steps of "
        f"{parts.data.batch} on {jax.device_count()} {jax.devices()[0].device_kind}, in {folder}"
    )
    if checkpointer.latest() is None:
        state, position = create(parts.init, parts.abstract), {"samples": 0}
        if config.init.weights:
            state = start(config, state)
    else:
        state, position = checkpointer.restore(parts.abstract)
        say(f"resuming at step {int(state.step)}, sample {position['samples']:,}")
    ledger = Ledger(
        folder, max_bad=parts.data.max_bad, start=position["samples"], counters=position.get("counters")
    )
    with Interrupt() as interrupt:
        return _loop(config, parts, found, ledger, state, checkpointer, folder, interrupt)


def _check_data(folder: epath.Path, found: list[sources.Source]) -> None:
    """Writes data.json, what the run reads, or checks that it still reads the same."""
    path, cards = folder / "data.json", [sources.card(source) for source in found]
    if path.exists():
        for spec, there, here in zip(range(len(cards)), json.loads(path.read_text()), cards, strict=True):
            if any(there.get(key) != here.get(key) for key in ("samples", "hash")):
                raise UserError(
                    f"source {spec} has changed since {path} was written: {there['samples']:,} samples there, "
                    f"{here['samples']:,} here, or other files. Restore it, or set another --config.run."
                )
    elif jax.process_index() == 0:
        write_json(path, cards)


def _claim(folder: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, or checks that the one there is of the same run."""
    path, wanted = folder / "config.json", config.to_dict()
    if path.exists():
        there, here = flatten(json.loads(path.read_text())["config"]), flatten(wanted)
        differing = [
            f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and not key.startswith(FREE_KEYS)
        ]
        if differing:
            raise UserError(
                f"{folder} holds a run with other settings: {', '.join(differing[:5])}"
                f"{' and more' if len(differing) > 5 else ''}. Set another --config.run, or delete the folder."
            )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"config": wanted, "environment": metrics.environment()})


def make_encoder(config: ml_collections.ConfigDict, parts: Parts) -> Encoder:
    """What the evaluators share: one compiled function for each modality."""
    return Encoder(
        parts.model,
        parts.tokenizer,
        text_length=parts.length,
        preprocessing=parts.preprocessing,
        mesh=parts.mesh,
        batch=config.eval.batch,
        tau=parts.objective.nclip.tau,
    )


def evaluate(found: list[Any], variables: Mapping[str, Any]) -> dict[str, float]:
    """Results of all evaluators; an exception names the evaluator that raised it."""
    results = {}
    for evaluator in found:
        try:
            results |= evaluator.run(variables)
        except Exception as error:
            error.add_note(f"in evaluator {evaluator.name}")
            raise
    return results


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _loop(
    config: ml_collections.ConfigDict,
    parts: Parts,
    found: list[sources.Source],
    ledger: Ledger,
    state: TrainState,
    checkpointer: Checkpointer,
    folder: epath.Path,
    interrupt: Interrupt,
) -> tuple[TrainState, bool]:
    """Trains to the end, or to an interrupt. Returns the state and whether it was interrupted."""
    start, b = int(state.step), parts.data.batch
    log = Log(config, parts, folder, start, sum(map(len, found)), ledger)
    batches = loader.batches(
        loader.sample_order(found, parts.data, config.seed),
        loader.Transform(parts.data, parts.size, parts.tokenizer, parts.length, parts.objective.fields),
        batch=b, start=start, stop=config.steps, seed=config.seed,
        host=jax.process_index(), hosts=jax.process_count(), ledger=ledger,
    )
    during = config.eval.sets if config.eval.every else ()
    encoder = make_encoder(config, parts)
    evaluators = [sets.make(spec, encoder, parts.data.dir) for spec in during]
    step, stopped = start, False
    for step in range(start + 1, config.steps + 1):
        # Steps run on while the host goes ahead: this batch travels to the devices while they are busy with the last.
        state, values = parts.compiled(state, loader.to_global(log.waiting.next(batches), parts.mesh))
        log.after(step, values)
        stopped = interrupt.asked(step)
        if _due(config.checkpoint.every, step) or step == config.steps or stopped:
            log.flush()  # raises before a state that is not finite is saved
            position = {"samples": step * b, "batch": b, "seed": config.seed, "counters": ledger.counters}
            checkpointer.save(state, position)
        if stopped:
            break
        if _due(config.eval.every, step) and step < config.steps:
            log.evaluate(step, evaluators, state.variables(ema=config.eval.ema))
    log.close()
    return state, stopped


class Log:
    """Writes metrics a step late, so that the host never waits for the step that it has just started."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        parts: Parts,
        folder: epath.Path,
        start: int,
        pairs: int,
        ledger: Ledger,
    ) -> None:
        self.config, self.parts, self.pairs, self.ledger = config, parts, pairs, ledger
        self.writer = metrics.Writer(folder, step=start) if jax.process_index() == 0 else None
        self.progress = metrics.Progress(start, config.steps, parts.data.batch)
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
        if not math.isfinite(scalars["loss"]):
            raise UserError(
                f"the loss of step {step} is {scalars['loss']}; the last checkpoint is whole. Lower optim.lr, lengthen "
                "optim.warmup or set optim.clip=1, then start again under another --config.run."
            )
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

    def _alarm(self, step: int, scalars: dict[str, float]) -> None:
        """Says each kind of collapse once, when it is first seen."""
        if not self.parts.objective.clusters or step < self.config.log.alarms_after:
            return
        alarms = {key.removeprefix("nclip/"): value for key, value in scalars.items() if key.startswith("nclip/")}
        clusters = self.parts.model.cluster_head["clusters"]
        for warning in diagnose(alarms, k=clusters, b=self.parts.data.batch):
            kind = warning.split(":")[0]
            if kind not in self._warned:
                self._warned.add(kind)
                say(f"WARNING, step {step}: {warning}")

    def evaluate(self, step: int, found: list[Any], variables: Mapping[str, Any]) -> None:
        """Runs an evaluation, writes its results, and keeps its time out of the speed."""
        began = time.perf_counter()
        self.flush()
        results = evaluate(found, variables)
        if self.writer:
            self.writer.write(step, results)
        say(f"step {step}: {table.headlines(results)}")
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


def _finish(config: ml_collections.ConfigDict, parts: Parts, state: TrainState, folder: epath.Path) -> dict[str, float]:
    """The last evaluation: results.json, the table, the picture and the report."""
    variables = state.variables(ema=config.eval.ema)
    encoder = make_encoder(config, parts)
    began = time.perf_counter()
    specs = (*config.eval.sets, *config.eval.final_sets)
    results = evaluate([sets.make(spec, encoder, parts.data.dir) for spec in specs], variables)
    if jax.process_index() == 0:
        record = {"results": results, "config": config.to_dict(), "environment": metrics.environment()}
        write_json(folder / "results.json", record | {"seconds": time.perf_counter() - began})
    say(table.render(results))
    if config.eval.report:
        try:
            _report(config, parts, encoder, variables, folder)
        except Exception as error:  # the run is complete and its results are written
            say(f"no report: {type(error).__name__}: {error}; python -m xclip_jax.report {folder} tries again")
    return results


def _report(
    config: ml_collections.ConfigDict, parts: Parts, encoder: Encoder, variables: Mapping[str, Any], folder: epath.Path
) -> None:
    """What the run leaves for people to look at."""
    examples = document.make(folder, parts, encoder, variables, (*config.eval.final_sets, *config.eval.sets))
    say(f"report: {folder / document.NAME}")
    if jax.process_index() == 0 and (examples.named or examples.clusters):
        title = f"What {config.objective.name} learned in {config.steps} steps of {parts.data.batch} pairs"
        picture.draw(folder / "picture.png", examples, title=title)
        say(f"picture: {folder / 'picture.png'}")
