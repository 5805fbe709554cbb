"""Checks of a run before it starts: the trainer stops at the first FAIL, and `xclip-jax doctor` prints all."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.errors import UserError, describe
from xclip_jax.data import tokenizer
from xclip_jax.processes import runtime
from xclip_jax.train import callbacks, cost
from xclip_jax.train.checkpoint_files import free_bytes, most_added, num_bytes
from xclip_jax.train.job import Job
from xclip_jax.train.training_folder import OUTCOMES, TrainingFolder

OK, WARNING, FAIL = "ok", "warning", "FAIL"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      check: what was checked, such as "disk".
      text: the result; for a warning or a FAIL what is wrong, and why that matters.
      mark: "ok", "warning" or "FAIL".
      remedy: what to do about it; "" if nothing is wrong, or if the text ends in it.
      values: numbers of the text, for machines.
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
    """Return the result of `function`, or None and its `UserError` or `OSError` as a FAIL."""
    try:
        return function(), None
    except (UserError, OSError) as error:
        return None, fail(check, describe(error))


def check_devices() -> Finding:
    """Return which devices JAX computes on; JAX itself warns of a GPU or TPU that it does not use."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no plugin of that platform is installed
        reason = (str(error) or "nothing is installed for it").splitlines()[0]
        return fail("devices", f"JAX has no device ({reason})", "unset JAX_PLATFORMS, or set it to cpu")
    kind, processes = devices[0].device_kind, jax.process_count()
    text = f"{len(devices)} x {kind}, of {processes} process{'es' if processes > 1 else ''}"
    return Finding("devices", text, values={"devices": len(devices), "kind": kind, "platform": devices[0].platform})


def check_folder(job: Job) -> Iterator[Finding]:
    """Yield whether the run can write to its folder, and the step at which it starts."""
    folder, config = job.folder, job.config
    folder.check(config)
    step = folder.latest_step() or 0
    if jax.process_index() == 0 and (writer := folder.writer()):
        yield fail("folder", f"{folder.path} is in use by {writer}", "wait for it, or use a different --config.run")
    elif folder.completed(config) is not None:
        text = f"{folder.path} is complete at step {config.steps:,}, and nothing would be trained"
        yield warning("folder", text, "use a different --config.run to train again", step=step)
    elif not job.resumes:
        exists = "can be written" if folder.path.exists() else "can be made"
        yield Finding("folder", f"{folder.path} {exists}; the run starts at step 0", values={"step": step})
    else:
        text = f"{folder.path} has a run of this config, which resumes at step {step:,} of {config.steps:,}"
        yield Finding("folder", text, values={"step": step})


def check_log(job: Job) -> Iterator[Finding]:
    """Raise `UserError` for names of `log.callbacks` and `log.to` that cannot be imported."""
    callbacks.classes(job.config)
    callbacks.check_trackers(job.config)
    yield from ()


def check_model(job: Job) -> Iterator[Finding]:
    """Yield the model, on the devices."""
    experiment, config, count = job.experiment, job.config, job.experiment.num_parameters
    mesh = " x ".join(f"{axis} {n}" for axis, n in experiment.mesh.shape.items())
    name = config.data.tokenizer if config.data.tokenizer in tokenizer.NAMES else "from a file"
    text = (
        f"{experiment.objective.title or config.objective.name}, {count:,} parameters, batch {config.data.batch:,} "
        f"on a mesh of {mesh} ({config.mesh.strategy}), tokenizer {name} of {experiment.tokenizer.vocab_size:,} tokens"
    )
    values = {"parameters": count, "mesh": dict(experiment.mesh.shape)}
    if operations := cost.step_flops(experiment.config, rows=experiment.text_rows[0]):
        values["flops_per_step"] = operations
    yield Finding("model", text, values=values)
    axes, strategy = experiment.mesh.shape, config.mesh.strategy
    splits = axes["fsdp"] * (axes["model"] if strategy == "fsdp_tp" else 1)
    if strategy.startswith("fsdp") and splits == 1 < axes["data"]:
        text = f"mesh.strategy={strategy!r} splits no parameters while mesh.fsdp is 1"
        yield warning("mesh", text, f"set {_split(config, axes['data'])}, or mesh.strategy to 'dp'")


