"""Checks of a run before it starts: the trainer stops at the first FAIL, `xclip-jax doctor` prints all of them."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError, describe
from xclip_jax.data import tokenizer
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.parallel.mesh import num_slices
from xclip_jax.processes import runtime
from xclip_jax.train import cost
from xclip_jax.train.build import Experiment
from xclip_jax.train.checkpoint_files import free_bytes, num_bytes
from xclip_jax.train.run_writer import OUTCOMES, RunWriter

OK, WARNING, FAIL = "ok", "warning", "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check."""

    check: str  # its name, such as "disk"
    text: str  # the result; for a warning or a FAIL the fault, and why it matters
    mark: str = OK  # or `WARNING`, `FAIL`
    remedy: str = ""  # "" if nothing is wrong or the text contains it

    @property
    def sentence(self) -> str:
        """Text and remedy."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def line(self) -> str:
        return f"{self.mark:<8} {self.check:<14} {' '.join(self.sentence.split())}"


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return a finding that does not prevent the run."""
    return Finding(check, text, WARNING, remedy)


def fail(check: str, text: str, remedy: str = "") -> Finding:
    """Return a finding about a run that would fail or be useless."""
    return Finding(check, text, FAIL, remedy)


def attempt(check: str, function: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of `function`, or its `UserError` or `OSError` as a FAIL."""
    try:
        return list(function())
    except (UserError, OSError) as error:
        return [fail(check, describe(error))]


def check_devices() -> Finding:
    """Return JAX's devices; JAX itself warns of an unused GPU or TPU."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no plugin of that platform is installed
        reason = (str(error) or "nothing is installed for it").splitlines()[0]
        return fail("devices", f"JAX has no device ({reason})", "unset JAX_PLATFORMS, or set it to cpu")
    return Finding("devices", f"{len(devices)} x {devices[0].device_kind}")


def check_folder(config: Config, folder: RunWriter) -> Iterator[Finding]:
    """Yield whether the run can write to its folder, and the step at which it starts."""
    folder.check(config)
    writer = folder.writer() if jax.process_index() == 0 else ""
    if writer:
        yield fail("folder", f"{folder.path} is in use by {writer}", "wait for it, or use a different --config.run")
    else:
        step = folder.latest_step() or 0
        text = f"{folder.path} can be written; the run starts at step {step:,} of {config.steps:,}"
        yield Finding("folder", text)


def check_model(experiment: Experiment) -> Iterator[Finding]:
    """Yield the size of the model and its layout on the devices."""
    config = experiment.config
    model = f"{config.objective.name}, {experiment.num_parameters:,} parameters"
    yield Finding("model", f"{model}, batch {config.data.batch:,} on a mesh of {dict(experiment.mesh.shape)}")


def check_disk(experiment: Experiment, folder: RunWriter) -> Iterator[Finding]:
    """Yield whether the disk has room for the run's checkpoints, and for one more while it is written."""
    free = free_bytes(folder.checkpoints)
    if free is None:  # a bucket
        return
    size = num_bytes(experiment.abstract)
    saved = folder.steps()
    settings = experiment.config.checkpoint
    left = max(experiment.config.steps - max(saved, default=0), 0)
    to_write = -(-left // settings.every) if settings.every else min(left, 1)
    # The oldest checkpoint is deleted once the new one is complete.
    needed = size * min(to_write, max(settings.keep + 1 - len(saved), 1))
    text = (
        f"the disk of {str(folder.path)!r} has {format_bytes(free)} free, and the run's checkpoints need up to "
        f"{format_bytes(needed)} more, {format_bytes(size)} each"
    )
    if free < needed:
        yield fail("disk", text, "make room, lower checkpoint.keep, or use another --config.run")
    else:
        yield Finding("disk", text)


def check_memory(experiment: Experiment, compile_step: Callable[[], tuple[Any, str]] | None) -> Iterator[Finding]:
    """Yield whether state and step fit the devices.

    If the step may come near their memory, `compile_step` compiles it, see `cost.compile_if_fits`; None if too slow.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        return  # the processes may share a machine, unknown to each other
    limit = cost.device_memory(device) / (jax.local_device_count() if on_cpu else 1)
    state = cost.bytes_on_device(experiment.abstract)
    takes = f"the state takes {format_bytes(state)} of a device's {format_bytes(limit)}"
    if state > limit:
        axes = experiment.mesh.shape
        slices = num_slices(list(experiment.mesh.devices.flat))  # "data" is a multiple of it
        n = axes["data"] * axes["fsdp"] // slices if axes["data"] > slices else "N"
        flags = f"--config.mesh.strategy=fsdp --config.mesh.fsdp={n} --config.mesh.data=-1"
        yield fail("memory", takes, f"shard it over {n} devices, {flags}, or use a smaller model")
    elif compile_step is None:
        yield Finding("memory", f"{takes}; the step is not compiled here; xclip-jax plan compiles it for TPUs")
    elif cost.fits_by_far(experiment, limit):
        yield Finding("memory", f"{takes}; the step needs far less")
    else:
        compiled, trouble = compile_step()
        peak = cost.memory_usage(experiment, compiled)["peak"] if compiled is not None else 0.0
        if compiled is None or peak > limit:
            needed = trouble or f"it takes {format_bytes(peak)}"
            text = f"the step does not fit a device's {format_bytes(limit)}: {needed}"
            remedies = [*cost.remedies(experiment), "more devices"]
            remedy = f"change one after the other until it fits: {', '.join(remedies)}"
            yield fail("memory", text, remedy)
        else:
            yield Finding("memory", f"a step needs {format_bytes(peak)} of {format_bytes(limit)}")


def require(findings: Iterable[Finding]) -> None:
    """Raise the first FAIL among `findings` as `UserError`."""
    for finding in findings:
        if finding.mark == FAIL:
            raise UserError(f"{finding.sentence.removesuffix('.')}.")


def check_same_command(facts: Mapping[str, Any], remedy: str) -> None:
    """Raise `UserError` unless `facts`, values for JSON, code and packages agree with process 0."""
    peers = runtime.peers()
    if peers is None:
        return
    captured = environment.capture()
    code = {f"code's {key}": captured[key] for key in ("commit", "python", "platform")}
    versions = {f"version of {package}": version for package, version in captured["versions"].items()}
    peers.check_same({**facts, **code, **versions}, remedy)


def check_same_config(config: Config, folder: RunWriter) -> None:
    """Raise `UserError` unless config, code, packages and newest checkpoint agree with process 0."""
    if runtime.peers() is None:
        return
    of_a_host = schema.keys_where(host="own")
    facts = {key: value for key, value in schema.flatten(schema.to_dict(config)).items() if key not in of_a_host}
    facts["newest checkpoint in --config.run"] = folder.latest_step()
    remedy = "start all processes with the same command, code and packages, and --config.run on storage that all share"
    check_same_command(facts, remedy)


def set_hashes(evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """Return facts on sets to compare: hosts with other items would wait for each other, or measure a mixture."""
    return {f"evaluation set {i}, {x.name}": f"hash {x.data.card.split_hash}" for i, x in enumerate(evaluators)}


def check_same_data(
    experiment: Experiment,
    fingerprints: Sequence[Mapping[str, Any]],
    evaluators: Sequence[Evaluator],
    initial: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Raise `UserError` unless sources, tokenizer file, evaluation sets and tensors `initial` agree with process 0."""
    peers = runtime.peers()
    if peers is None:
        return
    facts: dict[str, Any] = {}
    if experiment.config.data.tokenizer not in tokenizer.NAMES:
        facts["tokenizer file"] = _hash(tokenizer.read_file(experiment.config.data.tokenizer))
    for number, fingerprint in enumerate(fingerprints):
        whole = {key: value["digest"] if key in OUTCOMES else value for key, value in fingerprint.items()}
        content = json.dumps(whole, sort_keys=True, default=str)  # hosts may list the same keys in another order
        facts[f"source {number}"] = f"{fingerprint.get('samples')} samples, hash {_hash(content.encode())}"
    if initial:
        number = 0
        for name in sorted(initial):
            number = zlib.crc32(
                np.ascontiguousarray(initial[name]).view(np.uint8).data, zlib.crc32(name.encode(), number)
            )
        facts["tensors of init.weights"] = f"hash {number:08x}"
    read = "data.sources, data.tokenizer, init.weights and evaluation sets"
    remedy = f"all processes have to read the same {read}, and all records"
    peers.check_same(facts | set_hashes(evaluators), remedy)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
