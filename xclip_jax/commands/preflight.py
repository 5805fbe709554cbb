"""The doctor's checks of a config before its run: devices, versions, and whatever the trainer checks."""

import dataclasses
import functools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import ml_collections
import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import xclip_jax
from xclip_jax.config.schema import Config, resolve
from xclip_jax.core.console import command, format_bytes, format_duration
from xclip_jax.data import inspect, loader
from xclip_jax.data.inspect import LoaderSample
from xclip_jax.objectives import Report
from xclip_jax.objectives.clip import Contrastive
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.train import memory
from xclip_jax.train.build import Experiment
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.checks import FAIL, Finding, attempt, check_devices, fail, run_checks, warning
from xclip_jax.train.clock import INPUT_BOUND
from xclip_jax.train.job import Job
from xclip_jax.train.state import create
from xclip_jax.train.training_folder import TrainingFolder

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
CHEAP_FLOPS = 2e12  # of a step; a CPU takes minutes for more
TIMED_STEPS = 2
_HOUR = 3600
_MANY_BAD = 0.5  # share of data.max_bad_fraction above which the samples that were not read may well stop a run
_MANY_TWINS = 0.05  # share of a batch's pairs that have the caption of another pair: false negatives


@dataclasses.dataclass(frozen=True)
class Options:
    """How thorough the checks are.

    Attributes:
      samples: number of samples to read at least.
      seconds: how long to read at least.
      step: "always", "never", or "auto": whether to compile and time the train step; "auto" does unless that takes
        minutes on this CPU.
    """

    samples: int = 512
    seconds: float = 3.0
    step: str = "auto"


def check_config(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, options: Options | None = None
) -> Iterator[Finding]:
    """Yield what is right and wrong with a run of `config` on this machine. Nothing is written to the run's folder."""
    options = options or Options()
    yield (devices := check_devices())
    yield from check_versions()
    if not devices.values:  # JAX has none, so nothing can be built
        return
    resolved, problem = attempt("config", lambda: resolve(config))
    if resolved is None:
        yield from filter(None, [problem])
        return
    start, marks, operations = Job(resolved, TrainingFolder(resolved.run)), {}, None
    on_cpu = jax.devices()[0].platform == "cpu"
    for finding in run_checks(start):
        marks[finding.check] = finding.mark
        if finding.check == "model":
            operations = finding.values.get("flops_per_step")
            cheap = not on_cpu or (operations or np.inf) <= CHEAP_FLOPS
            start.compiles = options.step == "always" or (options.step == "auto" and cheap)
        yield finding
    if marks["model"] == FAIL:
        yield warning("model", "memory, disk, data and evaluation sets are not checked yet", "correct the model first")
        return
    seconds = None
    if start.compiles and FAIL not in (marks.get("memory"), marks.get("data")):
        yield from (timed := time_step(start, operations))
        seconds = timed[-1].values["step_seconds"]
    if marks["data"] != FAIL:
        yield from check_samples(start, seconds, options)
    yield from check_settings(start.experiment, seconds)


def check_versions() -> Iterator[Finding]:
    """Yield the versions of Python and of the required packages, and those that are not allowed."""
    try:
        requires, bounds = metadata.requires("xclip_jax") or [], metadata.metadata("xclip_jax")["Requires-Python"]
    except metadata.PackageNotFoundError:
        text = "xclip_jax is on the path and not installed, so the versions that it allows are unknown"
        yield warning("versions", text, "pip install -e . in its checkout")
        return
    wrong = [finding for line in requires if (finding := _check_requirement(Requirement(line)))]
    python = platform.python_version()
    if bounds and python not in SpecifierSet(bounds):
        wrong.append(fail("versions", f"Python is {python}, and xclip_jax needs {bounds}", "use another Python"))
    installed = {name: version for name in (*_PACKAGES, *_PLUGINS) if (version := _version(name))}
    wrong += _check_jax_packages(installed)
    yield from wrong
    if not wrong:
        packages = ", ".join(f"{name} {installed[name]}" for name in _PACKAGES)
        own = xclip_jax.__version__
        values = {"python": python, "xclip_jax": own} | installed
        yield Finding("versions", f"Python {python}, {packages}: all as xclip_jax {own} needs them", values=values)


