"""Checks of a run before it starts: the trainer stops at the first FAIL, and `xclip-jax doctor` prints all."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.core.console import command, format_bytes, log0
from xclip_jax.core.errors import UserError, describe
from xclip_jax.data import tokenizer
from xclip_jax.processes import runtime
from xclip_jax.train import callbacks, flops, memory
from xclip_jax.train.checkpoint_files import (
    bytes_of_interrupted_saves,
    checkpoints_to_write,
    free_bytes,
    most_added,
    num_bytes,
)
from xclip_jax.train.job import Job, Start, open_sources
from xclip_jax.train.training_folder import OUTCOMES, TrainingFolder

OK, WARNING, FAIL = "ok", "warning", "FAIL"
# Hosts may keep the same files in different places, and differ in how they read them.
_KEYS_OF_A_HOST = (
    "data.buffer", "data.dir", "data.sources", "data.threads", "data.tokenizer", "data.workers",
)  # fmt: skip
_EXTRAS = {"NVIDIA GPU": "gpu", "TPU": "tpu"}
_NVIDIA_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # made by the drivers, the last one by WSL
# PCI vendor and devices, as in jax._src.hardware_utils; Google's network cards have the same vendor.
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      check: what was checked, such as "disk".
      text: the result; for a warning or a FAIL what is wrong, and why that matters.
      mark: "ok", "warning" or "FAIL".
      remedy: what to do about it; "" if nothing is wrong, or if the text ends in it.
      values: numbers of the text, for machines: bytes, seconds, shares and samples a second.
    """

    check: str
    text: str
    mark: str = OK
    remedy: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The text with its remedy."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.mark:<8} {self.check:<14} {' '.join(self.sentence.split())}"


def warning(check: str, text: str, remedy: str, **values: Any) -> Finding:
    """Return a finding with which the run can be started."""
    return Finding(check, text, WARNING, remedy, values)


def fail(check: str, text: str, remedy: str = "", **values: Any) -> Finding:
    """Return a finding with which the run would fail or be of no use."""
    return Finding(check, text, FAIL, remedy, values)


def attempt(check: str, function: Callable[[], T]) -> tuple[T | None, Finding | None]:
    """Return the result of `function`, or None and its `UserError`, or `OSError` about a file, as a FAIL."""
    try:
        return function(), None
    except UserError as error:
        return None, fail(check, describe(error))
    except OSError as error:
        if error.filename is None:
            raise
        return None, fail(check, f"{str(error.filename)!r}: {error.strerror}.")


def accelerator(root: str = "/") -> str:
    """Return "NVIDIA GPU" or "TPU" if this machine has one, whether or not JAX uses it, else ""."""
    files = pathlib.Path(root)
    if any((files / name).exists() for name in _NVIDIA_FILES):
        return "NVIDIA GPU"
    for vendor in files.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS:
            return "TPU"
    return "TPU" if any(path.is_char_device() for path in files.glob("dev/accel[0-9]*")) else ""


def check_devices(root: str = "/") -> Finding:
    """Return which devices JAX computes on, and whether the machine has something faster."""
    platforms = jax.config.jax_platforms  # ty: ignore[missing-attribute]
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no plugin of that platform is installed
        reason = (str(error) or "nothing is installed for it").splitlines()[0]
        text = f"JAX has no device, JAX_PLATFORMS={platforms} ({reason})"
        return fail("devices", text, "unset JAX_PLATFORMS, or set it to cpu")
    kind = devices[0].device_kind
    text = f"{len(devices)} x {kind}, of {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"
    values = {"devices": len(devices), "kind": kind, "platform": devices[0].platform}
    present = accelerator(root) if devices[0].platform == "cpu" else ""
    if not present:
        return Finding("devices", text, values=values)
    if "cpu" in (platforms or ""):
        reason = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', 'cpu')} keeps JAX from this machine's {present}"
        return warning("devices", f"{text}; {reason}", "unset it to train there", **values)
    remedy = (
        f"pip install 'xclip_jax[{_EXTRAS[present]}]', and see the warnings of python -c 'import jax; jax.devices()'"
    )
    return fail("devices", f"{text}; this machine has a {present} that JAX does not use", remedy, **values)


