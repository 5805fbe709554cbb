"""A run before its first step: its parts are opened and checked before anything is written."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError, public
from xclip_jax.data import holdout, labelled, loader, sources
from xclip_jax.data.base import Source
from xclip_jax.data.config import DataConfig
from xclip_jax.data.length_groups import AUTO
from xclip_jax.data.loader import SampleOrder
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.interop import hub
from xclip_jax.objectives import Objective, make_objective
from xclip_jax.parallel.mesh import BatchPart, batch_part
from xclip_jax.train import caption_lengths, flops, memory
from xclip_jax.train.build import Experiment, build, make_encoder, own_profile
from xclip_jax.train.training_folder import TrainingFolder
from xclip_jax.train.weights import read_initial


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to start.

    Attributes:
      config, experiment, folder: the config, what is built from it, and the run's folder.
      part: which part of each batch this process loads.
      initial: tensors of `init.weights` that a new run starts from.
      sources: training data, as `data.subset` and `data.caption_noise` change it.
      order: order of the samples.
      fingerprints: a fingerprint of each whole source, with digests of the records that decide the order.
      during: evaluators of `eval.sets`, run every `eval.every` steps.
      final: evaluators of `eval.sets` and `eval.final_sets`, run at the end.
      encoder: the encoder that the evaluators share.
    """

    config: Config
    experiment: Experiment
    folder: TrainingFolder
    part: BatchPart
    initial: Mapping[str, np.ndarray]
    sources: list[Source]
    order: SampleOrder
    fingerprints: list[dict[str, Any]]
    during: list[Evaluator]
    final: list[Evaluator]
    encoder: Encoder

    @property
    def num_samples(self) -> int:
        """Samples of all sources together: an epoch."""
        return sum(map(len, self.sources))

    @property
    def epochs(self) -> float:
        """Epochs of the whole run."""
        return self.config.steps * self.experiment.config.data.batch / self.num_samples


def check(config: ml_collections.ConfigDict | Config) -> Config:
    """Check, without data and devices, all keys, and the names of the folder, sources and evaluation sets.

    Returns:
      The config, resolved.

    Raises:
      UserError: a wrong key or value, a name that does not exist, or no source.
    """
    config = resolve(config)
    sources.parse_all(config.data.sources)
    for spec in (*config.eval.sets, *config.eval.final_sets):
        registry.check(spec)
    return config


def extras(config: Config) -> list[str]:
    """Return the extras of this package (setup.py) that a run needs, judged by the names in its config."""
    names = {name for name in config.log.to if name != "tensorboard" and ":" not in name}
    if hub.is_hub(config.init.weights):
        names.add("hub")
    for source in map(sources.parse, config.data.sources):
        names.update(source.kind.extras(source.rest))
    for spec in (*config.eval.sets, *config.eval.final_sets):
        for name in registry.check(spec).sources:
            names.update(sources.SOURCES[name].extras(""))
        for text in (spec, spec.partition("/")[2]):  # wds:PATH, and probe/wds:PATH
            prefix, _, rest = text.partition(":")
            if prefix in sources.SOURCES:
                names.update(sources.SOURCES[prefix].extras(rest))
    return sorted(names)