def _version(package: str) -> str:
    """Version of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _check_requirement(requirement: Requirement) -> Finding | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    version, install = _version(requirement.name), f"pip install '{requirement.name}{requirement.specifier}'"
    if not version:
        return fail("versions", f"{requirement.name} is not installed", install)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return fail("versions", f"{requirement.name} is {version}, and xclip_jax needs {requirement.specifier}", install)


def _check_jax_packages(installed: Mapping[str, str]) -> list[Finding]:
    """Compare the versions of jax, jaxlib and JAX's plugins for CUDA, which are released together."""
    findings, jaxlib = [], installed.get("jaxlib", "0")
    for name in _PLUGINS:
        if name in installed and Version(installed[name]).release != Version(jaxlib).release:
            text = f"{name} is {installed[name]} and jaxlib {jaxlib}, so JAX does not use the GPU"
            cuda = name.split("-")[1]
            findings.append(fail("versions", text, f"pip install -U 'jax[{cuda}]=={installed['jax']}'"))
    if Version(installed.get("jax", "0")).release != Version(jaxlib).release:
        text = f"jax is {installed.get('jax')} and jaxlib {jaxlib}; they are released and tested as a pair"
        findings.append(warning("versions", text, f"pip install jaxlib=={installed.get('jax')}"))
    return findings


def time_step(start: Job, operations: float | None = None) -> list[Finding]:
    """Restore the newest checkpoint, if there is one, and time the compiled step.

    Args:
      start: the run.
      operations: FLOPs of a step, if known.
    """
    findings, experiment = [], start.grouped
    state, step = None, start.folder.latest_step() or 0
    if start.resumes:
        with Checkpointer(start.folder.path, read_only=True) as checkpointer:
            restored, problem = attempt("resume", lambda: checkpointer.restore(experiment.abstract))
        state = restored[0] if restored else None
        findings.append(problem or Finding("resume", f"the checkpoint of step {step} can be read, and fits the model"))
    state = create(experiment.init, experiment.abstract) if state is None else state
    (compiled, _), batch = start.compiled, zeros(experiment)
    ends = []
    for _ in range(TIMED_STEPS + 1):  # the first is a warm-up
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[0]) / TIMED_STEPS
    usage = memory.usage(experiment, compiled)
    b, left = start.config.data.batch, start.config.steps - step
    speed = f", {operations / seconds / 1e12:,.3g} TFLOP/s" if operations else ""
    remaining = f"the remaining {left:,} steps take" if left != 1 else "the remaining step takes"
    text = (
        f"{seconds:.3g} s, {b / seconds:,.0f} samples/s{speed}, {format_bytes(usage['peak'])} of memory; {remaining} "
        f"{format_duration(left * seconds)} without reading and evaluating"
    )
    values = {"step_seconds": seconds, "samples_per_second": b / seconds, "run_seconds": left * seconds}
    values |= {f"{name}_bytes": size for name, size in usage.items()}
    return [*findings, Finding("step", text, values=values)]


def zeros(experiment: Experiment) -> dict[str, jax.Array]:
    """A batch of black images and empty texts: a step takes as long as on any other."""
    size, rows = experiment.image_size, experiment.config.data.batch // batch_part(experiment.mesh)[1]
    fields = {
        "image": np.zeros((rows, size, size, 3), np.uint8),
        "text": np.full((rows, experiment.context_length), experiment.tokenizer.eot_id, np.int32),
        "label": np.zeros(rows, np.float32),
    }
    return loader.to_global({name: fields[name] for name in experiment.objective.fields}, experiment.mesh)


def check_samples(start: Job, step_seconds: float | None, options: Options) -> Iterator[Finding]:
    """Read the first samples as the run would: yield the share of bad ones, equal texts, and the speed of reading."""
    experiment = start.experiment
    transform = experiment.transform()
    limits = {"samples": options.samples, "seconds": options.seconds}
    read = functools.partial(inspect.read_batches, start.samples, transform, start.config.seed, **limits)
    sample, problem = attempt("samples", read)
    if sample is None:
        yield from filter(None, [problem])
        return
    yield _bad_samples(sample, start)
    if sample.text is not None:
        yield _texts(sample.text, experiment)
    yield _speed(sample, experiment, step_seconds)


def _bad_samples(sample: LoaderSample, start: Job) -> Finding:
    bad, allowed, sources = sum(sample.bad.values()), start.config.data.max_bad_fraction, start.sources
    known = sum(sum(source.known_faults().values()) for source in sources) / max(sum(map(len, sources)), 1)
    share = max(bad / (sample.read + bad), known)
    text = f"{share:.2%} bad, of {sample.read + bad:,} that were read"
    values = {"read": sample.read + bad, "bad": bad, "bad_share": share, "allowed_share": allowed}
    if not share:
        return Finding("samples", text, values=values)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sample.bad.items())
    text += f" ({reasons}; the first is {_place(sample.example)})" if sample.example else " and by the index"
    remedy = f"list them with {command('check')} SOURCE and repair the data, or raise data.max_bad_fraction"
    if share > allowed:
        return fail("samples", f"{text}; above data.max_bad_fraction={allowed:g} the run stops", remedy, **values)
    if share > _MANY_BAD * allowed:
        return warning("samples", f"{text}; the run stops above data.max_bad_fraction={allowed:g}", remedy, **values)
    return Finding("samples", f"{text}; allowed are {allowed:.2%}", values=values)