def warn_of_idle_accelerator(root: str = "/") -> None:
    """Print a warning if JAX computes on the CPU of a machine with a GPU or TPU, unless JAX_PLATFORMS=cpu asks for it.

    Raises:
      UserError: JAX has no device.
    """
    finding = check_devices(root)
    if finding.mark == FAIL and not finding.values:
        raise UserError(f"{finding.sentence}.")
    if finding.mark == FAIL:
        log0(f"WARNING: computing on the CPU. {finding.text}: {finding.remedy}")


def check_folder(start: Start) -> Iterator[Finding]:
    """Yield whether the run can write to its folder, and the step at which it starts."""
    folder, config = start.folder, start.config
    folder.check(config)
    step = folder.latest_step() or 0
    if jax.process_index() == 0 and (writer := folder.writer()):
        yield fail("folder", f"{folder.path} is in use by {writer}", "wait for it, or use a different --config.run")
    elif folder.completed(config) is not None:
        text = f"{folder.path} is complete at step {config.steps:,}, and nothing would be trained"
        yield warning("folder", text, "use a different --config.run to train again", step=step)
    elif not start.resumes:
        exists = "can be written" if folder.path.exists() else "can be made"
        yield Finding("folder", f"{folder.path} {exists}; the run starts at step 0", values={"step": step})
    else:
        text = f"{folder.path} has a run of this config, which resumes at step {step:,} of {config.steps:,}"
        yield Finding("folder", text, values={"step": step})


def check_callbacks(start: Start) -> Iterator[Finding]:
    """Yield the names of `log.callbacks` and `log.to` that cannot be imported."""
    for look in (callbacks.classes, callbacks.check_trackers):
        _, problem = attempt("log", lambda look=look: look(start.config))
        yield from filter(None, [problem])


def check_model(start: Start) -> Iterator[Finding]:
    """Yield the model, on the devices."""
    experiment, config = start.experiment, start.config
    count = sum(x.size for x in jax.tree.leaves(experiment.abstract.params))
    mesh = " x ".join(f"{axis} {n}" for axis, n in experiment.mesh.shape.items())
    name = config.data.tokenizer if config.data.tokenizer in tokenizer.NAMES else "from a file"
    text = (
        f"{experiment.objective.title or config.objective.name}, {count:,} parameters, batch {config.data.batch:,} "
        f"on a mesh of {mesh} ({config.mesh.strategy}), tokenizer {name} of {experiment.tokenizer.vocab_size:,} tokens"
    )
    values = {"parameters": count, "mesh": dict(experiment.mesh.shape)}
    if operations := flops.train_step(experiment.config, rows=experiment.text_rows[0]):
        values["flops_per_step"] = operations
    yield Finding("model", text, values=values)


def check_data(start: Start) -> Iterator[Finding]:
    """Yield whether the sources open, are those the run was started with, and how often they are read."""
    data, objective = start.experiment.config.data, start.experiment.objective
    _, problem = attempt("data", lambda: start.sources)
    if problem is not None:
        one = [dataclasses.replace(data, sources=(spec,), weights=(), batch=1) for spec in data.sources]
        problems = [attempt("data", lambda each=each: open_sources(each, objective))[1] for each in one]
        yield from filter(None, problems if any(problems) and len(one) > 1 else [problem])
        return
    _ = start.fingerprints
    total, unit = sum(map(len, start.samples)), "items" if objective.labelled else "pairs"
    epochs, sources = start.config.steps * data.batch / total, len(start.samples)
    text = f"{total:,} {unit} of {sources} source{'s' if sources > 1 else ''}; the run reads {epochs:,.2f} epochs"
    yield Finding("data", text, values={"samples": total, "epochs": epochs})


