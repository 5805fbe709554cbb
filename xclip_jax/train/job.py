"""A run before its first step: its parts are opened and checked before anything is written."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import labelled, length_groups, loader, records, sources
from xclip_jax.data.base import Source
from xclip_jax.data.length_groups import AUTO, WHOLE, LengthGroups
from xclip_jax.data.loader import SampleOrder
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.interop import hub
from xclip_jax.parallel.mesh import BatchPart, batch_part
from xclip_jax.train import cost
from xclip_jax.train.build import Experiment, build, make_encoder, own_profile
from xclip_jax.train.training_folder import TrainingFolder
from xclip_jax.train.weights import read_initial

CAPTIONS = 1024  # that are read to choose groups of lengths


class Job:
    """A run with its parts, each built or opened when it is first used; `prepare` opens all.

    Any part raises `UserError` for what is missing or does not fit the config.

    Attributes:
      config, folder: config and folder of the run.
      compiles: whether checks may compile the step, which may take minutes.
      compiling: context in which they do.
    """

    def __init__(self, config: Config, folder: TrainingFolder) -> None:
        self.config, self.folder = config, folder
        self.compiles = True
        self.compiling: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @functools.cached_property
    def experiment(self) -> Experiment:
        """Model, objective and step, with the tokenizer of the run's folder; once prepared, as `grouped`."""
        data = dataclasses.replace(self.config.data, tokenizer=self.folder.tokenizer(self.config))
        return build(dataclasses.replace(self.config, data=data))

    @functools.cached_property
    def resumes(self) -> bool:
        """Whether the folder has a checkpoint."""
        return self.folder.latest_step() is not None

    @functools.cached_property
    def part(self) -> BatchPart:
        """Which part of each batch this process loads."""
        return batch_part(self.experiment.mesh)

    @functools.cached_property
    def sources(self) -> list[Source]:
        """The training data, whole; an error has the remedy of the objective."""
        objective = self.experiment.objective
        try:
            return sources.open_sources(self.experiment.config.data, objective.classes, objective.fields)
        except labelled.MismatchError as error:
            remedy = "use another source, or change objective.classify.classes (1 for numbers) or .tower"
            raise UserError(f"{error}; {remedy}.") from error

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
    def order(self) -> SampleOrder:
        """The order of the samples, for which all captions may be read."""
        return loader.sample_order(self.sources, self.experiment.config.data, self.config.seed)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together: an epoch."""
        return sum(map(len, self.sources))

    @property
    def epochs(self) -> float:
        """Epochs of the whole run."""
        return self.config.steps * self.experiment.config.data.batch / self.num_samples

    @functools.cached_property
    def grouped(self) -> Experiment:
        """The experiment with the groups of texts that `data.length_groups="auto"` chooses."""
        if self.config.data.length_groups != AUTO:
            return self.experiment
        groups = self.folder.length_groups(self.experiment.text_rows)
        groups = groups or choose_length_groups(self.experiment, self.sources)
        return dataclasses.replace(self.experiment, length_groups=groups)

    @functools.cached_property
    def compiled(self) -> tuple[Any, str]:
        """The compiled step, or None and the reason why it does not fit, see `cost.compile_if_fits`."""
        grouped = self.grouped  # reads captions
        with self.compiling():
            return cost.compile_if_fits(grouped)

    @functools.cached_property
    def initial(self) -> tuple[Mapping[str, np.ndarray], int]:
        """Tensors of `init.weights` and their step, for a run that does not resume; once used they are deleted."""
        if not self.config.init.weights or self.resumes:
            return {}, 0
        return read_initial(self.config, self.experiment.abstract, self.classes)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of all evaluators."""
        return make_encoder(self.experiment, self.classes)

    @functools.cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """All sets of `eval.sets` and `eval.final_sets`, by name."""
        config = self.experiment.config
        specs = tuple(dict.fromkeys((*config.eval.sets, *config.eval.final_sets)))
        opened = registry.open_all(specs, self.encoder, None, own_profile(self.config), config.data)
        return dict(zip(specs, opened, strict=True))

    @property
    def before(self) -> list[Evaluator]:
        """Evaluators of given weights, run before the first step; none for a classifier that is yet to be trained."""
        return self.final if self.config.init.weights and not self.experiment.objective.labelled else []

    @property
    def during(self) -> list[Evaluator]:
        """Evaluators of `eval.sets`, run every `eval.every` steps."""
        return [self.evaluators[spec] for spec in self.config.eval.sets] if self.config.eval.every else []

    @property
    def final(self) -> list[Evaluator]:
        """Evaluators of `eval.sets` and `eval.final_sets`, run at the end."""
        return list(self.evaluators.values())

    def prepare(self) -> "Job":
        """Open all parts; return the run itself."""
        self.experiment = self.grouped
        _ = self.initial, self.evaluators
        if captions := self.order.captions:
            outcomes = ({"data.spread_duplicate_captions": outcome} for outcome in captions)
            self.fingerprints = [a | b for a, b in zip(self.fingerprints, outcomes, strict=True)]
            self.folder.check_sources(self.config, self.fingerprints)
        return self