def _split(config: Config, devices: int | str) -> str:
    """Return the flags that split parameters over `devices`; a fixed mesh.data would leave none of them."""
    return f"--config.mesh.fsdp={devices}" + ("" if config.mesh.data == -1 else " --config.mesh.data=-1")


def check_data(job: Job) -> Iterator[Finding]:
    """Yield whether the sources open, are those the run was started with, and how often they are read."""
    _ = job.sources, job.fingerprints
    total, unit = job.num_samples, "items" if job.experiment.objective.labelled else "pairs"
    sources = len(job.sources)
    text = f"{total:,} {unit} of {sources} source{'s' if sources > 1 else ''}; the run reads {job.epochs:,.2f} epochs"
    yield Finding("data", text, values={"samples": total, "epochs": job.epochs})


def check_sets(job: Job) -> Iterator[Finding]:
    """Yield whether the evaluation sets can be opened."""
    group, count = job.config.eval, len(job.evaluators)
    if count:
        interval = "step" if group.every == 1 else f"{group.every:,} steps"
        during = f"{len(group.sets)} of them every {interval}" if group.every else "all at the end"
        during += ", and all before the first step" if job.before else ""
        opens = "1 set opens" if count == 1 else f"{count} sets open"
        yield Finding("evaluation", f"{opens}; {during}", values={"sets": count})


def check_weights(job: Job) -> Iterator[Finding]:
    """Yield how much of a new model `init.weights` has."""
    tensors, _ = job.initial
    if tensors:
        count = sum(x.size for x in tensors.values())
        total = sum(x.size for x in jax.tree.leaves(job.experiment.abstract.variables()))
        text = f"{job.config.init.weights}: {count / total:.0%} of the model's values are read from it"
        yield Finding("weights", text, values={"initial_values": count, "model_values": total})


def check_disk(job: Job) -> Iterator[Finding]:
    """Yield whether the disk has room for the checkpoints of the run, and for one more while it is written."""
    config, folder = job.config, job.folder
    free, size = free_bytes(folder.checkpoints), num_bytes(job.experiment.abstract)
    saved = folder.steps() if free is not None else []
    most = most_added(config, saved)
    least = min(most, 1 if saved else 2)
    needs = f"the run's checkpoints need up to {format_bytes(most * size)} more, {format_bytes(size)} each"
    values: dict[str, Any] = {"checkpoint_bytes": size, "checkpoints": most, "needed_bytes": most * size}
    if free is None:
        yield Finding("disk", needs, values=values)
        return
    text = f"the disk of {str(folder.path)!r} has {format_bytes(free)} free, and {needs}"
    mark = FAIL if free < least * size else WARNING if free < most * size else OK
    fewer = "" if mark == FAIL else "lower checkpoint.keep, "
    remedy = f"make room, {fewer}or use another --config.run"
    yield Finding("disk", text, mark, "" if mark == OK else remedy, values | {"free_bytes": free})


def check_memory(job: Job) -> Iterator[Finding]:
    """Yield whether state and step fit the devices; a step is compiled only if it may come near their memory."""
    device, experiment, config = jax.local_devices()[0], job.experiment, job.config
    on_cpu = device.platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        return  # the processes may share a machine, unknown to each other
    limit = cost.device_memory(device) / (jax.local_device_count() if on_cpu else 1)
    state = cost.bytes_on_device(experiment.abstract)
    values = {"state_bytes": state, "capacity_bytes": limit}
    small = ", or start from the recipe small" if on_cpu else ""
    takes = f"the state takes {format_bytes(state)} of a device's {format_bytes(limit)}"
    if state > limit:
        axes = experiment.mesh.shape
        n = axes["data"] * axes["fsdp"] if axes["data"] > 1 else "N"
        flags = f"--config.mesh.strategy=fsdp {_split(config, n)}"
        remedy = f"shard it over {n} devices, {flags}, or use a smaller model"
        yield fail("memory", takes, f"{remedy}{small}", **values)
    elif not job.compiles:
        step = "the step is not compiled here: --step=always does, xclip-jax plan for TPUs"
        yield Finding("memory", f"{takes}; {step}", values=values)
    elif cost.fits_by_far(experiment, limit):
        yield Finding("memory", f"{takes}; the step needs far less", values=values)
    else:
        compiled, trouble = job.compiled
        usage = cost.memory_usage(job.grouped, compiled) if compiled is not None else {}
        values |= {f"{name}_bytes": size for name, size in usage.items()}
        peak = usage.get("peak", 0.0)
        if compiled is None or peak > limit:
            needs = f"it takes {format_bytes(peak)}" if compiled is not None else trouble
            text, remedy = cost.too_large(experiment, limit, needs)
            yield fail("memory", text, f"{remedy}{small}", **values)
        else:
            yield Finding("memory", f"a step needs {format_bytes(peak)} of {format_bytes(limit)}", values=values)


