"""The checks of a config before its run, in the order in which they depend on each other."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from xclip_jax.commands.doctor.finding import Finding, Options, attempt, warning
from xclip_jax.commands.doctor.machine import check_devices, check_versions
from xclip_jax.commands.doctor.reading import check_data, check_sets
from xclip_jax.commands.doctor.resources import check_disk, check_folder, check_step
from xclip_jax.commands.doctor.settings import check_settings
from xclip_jax.config.schema import Config, resolve
from xclip_jax.data import tokenizer
from xclip_jax.train import callbacks
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.training_folder import TrainingFolder
from xclip_jax.train.weights import read_initial


def check_config(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, options: Options | None = None
) -> Iterator[Finding]:
    """Yield what is right and wrong with a run of `config` on this machine. Nothing is written to the run's folder.

    Args:
      config: of the run.
      options: how thorough to be.
    """
    options = options or Options()
    devices = list(check_devices())
    yield from devices
    yield from check_versions()
    if not devices[0].values:  # JAX has none, so nothing can be built
        return
    resolved, problem = attempt("config", lambda: resolve(config))
    if resolved is None:
        yield from filter(None, [problem])
        return
    folder = TrainingFolder(resolved.run)
    _, unusable = attempt("folder", lambda: folder.check(resolved))
    if unusable:
        yield unusable
    else:
        yield from check_folder(resolved, folder)
    yield from check_log(resolved)
    experiment, problem = attempt("model", lambda: _build(resolved, folder))
    if experiment is None:
        yield from filter(None, [problem])
        yield warning("model", "memory, disk, data and evaluation sets are not checked yet", "correct the model first")
        return
    yield _model(experiment)
    step = check_step(experiment, folder, options.step)
    yield from step.findings
    yield from check_disk(experiment, folder)
    known, pairs = [], None
    for finding in check_data(
        experiment, folder, step_seconds=step.seconds, samples=options.samples, seconds=options.seconds
    ):
        known.append(finding.text)
        pairs = finding.values.get("samples", pairs) if finding.check == "data" else pairs
        yield finding
    yield from check_sets(experiment, known)
    yield from check_weights(experiment, folder)
    yield from check_settings(experiment, step.seconds, pairs)


def check_log(config: Config) -> Iterator[Finding]:
    """Yield which of `log.callbacks` and `log.to` cannot be imported; none is made."""
    for look in (callbacks.classes, callbacks.check_trackers):
        _, problem = attempt("log", functools.partial(look, config))
        yield from filter(None, [problem])


def _build(config: Config, folder: TrainingFolder) -> Experiment:
    data = dataclasses.replace(config.data, tokenizer=folder.tokenizer(config))
    return build(dataclasses.replace(config, data=data))


def _model(experiment: Experiment) -> Finding:
    config, tokens = experiment.config, experiment.tokenizer
    count = sum(x.size for x in jax.tree.leaves(experiment.abstract.params))
    mesh = " x ".join(f"{axis} {n}" for axis, n in experiment.mesh.shape.items())
    name = config.data.tokenizer if config.data.tokenizer in tokenizer.NAMES else "from a file"
    text = (
        f"{experiment.objective.title or config.objective.name}, {count:,} parameters, batch {config.data.batch:,} "
        f"on a mesh of {mesh} ({config.mesh.strategy}), tokenizer {name} of {tokens.vocab_size:,} tokens"
    )
    return Finding("model", text, values={"parameters": count, "mesh": dict(experiment.mesh.shape)})


def check_weights(experiment: Experiment, folder: TrainingFolder) -> Iterator[Finding]:
    """Yield whether a new run can start from `init.weights`; nothing without them, or where the run resumes."""
    where = experiment.config.init.weights
    if not where or folder.latest_step() is not None:
        return
    tensors, problem = attempt("weights", lambda: read_initial(experiment.config, experiment.abstract))
    if tensors is None:
        yield from filter(None, [problem])
        return
    count, total = (
        sum(x.size for x in tensors.values()),
        sum(x.size for x in jax.tree.leaves(experiment.abstract.variables())),
    )
    values = {"initial_values": count, "model_values": total}
    yield Finding("weights", f"{where}: {count / total:.0%} of the model's values are read from it", values=values)