def check_sets(start: Start) -> Iterator[Finding]:
    """Yield the evaluation sets that cannot be opened, one finding for each reason."""
    group = start.config.eval
    evaluators, problem = attempt("evaluation", lambda: start.evaluators)
    if problem is not None:
        unopened: dict[str, list[str]] = {}
        for spec in dict.fromkeys((*group.sets, *group.final_sets)):
            if (one := attempt("evaluation", lambda spec=spec: start.open_sets([spec]))[1]) is not None:
                unopened.setdefault(one.text.removeprefix(f"{spec}: "), []).append(spec)
        for reason, names in unopened.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield fail("evaluation", reason if names[0] in reason else f"{names[0]}{more}: {reason}")
        if not unopened:
            yield problem
    elif evaluators:
        interval = "step" if group.every == 1 else f"{group.every:,} steps"
        during = f"{len(group.sets)} of them every {interval}" if group.every else "all at the end"
        opens = "1 set opens" if len(evaluators) == 1 else f"{len(evaluators)} sets open"
        yield Finding("evaluation", f"{opens}; {during}", values={"sets": len(evaluators)})


def check_weights(start: Start) -> Iterator[Finding]:
    """Yield how much of a new model `init.weights` has."""
    if start.config.init.weights and not start.resumes:
        count = sum(x.size for x in start.initial.values())
        total = sum(x.size for x in jax.tree.leaves(start.experiment.abstract.variables()))
        text = f"{start.config.init.weights}: {count / total:.0%} of the model's values are read from it"
        yield Finding("weights", text, values={"initial_values": count, "model_values": total})


def check_disk(start: Start) -> Iterator[Finding]:
    """Yield whether the disk has room for the checkpoints of the run, and for one more while it is written."""
    config, folder = start.config, start.folder
    free, size = free_bytes(folder.checkpoints), num_bytes(start.experiment.abstract)
    saved = folder.steps() if free is not None else []
    least, most = min(checkpoints_to_write(config, saved), max(2 - len(saved), 1)), most_added(config, saved)
    needs = f"the run's checkpoints need up to {format_bytes(most * size)} more, {format_bytes(size)} each"
    values: dict[str, Any] = {"checkpoint_bytes": size, "checkpoints": most, "needed_bytes": most * size}
    if free is None:
        yield Finding("disk", needs, values=values)
        return
    free += bytes_of_interrupted_saves(folder.checkpoints)
    where, values = f"the disk of {str(folder.path)!r} has {format_bytes(free)} free", values | {"free_bytes": free}
    remedy = "make room, lower checkpoint.keep or raise checkpoint.keep_every, or use another --config.run"
    if free < least * size:
        text = f"{where}, and {least} checkpoint{'s' if least > 1 else ''} of up to {format_bytes(size)} must fit"
        yield fail("disk", text, remedy, **values)
    elif free < most * size:
        yield warning("disk", f"{where}, and {needs}", remedy, **values)
    else:
        yield Finding("disk", f"{where}, and {needs}", values=values)


def check_memory(start: Start) -> Iterator[Finding]:
    """Yield whether state and step fit the devices; a step is compiled only if it may come near their memory."""
    device, experiment = jax.local_devices()[0], start.experiment
    on_cpu = device.platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        return  # the processes may share a machine, unknown to each other
    limit = memory.total(device) / (jax.local_device_count() if on_cpu else 1)
    state, free = memory.bytes_on_device(experiment.abstract), memory.capacity(device)
    values = {"state_bytes": state, "capacity_bytes": limit}
    small = ", or start from a recipe with sizes for this machine, --config small:pairs=PATH" if on_cpu else ""
    takes = f"the state takes {format_bytes(state)} of a device's {format_bytes(limit)}"
    if state > limit:
        remedy = "shard it, --config.mesh.strategy=fsdp on more devices, or use a smaller model"
        yield fail("memory", takes, f"{remedy}{small}", **values)
    elif not start.compiles:
        step = f"the step is not compiled here: --step=always does, {command('plan')} for TPUs"
        yield Finding("memory", f"{takes}; {step}", values=values)
    elif memory.fits_by_far(start.grouped, min(limit, free)):
        yield Finding("memory", f"{takes}; the step needs less than the {format_bytes(free)} free now", values=values)
    else:
        compiled, trouble = start.compiled
        usage = memory.usage(start.grouped, compiled) if compiled is not None else {}
        values |= {f"{name}_bytes": size for name, size in usage.items()}
        peak = usage.get("peak", 0.0)
        if compiled is None or peak > limit:
            needs = f"it takes {format_bytes(peak)}" if compiled is not None else trouble
            text, remedy = memory.too_large(start.config, limit, needs)
            yield fail("memory", text, f"{remedy}{small}", **values)
        elif peak > free:
            text = f"a step takes {format_bytes(peak)} of memory, and {format_bytes(free)} are free at the moment"
            yield warning("memory", text, "end other programs", **values)
        else:
            yield Finding("memory", f"a step needs {format_bytes(peak)} of {format_bytes(limit)}", values=values)


