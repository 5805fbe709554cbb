"""Preparation of a run: its parts are opened and checked in order, before anything is written."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample
from xclip_jax.data import length_groups, loader, records, sources
from xclip_jax.data.base import Source
from xclip_jax.data.length_groups import AUTO, WHOLE, LengthGroups
from xclip_jax.data.loader import SampleOrder
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.interop import hub
from xclip_jax.train import checks, cost
from xclip_jax.train.build import Experiment, build, make_encoder, profile_of_run
from xclip_jax.train.run_writer import RunWriter
from xclip_jax.train.weights import Origin, read_initial

CAPTIONS = 1024  # captions to read when choosing length groups

Fingerprints = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run, made by `prepare`.

    Attributes:
      config: the resolved config.
      folder: the run's folder.
      experiment: model, objective and step, with the folder's tokenizer and length groups.
      order: the order of the samples.
      num_samples: samples of all sources, one epoch.
      fingerprints: one fingerprint per source.
      encoder: shared by all evaluators.
      evaluators: evaluators of `eval.sets` and `eval.sets_at_end` by spec.
      origin: step and commit of the initial weights.
    """

    config: Config
    folder: RunWriter
    experiment: Experiment
    order: SampleOrder
    num_samples: int
    fingerprints: Fingerprints
    encoder: Encoder
    evaluators: Mapping[str, Evaluator]
    origin: Origin

    def evaluators_of(self, step: int) -> list[Evaluator]:
        """Return the evaluators due after `step`, or before the first step if it is 0; see `final_evaluators`."""
        if step == 0:
            # Of initial weights; a new classifier is untrained.
            begins = bool(self.config.init.weights) and not self.experiment.objective.labelled
            return self.final_evaluators if begins else []
        group = self.config.eval
        during = step < self.config.steps and is_due(group.every, step)
        return [self.evaluators[spec] for spec in group.sets] if during else []

    @property
    def final_evaluators(self) -> list[Evaluator]:
        """Evaluators of `eval.sets` and `eval.sets_at_end`, run after the last step."""
        return list(self.evaluators.values())


def is_due(every: int, step: int) -> bool:
    """Whether an event of every `every` steps (0: never) is due at `step`."""
    return every > 0 and step % every == 0


def prepare(
    config: Config,
    folder: RunWriter,
    compiling: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[Run, dict[str, np.ndarray]]:
    """Open and check the parts of a run; nothing is written.

    If the step may not fit the devices, it is compiled, in the context `compiling`. `UserError` for a missing part, or
    one that does not fit. Returns the run, and a new run's tensors from `init.weights`, as large as the model.
    """
    checks.require(checks.check_folder(config, folder))
    experiment = open_experiment(config, folder)
    checks.require(checks.check_disk(experiment, folder))
    samples, fingerprints = open_data(experiment, folder)
    encoder = make_encoder(experiment, class_names(experiment, fingerprints))
    evaluators = open_evaluators(experiment, encoder)
    initial, origin = open_initial(experiment, folder, encoder.classes)
    experiment = with_length_groups(experiment, folder, samples)

    def compile_step() -> tuple[Any, str]:
        with compiling():
            return cost.compile_if_fits(experiment)

    checks.require(checks.check_memory(experiment, compile_step))
    order = loader.sample_order(samples, experiment.config.data, config.seed)
    if order.captions:
        digests = ({"data.spread_duplicate_captions": digest} for digest in order.captions)
        fingerprints = [old | new for old, new in zip(fingerprints, digests, strict=True)]
        folder.check_sources(config, fingerprints)
    run = Run(
        config=config,
        folder=folder,
        experiment=experiment,
        order=order,
        num_samples=sum(map(len, samples)),
        fingerprints=fingerprints,
        encoder=encoder,
        evaluators=evaluators,
        origin=origin,
    )
    return run, initial


def open_experiment(config: Config, folder: RunWriter) -> Experiment:
    """Build the experiment of a run, with the tokenizer of its folder."""
    data = dataclasses.replace(config.data, tokenizer=folder.tokenizer(config))
    return build(dataclasses.replace(config, data=data))


def open_data(experiment: Experiment, folder: RunWriter) -> tuple[list[Source], Fingerprints]:
    """Open the training data; return its samples and fingerprints. A resumed run must read the same data."""
    config = experiment.config
    objective = experiment.objective
    opened = sources.open_sources(config.data, objective.classes, objective.fields)
    fingerprints = [source.fingerprint() for source in opened]
    folder.check_sources(config, fingerprints)
    return opened, fingerprints


def class_names(experiment: Experiment, fingerprints: Fingerprints) -> Sequence[str] | None:
    """Return the class names of a labelled source, else None."""
    return fingerprints[0].get("classes") if experiment.objective.labelled else None


def open_evaluators(experiment: Experiment, encoder: Encoder) -> dict[str, Evaluator]:
    """Open all sets of `eval.sets` and `eval.sets_at_end`; return their evaluators by spec."""
    config = experiment.config
    specs = tuple(dict.fromkeys((*config.eval.sets, *config.eval.sets_at_end)))
    profile = profile_of_run(config)
    evaluators = registry.open_all(specs, encoder, None, profile, config.data)
    registry.check_class_names(profile.names, evaluators)
    return dict(zip(specs, evaluators, strict=True))


def open_initial(
    experiment: Experiment, folder: RunWriter, classes: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], Origin]:
    """Read the tensors of `init.weights` and their origin, unless the run resumes."""
    config = experiment.config
    if not config.init.weights or folder.latest_step() is not None:
        return {}, Origin()
    return read_initial(config, experiment.abstract, classes)