def _place(line: str) -> str:
    """Return the names of a bad sample, from its line of a ledger."""
    entry = json.loads(line)
    names = {key: value for key, value in entry.items() if key not in ("position", "reason", "detail")}
    return json.dumps(names, ensure_ascii=False)


def _texts(text: np.ndarray, experiment: Experiment) -> Finding:
    """Return the lengths of texts, and the share of equal ones, which are false negatives of a contrastive loss."""
    objective, length = experiment.objective, experiment.context_length
    rows = text[: experiment.config.data.batch]
    twins = inspect.repeated_share(rows)
    full = float(np.mean(experiment.tokenizer.lengths(text) == text.shape[1]))
    values = {"full_share": full, "duplicate_share": twins}
    if len(text) > 1 and (text == text[0]).all():
        part = f" in their {length} tokens" if full else ""
        fault = f"all {len(text):,} texts that were read are equal{part}: there is nothing to learn"
        return fail("texts", fault, "give each image a caption of its own", **values)
    described = f"{full:.0%} of the texts fill all {length} tokens"
    equal = f"{twins:.0%} of {len(rows)} pairs have the text of another one"
    terms = [term for name, term in objective.terms.items() if objective.weights[name]]
    apart = experiment.config.data.spread_duplicate_captions
    if any(isinstance(term, Contrastive) for term in terms) and twins > _MANY_TWINS and not apart:
        text_ = f"{described}; {equal}, which makes them false negatives"
        return warning("texts", text_, "set data.spread_duplicate_captions=True", **values)
    return Finding("texts", f"{described}; {equal}", values=values)


def _speed(sample: LoaderSample, experiment: Experiment, step_seconds: float | None) -> Finding:
    data = experiment.config.data
    readers = f"data.workers={data.workers}" if data.workers else f"data.threads={data.threads}"
    text = f"{sample.speed:,.0f} samples/s with {readers} on {os.cpu_count()} cores"
    values = {"reading_samples_per_second": sample.speed}
    if data.cache:
        text += ", in the first epoch: data.cache makes later ones faster"
    if not step_seconds:
        return Finding("reading", f"{text}; whether that is enough is unknown without a step", values=values)
    needed = data.batch / batch_part(experiment.mesh)[1] / step_seconds
    share = max(1 - sample.speed / needed, 0.0)
    values |= {"needed_samples_per_second": needed, "wait_share": share}
    text += f"; the steps need {needed:,.0f}"
    if share <= INPUT_BOUND or data.cache:
        return Finding("reading", text, values=values)
    remedy = "raise data.workers (at most the cores) or data.threads, store smaller images, or read from a faster disk"
    return warning("reading", f"{text}: the devices would wait {share:.0%} of the time", remedy, **values)


def check_settings(experiment: Experiment, step_seconds: float | None) -> Iterator[Finding]:
    """Yield settings with which a run shows nothing, or may lose more than an hour."""
    config, objective = experiment.config, experiment.objective
    steps, group, every = config.steps, config.eval, config.checkpoint.every
    wrong: list[tuple[str, str]] = []
    if not group.sets and not group.final_sets:
        text = "eval.sets and eval.final_sets are empty, so nothing shows what the model can do"
        wrong.append((text, f"name a set; {command('evaluate')} --help lists them"))
    if group.ema and not (config.ema.on or objective.teacher):
        wrong.append(("eval.ema evaluates a moving average, and the run keeps none", "set ema.on=True"))
    warmup = config.log.collapse_warmup_steps
    if warmup >= steps and any(type(term.report).health is not Report.health for term in objective.terms.values()):
        text = f"log.collapse_warmup_steps={warmup} is not below the {steps:,} steps, so no step warns of a failure"
        wrong.append((text, f"set it to {steps // 3:,}"))
    interval = every if 0 < every < steps else steps
    if step_seconds and interval * step_seconds > _HOUR:
        text = f"checkpoint.every={every} saves every {interval * step_seconds / _HOUR:.1f} h, which a kill loses"
        wrong.append((text, f"set it to {max(int(_HOUR / 2 / step_seconds), 1):,}, half an hour"))
    elif interval == steps and not step_seconds:
        text = f"checkpoint.every={every} saves only at the end, and a kill loses the run"
        wrong.append((text, f"set it to {max(steps // 10, 1):,}"))
    yield from (warning("settings", text, remedy) for text, remedy in wrong)
    if not wrong:
        yield Finding("settings", "the run is evaluated, and a kill loses little")
