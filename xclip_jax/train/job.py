"""What a run consists of, checked and opened before anything is written or trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.addresses import public
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.paths import expand_home
from xclip_jax.data import controls, labelled, loader, opening, rgb, sources
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
from xclip_jax.train import caption_lengths, flops
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.encoder import make_encoder, own_profile
from xclip_jax.train.training_folder import TRANSPARENT, TrainingFolder
from xclip_jax.train.weights import read_initial


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to start.

    Attributes:
      config, experiment, folder: the config, what is built from it, and the run's folder.
      part: which part of each batch this process loads.
      initial: tensors of `init.weights` that a new run starts from.
      sources: training data, as `data.subset` and `data.caption_noise` change it.
      order: of their samples.
      fingerprints: one of each whole source, with digests of what the order takes from its records; on process 0 with
        the share of transparent images among some records, where there are any.
      during: evaluators of `eval.sets`, run every `eval.every` steps.
      final: those of `eval.sets` and `eval.final_sets`, run at the end.
      encoder: what the evaluators share.
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
        return self.config.steps * self.experiment.data.batch / self.num_samples


def check(config: ml_collections.ConfigDict | Config) -> Config:
    """Check what needs neither data nor devices: all keys, and the names of the folder, sources and evaluation sets.

    Returns:
      The config, resolved.

    Raises:
      UserError: a wrong key or value, a name that does not exist, or no source.
    """
    config = resolve(config)
    expand_home(config.run)
    sources.parse_all(config.data.sources)
    for spec in (*config.eval.sets, *config.eval.final_sets):
        registry.check(spec)
    return config


def extras(config: Config) -> list[str]:
    """Return the extras of this package (setup.py) that a run needs, by the names in its config alone.

    They are those of its trackers, of weights and data on the Hub, and of other sources and evaluation sets.
    """
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


def prepare(config: Config, folder: TrainingFolder) -> Job:
    """Build and open everything that a run needs, so that what is missing shows before it is written or trained.

    Raises:
      UserError: a source, a set or initial weights that cannot be opened or do not fit the config.
    """
    built = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=folder.tokenizer(config)))
    experiment = build(built)
    opened = _open_sources(experiment.data, experiment.objective)
    fingerprints = [source.fingerprint() for source in opened]
    folder.check_sources(config, fingerprints)
    samples = controls.apply(opened, experiment.data, config.seed, labelled=experiment.objective.labelled)
    if config.data.length_groups == AUTO:
        groups = folder.length_groups(experiment.text_rows) or caption_lengths.choose(experiment, samples)
        experiment = dataclasses.replace(experiment, length_groups=groups)
    starts = config.init.weights and folder.latest_step() is None
    classes = fingerprints[0].get("classes")
    initial = read_initial(config, experiment.abstract, classes) if starts else {}
    encoder = make_encoder(experiment, classes)
    specs = tuple(dict.fromkeys((*config.eval.sets, *config.eval.final_sets)))
    evaluators = dict(
        zip(specs, registry.open_all(specs, encoder, None, own_profile(config), experiment.data), strict=True)
    )
    during = [evaluators[spec] for spec in config.eval.sets] if config.eval.every else []
    final = list(evaluators.values())
    order = loader.sample_order(samples, experiment.data, config.seed)  # the last, as it may read all captions
    if order.captions:
        captions = ({"data.spread_duplicate_captions": outcome} for outcome in order.captions)
        fingerprints = [a | b for a, b in zip(fingerprints, captions, strict=True)]
        folder.check_sources(config, fingerprints)
    if jax.process_index() == 0 and "image" in experiment.objective.fields:
        data = experiment.data
        shares = [sources.transparent_share([source], data.read_timeout, data.threads) for source in opened]
        if any(shares):
            fingerprints = [a | {TRANSPARENT: share} for a, share in zip(fingerprints, shares, strict=True)]
            log0(f"transparent images: {rgb.describe(max(shares), data.background)} (data.background)")
    part = batch_part(experiment.mesh)
    if reason := flops.without_peak(experiment.mesh.devices.flat[0]):
        log0(reason)
    return Job(config, experiment, folder, part, initial, samples, order, fingerprints, during, final, encoder)


def check_moved_sources(config: Config, folder: TrainingFolder) -> None:
    """Check that sources which the run in `folder` names otherwise are its own, elsewhere now.

    Raises:
      UserError: they have other data, or cannot be opened.
    """
    content = folder.read_config()
    if content is None or tuple(content["config"]["data"]["sources"]) == public(tuple(config.data.sources)):
        return
    opened = _open_sources(config.data, make_objective(config.objective))
    folder.check_sources(config, [source.fingerprint() for source in opened])


def _open_sources(data: DataConfig, objective: Objective) -> list[Source]:
    try:
        return opening.open_sources(data, objective.classes, objective.fields)
    except labelled.MismatchError as error:
        remedy = objective.source_remedies.get(error.fault, "use another source")
        raise UserError(f"{error}; {remedy}.") from error
