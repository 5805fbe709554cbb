"""Memory and disk: what the train step and the checkpoints need, against what is available; how long a step takes."""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from xclip_jax.commands.doctor.finding import Finding, attempt, fail, warning
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core.console import command, format_bytes, format_duration
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import is_remote
from xclip_jax.data import loader
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.train import checkpoint_files, flops, memory
from xclip_jax.train.build import Experiment
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.state import TrainState, create
from xclip_jax.train.training_folder import TrainingFolder

# Steps of more FLOPs are not run on a CPU unless they are asked for: they take minutes.
CHEAP = 2e12
TIMED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """Result of checking the train step: its time in seconds (None if not timed) and the findings."""

    seconds: float | None
    findings: list[Finding]


def check_step(experiment: Experiment, folder: RunFolder, mode: str = "auto") -> Step:
    """Compile the train step, compare its memory with the devices', and time it from the state that the run would have.

    Args:
      experiment: of the run.
      folder: the run's; a newest checkpoint is restored, which shows whether it can be.
      mode: "always", "never", or "auto": unless it would take long on this CPU.
    """
    device = jax.devices()[0]
    operations = flops.train_step(experiment.config, rows=experiment.text_rows[0])
    limit, state = memory.capacity(device), memory.bytes_on_device(experiment.abstract)
    values = {"state_bytes": state, "capacity_bytes": limit} | ({"flops_per_step": operations} if operations else {})
    if state > limit:
        text = memory.state_too_large(state, limit)
        return Step(None, [fail("memory", text, memory.STATE_REMEDY, **values)])
    if mode == "never" or (mode == "auto" and device.platform == "cpu" and (operations or math.inf) > CHEAP):
        cost = f"{operations / 1e12:,.3g} TFLOP" if operations else f"whose {flops.uncounted(experiment.config)}"
        text = (
            f"the state takes {format_bytes(state)} of a device's {format_bytes(limit)}; the step, {cost}, is not "
            f"compiled here: --step always does, {command('plan')} for TPUs"
        )
        return Step(None, [Finding("memory", text, values=values)])
    compiled, trouble = memory.compile_if_fits(experiment)
    usage = memory.usage(experiment, compiled) if compiled is not None else {}
    values |= {f"{name}_bytes": size for name, size in usage.items()}
    if compiled is None or usage["peak"] > limit:
        return Step(None, [_too_large(experiment, usage, limit, trouble, values)])
    text = f"a step needs {format_bytes(usage['peak'])} of {format_bytes(limit)}"
    findings = [Finding("memory", f"{text} ({format_bytes(usage['activations'])} for activations)", values=values)]
    seconds, timed = _time(experiment, folder, compiled, operations)
    return Step(seconds, [*findings, *timed])


def _too_large(
    experiment: Experiment, usage: dict[str, float], limit: float, trouble: str, values: dict[str, Any]
) -> Finding:
    needs = f"it takes {format_bytes(usage['peak'])}" if usage else trouble
    config = schema.complete(schema.to_dict(experiment.config))
    change = memory.suggest(config, list(experiment.mesh.devices.flat), limit, usage.get("peak", 0.0))
    remedy = f"it fits with {change}" if change else "no change that was tried makes it fit; take more devices"
    return fail("memory", f"the step does not fit a device's {format_bytes(limit)}: {needs}", remedy, **values)


def _time(
    experiment: Experiment, folder: RunFolder, compiled: Any, operations: float | None
) -> tuple[float, list[Finding]]:
    findings, restored = [], None
    if (step := folder.latest_step()) is not None:
        restored, problem = attempt("resume", lambda: _restore(experiment, folder))
        findings.append(problem or Finding("resume", f"the checkpoint of step {step} can be read, and fits the model"))
    state = create(experiment.init, experiment.abstract) if restored is None else restored
    batch = zeros(experiment)
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    b, left = experiment.data.batch, experiment.config.steps - (step or 0)
    speed = f", {operations / seconds / 1e12:,.3g} TFLOP/s" if operations else ""
    remaining = f"the remaining {left:,} steps take" if left != 1 else "the remaining step takes"
    text = (
        f"{seconds:.3g} s, {b / seconds:,.0f} samples/s{speed}; {remaining} "
        f"{format_duration(left * seconds)} without reading and evaluating"
    )
    values = {"step_seconds": seconds, "samples_per_second": b / seconds, "run_seconds": left * seconds}
    return seconds, [*findings, Finding("step", text, values=values)]