CHECKS: Sequence[tuple[str, Callable[[Job], Iterator[Finding]]]] = (
    ("folder", check_folder),
    ("log", check_log),
    ("model", check_model),
    ("disk", check_disk),
    ("data", check_data),
    ("evaluation", check_sets),
    ("weights", check_weights),
    ("memory", check_memory),
)


def run_checks(job: Job) -> Iterator[Finding]:
    """Yield the findings of all checks; the same fault is reported once, and a faulty model ends the checks."""
    faults: set[str] = set()
    for name, check in CHECKS:
        findings, problem = attempt(name, lambda check=check: list(check(job)))
        for finding in findings or filter(None, [problem]):
            if not any(fault in finding.text for fault in faults):
                yield finding
            if finding.mark == FAIL:
                faults.add(finding.text.rstrip("."))
        if name == "model" and problem is not None:
            return


def require(job: Job) -> None:
    """Run all checks, print their warnings, and raise the first FAIL as `UserError`."""
    for finding in run_checks(job):
        if finding.mark == FAIL:
            raise UserError(finding.sentence if finding.sentence[-1] in ".?" else f"{finding.sentence}.")
        if finding.mark == WARNING:
            log0(f"WARNING: {finding.sentence}")


def check_same_config(config: Config, folder: TrainingFolder) -> None:
    """Raise `UserError` unless config, code, packages and newest checkpoint agree with process 0."""
    if (peers := runtime.peers()) is None:
        return
    keys = schema.flatten(schema.to_dict(config))
    of_a_host = schema.keys_where(host="own")
    facts = {key: value for key, value in keys.items() if key not in of_a_host}
    captured = environment.capture()
    facts |= {f"code's {key}": captured[key] for key in ("commit", "python", "platform")}
    facts |= {f"version of {package}": version for package, version in captured["versions"].items()}
    facts["newest checkpoint in --config.run"] = folder.latest_step()
    remedy = "start all processes with the same command, code and packages, and --config.run on storage that all share"
    peers.check_same(facts, remedy)


def check_same_data(job: Job) -> None:
    """Raise `UserError` unless sources, tokenizer file and evaluation sets agree with process 0."""
    if (peers := runtime.peers()) is None:
        return
    facts: dict[str, Any] = {}
    if (name := job.experiment.config.data.tokenizer) not in tokenizer.NAMES:
        facts["tokenizer file"] = _hash(tokenizer.read_file(name))
    for number, fingerprint in enumerate(job.fingerprints):
        whole = {key: value for key, value in fingerprint.items() if key not in OUTCOMES}
        for key in OUTCOMES.keys() & fingerprint.keys():
            facts[f"{OUTCOMES[key]} of source {number}"] = fingerprint[key]["digest"]
        digest = _hash(json.dumps(whole, sort_keys=True, default=str).encode())
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {digest}"
    # Hosts with other items would wait for each other's batches, or measure a mixture.
    for number, evaluator in enumerate(job.final):
        facts[f"evaluation set {number}, {evaluator.name}"] = f"hash {evaluator.data.card.split_hash}"
    remedy = "all processes have to read the same data.sources, data.tokenizer and evaluation sets, and all records"
    peers.check_same(facts, remedy)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