class Start:
    """A run that is about to start: what it is built from and reads, each part opened when it is first used.

    Any part raises `UserError` for what is missing or does not fit the config.

    Attributes:
      config, folder: config and folder of the run.
      compiles: whether checks may compile the step, which may take minutes.
    """

    def __init__(self, config: Config, folder: TrainingFolder) -> None:
        self.config, self.folder = config, folder
        self.compiles = True

    @functools.cached_property
    def experiment(self) -> Experiment:
        """Model, objective and step, with the tokenizer of the run's folder."""
        data = dataclasses.replace(self.config.data, tokenizer=self.folder.tokenizer(self.config))
        return build(dataclasses.replace(self.config, data=data))

    @functools.cached_property
    def resumes(self) -> bool:
        """Whether the folder has a checkpoint."""
        return self.folder.latest_step() is not None

    @functools.cached_property
    def sources(self) -> list[Source]:
        """The training data, whole."""
        return open_sources(self.experiment.config.data, self.experiment.objective)

    @functools.cached_property
    def fingerprints(self) -> list[dict[str, Any]]:
        """Fingerprints of the sources, which a run that resumes read before."""
        fingerprints = [source.fingerprint() for source in self.sources]
        self.folder.check_sources(self.config, fingerprints)
        return fingerprints

    @property
    def classes(self) -> Sequence[str] | None:
        """Classes of the training data, if the run is fine-tuned on labels."""
        return self.fingerprints[0].get("classes") if self.experiment.objective.labelled else None

    @functools.cached_property
    def samples(self) -> list[Source]:
        """The training data as `data.subset` and `data.caption_noise` change it."""
        labelled = self.experiment.objective.labelled
        return holdout.apply_controls(self.sources, self.experiment.config.data, self.config.seed, labelled=labelled)

    @functools.cached_property
    def grouped(self) -> Experiment:
        """The experiment with the groups of texts that `data.length_groups="auto"` chooses."""
        if self.config.data.length_groups != AUTO:
            return self.experiment
        groups = self.folder.length_groups(self.experiment.text_rows)
        groups = groups or caption_lengths.choose(self.experiment, self.samples)
        return dataclasses.replace(self.experiment, length_groups=groups)

    @functools.cached_property
    def compiled(self) -> tuple[Any, str]:
        """The compiled step, or None and the reason why it does not fit, see `memory.compile_if_fits`."""
        return memory.compile_if_fits(self.grouped)

    @functools.cached_property
    def initial(self) -> Mapping[str, np.ndarray]:
        """Tensors of `init.weights`, for a run that does not resume."""
        if not self.config.init.weights or self.resumes:
            return {}
        return read_initial(self.config, self.experiment.abstract, self.classes)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of all evaluators."""
        return make_encoder(self.experiment, self.classes)

    def open_sets(self, specs: Sequence[str]) -> list[Evaluator]:
        """Open evaluation sets."""
        return registry.open_all(specs, self.encoder, None, own_profile(self.config), self.experiment.config.data)

    @functools.cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """All sets of `eval.sets` and `eval.final_sets`, by name."""
        specs = tuple(dict.fromkeys((*self.config.eval.sets, *self.config.eval.final_sets)))
        return dict(zip(specs, self.open_sets(specs), strict=True))


def prepare(config: Config, folder: TrainingFolder) -> Job:
    """Build and open everything that a run needs."""
    return make_job(Start(config, folder))


def make_job(start: Start) -> Job:
    """Return the run with its groups of texts, its order of samples, and all evaluators open."""
    config, folder, fingerprints, experiment = start.config, start.folder, start.fingerprints, start.grouped
    initial, evaluators = start.initial, start.evaluators
    order = loader.sample_order(
        start.samples, experiment.config.data, config.seed
    )  # the last, as it may read all captions
    if order.captions:
        captions = ({"data.spread_duplicate_captions": outcome} for outcome in order.captions)
        fingerprints = [a | b for a, b in zip(fingerprints, captions, strict=True)]
        folder.check_sources(config, fingerprints)
    if reason := flops.without_peak(experiment.mesh.devices.flat[0]):
        log0(reason)
    during = [evaluators[spec] for spec in config.eval.sets] if config.eval.every else []
    return Job(
        config=config,
        experiment=experiment,
        folder=folder,
        part=batch_part(experiment.mesh),
        initial=initial,
        sources=start.samples,
        order=order,
        fingerprints=fingerprints,
        during=during,
        final=list(evaluators.values()),
        encoder=start.encoder,
    )


def check_moved_sources(config: Config, folder: TrainingFolder) -> None:
    """Check that sources which were renamed since the run in `folder` was started have the same data.

    Raises:
      UserError: they have other data, or cannot be opened.
    """
    content = folder.read_config()
    if content is None or tuple(content["config"]["data"]["sources"]) == public(tuple(config.data.sources)):
        return
    opened = open_sources(config.data, make_objective(config.objective))
    folder.check_sources(config, [source.fingerprint() for source in opened])


def open_sources(data: DataConfig, objective: Objective) -> list[Source]:
    """Open training data; an error has the remedy of the objective."""
    try:
        return sources.open_sources(data, objective.classes, objective.fields)
    except labelled.MismatchError as error:
        remedy = "use another source, or change objective.classify.classes (1 for labels that are numbers) or .tower"
        raise UserError(f"{error}; {remedy}.") from error