def _restore(experiment: Experiment, folder: RunFolder) -> TrainState:
    with Checkpointer(folder.path, read_only=True) as checkpointer:
        return checkpointer.restore(experiment.abstract)[0]


def zeros(experiment: Experiment) -> dict[str, jax.Array]:
    """A batch of black images and empty texts: a step takes as long as on any other."""
    size, hosts = experiment.image_size, batch_part(experiment.mesh)[1]
    rows = experiment.data.batch // hosts
    fields = {
        "image": np.zeros((rows, size, size, 3), np.uint8),
        "text": np.full((rows, experiment.context_length), experiment.tokenizer.eot_id, np.int32),
        "label": np.zeros(rows, np.float32),
    }
    return loader.to_global({name: fields[name] for name in experiment.objective.fields}, experiment.mesh)


def check_disk(experiment: Experiment, folder: RunFolder) -> Iterator[Finding]:
    """Yield whether the disk has room for the checkpoints: those that are kept, and one that is being written."""
    config, remote = experiment.config, is_remote(str(folder.path))
    saved = [] if remote else folder.steps()
    each, count = (
        checkpoint_files.num_bytes(experiment.abstract),
        len(saved) + checkpoint_files.most_added(config, saved),
    )
    number, verb = ("1 checkpoint", "takes") if count == 1 else (f"{count} checkpoints", "take")
    text = f"{number} of {format_bytes(each)} {verb} {format_bytes(count * each)}"
    values: dict[str, Any] = {"checkpoint_bytes": each, "checkpoints": count, "needed_bytes": count * each}
    if remote:
        yield Finding("disk", f"{text} in a bucket", values=values)
        return
    needed = max(count * each - sum(map(folder_bytes, checkpoints(folder).values())), 0)
    place = existing_parent(folder).resolve()
    free = shutil.disk_usage(place).free
    values["free_bytes"] = free
    if needed > free:
        rarer = " or raise checkpoint.keep_every" if config.checkpoint.keep_every else ""
        remedy = f"free some, lower checkpoint.keep{rarer}, or use a run folder on another disk"
        yield fail("disk", f"{text}, and {place} has {format_bytes(free)} free", remedy, **values)
    else:
        yield Finding("disk", f"{text}; {place} has {format_bytes(free)} free", values=values)


def existing_parent(folder: RunFolder) -> pathlib.Path:
    """Return the nearest folder above a run's folder that exists, or itself."""
    path = pathlib.Path(folder.path)
    while not path.is_dir():
        path = path.parent
    return path


def checkpoints(folder: RunFolder) -> dict[int, pathlib.Path]:
    """Return the folders of whole checkpoints on a local disk, by step."""
    return {step: pathlib.Path(folder.checkpoints) / str(step) for step in folder.steps()}


def folder_bytes(path: pathlib.Path) -> int:
    """Return the bytes of all files in a folder; what another process deletes meanwhile does not count."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def check_folder(config: Config, folder: TrainingFolder) -> Iterator[Finding]:
    """Yield what a folder that a run of `config` may use holds, and from which step the run would start."""
    step, values = folder.latest_step(), {"step": folder.latest_step() or 0}
    if writer := folder.writer():
        yield fail("folder", f"{folder.path} is in use by {writer}", "wait for it, or use a different --config.run")
    elif folder.completed(config) is not None:
        text = f"{folder.path} is complete at step {config.steps:,}, and nothing would be trained"
        yield warning("folder", text, "use a different --config.run to train again", **values)
    elif step is None:
        exists = "can be written" if folder.path.exists() else "can be made"
        yield Finding("folder", f"{folder.path} {exists}; the run starts at step 0", values=values)
    else:
        text = f"{folder.path} has a run of this config, which resumes at step {step:,} of {config.steps:,}"
        yield Finding("folder", text, values=values)