CHECKS: Sequence[tuple[str, Callable[[Start], Iterator[Finding]]]] = (
    ("folder", check_folder),
    ("log", check_callbacks),
    ("model", check_model),
    ("disk", check_disk),
    ("data", check_data),
    ("evaluation", check_sets),
    ("weights", check_weights),
    ("memory", check_memory),
)


def run_checks(start: Start) -> Iterator[Finding]:
    """Yield the findings of all checks; the same fault is reported once, and a faulty model ends the checks."""
    faults: set[str] = set()
    for name, check in CHECKS:
        findings = check(start)
        while True:
            finding, problem = attempt(name, lambda findings=findings: next(findings, None))
            finding = problem or finding
            if finding is None:
                break
            if finding.mark != FAIL or not any(text in finding.text for text in faults):
                yield finding
            if finding.mark == FAIL:
                faults.add(finding.text.rstrip("."))
        if name == "model" and problem is not None:
            return


def require(start: Start) -> None:
    """Run all checks, and print their warnings.

    Raises:
      UserError: the first FAIL.
    """
    for finding in run_checks(start):
        if finding.mark == FAIL:
            raise UserError(finding.sentence if finding.sentence[-1] in ".?" else f"{finding.sentence}.")
        if finding.mark == WARNING:
            log0(f"WARNING: {finding.sentence}")


def check_same_config(config: Config, folder: TrainingFolder) -> None:
    """Compare config, code and packages of all processes, and the newest checkpoint in the folder that each has.

    Raises:
      UserError: names the keys that differ, in the processes that differ from process 0.
    """
    if runtime.peers() is None:
        return
    keys = schema.flatten(schema.to_dict(config))
    facts = {key: value for key, value in keys.items() if key not in _KEYS_OF_A_HOST}
    captured = environment.capture()
    facts |= {f"code's {key}": captured[key] for key in ("commit", "python", "platform")}
    facts |= {f"version of {package}": version for package, version in captured["versions"].items()}
    facts["newest checkpoint in --config.run"] = folder.latest_step()
    remedy = "start all processes with the same command, code and packages, and --config.run on storage that all share"
    runtime.check_same(facts, remedy)


def check_same_data(job: Job) -> None:
    """Compare sources, tokenizer files and evaluation sets of all processes.

    Raises:
      UserError: names the source or set that differs.
    """
    if runtime.peers() is None:
        return
    facts: dict[str, Any] = {}
    if (name := job.config.data.tokenizer) not in tokenizer.NAMES:
        name = job.experiment.config.data.tokenizer
        facts["tokenizer file"] = hashlib.sha256(epath.Path(name).read_bytes()).hexdigest()[:12]
    for number, fingerprint in enumerate(job.fingerprints):
        whole = {key: value for key, value in fingerprint.items() if key not in OUTCOMES}
        content = json.dumps(whole, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        for key in OUTCOMES.keys() & fingerprint.keys():
            facts[f"{OUTCOMES[key]} of source {number}"] = fingerprint[key]["digest"]
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {digest}"
    # Hosts with other items would wait for each other's batches, or measure a mixture.
    for number, evaluator in enumerate(job.final):
        facts[f"evaluation set {number}, {evaluator.name}"] = f"hash {evaluator.data.card.split_hash}"
    remedy = "all processes have to read the same data.sources, data.tokenizer and evaluation sets"
    if any(OUTCOMES.keys() & fingerprint.keys() for fingerprint in job.fingerprints):
        remedy += ", and all of their records: see that the files can be read, and start again"
    runtime.check_same(facts, remedy)