def with_length_groups(experiment: Experiment, folder: RunWriter, samples: Sequence[Source]) -> Experiment:
    """Return `experiment` with the folder's length groups or, for data.length_groups="auto", chosen ones."""
    if experiment.config.data.length_groups != AUTO:
        return experiment
    groups = folder.length_groups(experiment.text_rows) or choose_length_groups(experiment, samples)
    return dataclasses.replace(experiment, length_groups=groups)


def check_names(config: ml_collections.ConfigDict | Config) -> Config:
    """Check keys and names of a config without data and devices; return it resolved."""
    config = resolve(config)
    sources.parse_all(config.data.sources)
    for spec in (*config.eval.sets, *config.eval.sets_at_end):
        registry.check(spec)
    return config


def extras(config: Config) -> list[str]:
    """Return the extras of this package (setup.py) required by the names in a config."""
    names = {name for name in config.log.trackers if name != "tensorboard" and ":" not in name}
    if hub.is_hub(config.init.weights):
        names.add("hub")
    for source in config.data.sources:
        names.update(sources.extras(source))
    for spec in (*config.eval.sets, *config.eval.sets_at_end):
        names.update(registry.check(spec).extras(spec))
        for text in (spec, spec.partition("/")[2]):  # wds:PATH, and probe/wds:PATH
            if text.partition(":")[0] in sources.SOURCES:
                names.update(sources.extras(text))
    return sorted(names)


def choose_length_groups(experiment: Experiment, samples: Sequence[Source]) -> LengthGroups:
    """Choose length groups for the captions of `samples`, the same on all processes; no cuts if they save little."""
    config = experiment.config
    tower = experiment.model.txt
    context = experiment.context_length
    if "txt" not in experiment.model.towers or not tower.cuttable:
        return WHOLE
    rows, draws = experiment.text_rows
    whole = cost.step_flops(config)
    flops_of: Any = tower.cut_flops

    def saved(groups: LengthGroups) -> float:
        cut = cost.step_flops(config, groups, rows)
        return 1 - cut / whole if cut and whole else 0.0  # some custom towers report no FLOPs

    if not length_groups.worthwhile(saved(LengthGroups(((1, 1.0),))), config.steps):
        return WHOLE
    counts = count_lengths(experiment, samples) if jax.process_index() == 0 else np.zeros(context + 1, np.int32)
    counts = np.asarray(multihost_utils.broadcast_one_to_all(counts))  # a sample may be bad on one process only
    groups = length_groups.choose(counts, rows=rows, draws=draws, flops_of=flops_of)
    if not length_groups.worthwhile(saved(groups), config.steps):
        return WHOLE
    mean = counts @ np.arange(context + 1) / counts.sum()
    log0(
        f"captions have {mean:.0f} tokens on average: texts are encoded in groups, TOKENS:SHARE {groups}, which "
        f"saves {saved(groups):.0%} of a step's FLOPs"
    )
    return groups


def count_lengths(experiment: Experiment, samples: Sequence[Source]) -> np.ndarray:
    """Return the number of first good samples per length of their longest text in tokens, (context + 1,)."""
    data = experiment.config.data
    length = experiment.context_length
    seed = experiment.config.seed
    # Any order will do; this one avoids reading every caption.
    order = loader.sample_order(samples, dataclasses.replace(data, spread_duplicate_captions=False, cache=False), seed)
    transform = experiment.transform()
    places = map(order.locate, range(min(CAPTIONS, sum(map(len, samples)))))
    # Tokenized here, as the drawn caption depends on the position.
    found = ((order.sources[number], index) for number, index in places)
    read = records.read_each(found, lambda record: record | {"image": None}, threads=data.threads)
    counts = np.zeros(length + 1, np.int32)
    rows = np.zeros((1 + data.negatives, length), np.int32)
    row = {"text": rows[:1]} | ({"negatives": rows[None, 1:]} if data.negatives else {})
    for position, record in enumerate(read):
        if isinstance(record, BadSample):
            continue
        try:
            transform(record, np.random.default_rng((seed, position)), row)
        except Exception as error:
            records.as_bad_sample(error)
            continue
        counts[experiment.tokenizer.lengths(rows).max()] += 1
    return counts