def check(config: ml_collections.ConfigDict | Config) -> Config:
    """Return the resolved config, after a check of its keys and names that needs no data and no devices."""
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
        names.update(registry.check(spec).extras(spec))
        for text in (spec, spec.partition("/")[2]):  # wds:PATH, and probe/wds:PATH
            prefix, _, rest = text.partition(":")
            if prefix in sources.SOURCES:
                names.update(sources.SOURCES[prefix].extras(rest))
    return sorted(names)


def choose_length_groups(experiment: Experiment, samples: Sequence[Source]) -> LengthGroups:
    """Groups for the captions of `samples`, the same on all processes; without cuts where they would save little."""
    config, tower, context = experiment.config, experiment.model.txt, experiment.context_length
    if "txt" not in experiment.model.towers or not tower.cuttable:
        return WHOLE
    rows, draws = experiment.text_rows

    def saved(groups: LengthGroups) -> float:
        cut, whole = cost.step_flops(config, groups, rows), cost.step_flops(config, WHOLE)
        return 1 - cut / whole if cut and whole else 0.0  # unknown of some towers of other packages

    flops_of, most = cost.cut_flops(tower), saved(LengthGroups(((1, 1.0),)))
    if flops_of is None or not length_groups.worthwhile(most, config.steps):
        return WHOLE
    counts = count_lengths(experiment, samples) if jax.process_index() == 0 else np.zeros(context + 1, np.int32)
    counts = np.asarray(multihost_utils.broadcast_one_to_all(counts))  # a sample may be bad on one process only
    groups = length_groups.choose(counts, rows=rows, draws=draws, flops_of=flops_of)
    if not length_groups.worthwhile(saved(groups), config.steps):
        return WHOLE
    mean = counts @ np.arange(context + 1) / counts.sum()
    log0(
        f"captions have {mean:.0f} tokens on average: texts are encoded in groups (data.length_groups={groups}), which "
        f"saves {saved(groups):.0%} of a step's FLOPs"
    )
    return groups


def count_lengths(experiment: Experiment, samples: Sequence[Source]) -> np.ndarray:
    """(context + 1,) how many of the run's first captions have a length, in tokens. Bad samples are left out."""
    data, length, seed = experiment.config.data, experiment.context_length, experiment.config.seed
    # An order that is as good, without a look at all captions.
    order = loader.sample_order(samples, dataclasses.replace(data, spread_duplicate_captions=False, cache=False), seed)
    transform = experiment.transform(("text",))
    # Tokenized here, as the caption that is drawn depends on the position.
    places = map(order.place, range(min(CAPTIONS, sum(map(len, samples)))))
    read = records.read_each(
        ((order.sources[number], index) for number, index in places),
        lambda record: {"text": record["text"], "tags": record["tags"]},
        threads=data.threads,
    )
    counts, row = np.zeros(length + 1, np.int32), np.zeros((1, length), np.int32)
    for position, record in enumerate(read):
        if isinstance(record, BadSample):
            continue
        try:
            transform(record, np.random.default_rng((seed, position)), {"text": row})
        except Exception as error:
            records.as_bad_sample(error)
            continue
        counts[experiment.tokenizer.lengths(row)] += 1
    return counts
