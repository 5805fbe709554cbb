"""Memory of a train step: what it needs by its compiled form, what the devices have, and which change would fit."""

import functools
import math
import re
from typing import Any

import jax
import ml_collections

from xclip_jax.config import schema
from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.environment import host_memory
from xclip_jax.core.errors import UserError
from xclip_jax.models.transformer import REMAT_POLICIES
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.parallel.mesh import BATCH_AXES, batch_sharding
from xclip_jax.train.build import Experiment, build

REMAT = tuple(REMAT_POLICIES)  # in the order of what is computed again
MICROBATCHES = (2, 4, 16, 64)
# The most that rematerialisation and zero1 save together: remedies that would have to save more are not compiled.
_SAVED = 8


def capacity(device: jax.Device) -> float:
    """Return the bytes that a step may take on a device; simulated devices of a CPU share the host's memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else host_memory() / jax.local_device_count()


def total(device: jax.Device) -> float:
    """Return the bytes of memory of a device; of a CPU those of its machine, which all of its devices share."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else host_memory("MemTotal")


def bytes_on_device(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def compile_for(experiment: Experiment) -> Any:
    """Return the compiled step of `experiment`; `jax.errors.JaxRuntimeError` where it exceeds the chips' memory."""
    return trace(experiment).lower().compile()


def trace(experiment: Experiment) -> Any:
    """Return the step of `experiment`, traced for abstract arrays, which JAX keeps for the first step."""
    b, size = experiment.data.batch, experiment.image_size
    # With the layout of `loader.to_global`: without it these would be other types to JAX.
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(experiment.mesh))
    batch = {
        "image": array((b, size, size, 3), "uint8"),
        "text": array((b, experiment.context_length), "int32"),
        "label": array((b,), "float32"),
    }
    return experiment.compiled.trace(experiment.abstract, {key: batch[key] for key in experiment.objective.fields})


def usage(experiment: Experiment, compiled: Any) -> dict[str, float]:
    """Bytes on each chip: the state's arrays, what the step needs beside it ("activations"), and their sum ("peak")."""
    usage, state = compiled.memory_analysis(), experiment.abstract
    fixed = usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
    temporary = usage.temp_size_in_bytes
    # CPUs and GPUs reserve temporaries as one block. For TPUs that number is up to a half more than is ever needed at
    # once; the peak agrees with the limit at which their compiler refuses a step.
    if experiment.mesh.devices.flat[0].platform == "tpu":
        temporary = usage.peak_memory_in_bytes - fixed
    return {
        "parameters": bytes_on_device(state.params),
        "optimizer": bytes_on_device(state.opt_state),
        "average": bytes_on_device(state.ema_params),
        "activations": float(temporary),
        "peak": float(fixed + temporary + usage.generated_code_size_in_bytes),
    }


def compile_if_fits(experiment: Experiment) -> tuple[Any, str]:
    """Return the compiled step, or None and what the compiler says of its memory where that is too little.

    Compilers of TPUs refuse a step that does not fit. Others do not: compare `usage` with what the device has.
    """
    try:
        return compile_for(experiment), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if re.search("memory space vmem|scoped vmem limit", str(error)):
            raise UserError(
                "an operation exceeds a chip's vector memory, of which the state and the batch take nothing; with "
                "LIBTPU_INIT_ARGS=--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false sums over chips are "
                "computed apart, and need less."
            ) from error
        needed = re.search(r"(?:Used |temporaries \()([\d.]+[KMGT])\b", str(error))
        return None, f"beside the state, it needs {needed[1]}" if needed else "it needs more"


def compile_config(config: ml_collections.ConfigDict, devices: list[Any]) -> tuple[Experiment, Any, str]:
    """Return the experiment, its compiled step or None, and what the compiler says where it does not fit."""
    experiment = build(config, devices)
    return experiment, *compile_if_fits(experiment)


def _changed(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> ml_collections.ConfigDict:
    new = config.copy_and_resolve_references()
    new.update_from_flattened_dict(changes)
    return new


def remedies(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Changes with which the step of `config` needs less memory, in the order of what they cost.

    First zero1, which costs traffic alone, then more computation: remat, and microbatches beside the most remat.
    Each of these with zero1, which holds no more than dp does; and with fsdp or fsdp_tp before that where `config` has
    it, since either may be the smaller one.
    """
    # A tower of another type may have no such key.
    towers = {f"model.{name}.remat": config.model[name].remat for name in TOWERS if name not in config.model.plugins}
    remat = [
        {key: policy for key, now in towers.items() if REMAT.index(policy) > REMAT.index(now)} for policy in REMAT[1:]
    ]
    computation = [{}, *remat]
    computation += [remat[-1] | {"optim.microbatches": n} for n in MICROBATCHES if n > config.optim.microbatches]
    strategies = {"dp": ["zero1"], "zero1": ["zero1"]}.get(config.mesh.strategy, [config.mesh.strategy, "zero1"])
    changes = []
    for change in computation:
        for strategy in strategies:
            other = {} if strategy == config.mesh.strategy else {"mesh.strategy": strategy}
            if other | change and other | change not in changes:
                changes.append(other | change)
    return changes


def suggest(
    config: ml_collections.ConfigDict, devices: list[Any], capacity: float = math.inf, peak: float = 0.0
) -> str:
    """The nearest of `remedies`, as flags, with which the step fits; "" if none does.

    Args:
      config: of a run.
      devices: that it runs on.
      capacity: bytes of a device, where the compiler does not refuse what exceeds them. A smaller batch, which changes
        what is learned, is tried last then.
      peak: bytes that the step needs as it is, where that is known.
    """
    changes = remedies(config)
    if capacity < math.inf:
        least = {key: value for key, value in (changes or [{}])[-1].items() if key != "optim.microbatches"}
        batches = [config.data.batch // parts for parts in (4, 16, 64)]
        changes = [*changes, *(least | {"optim.microbatches": 1, "data.batch": batch} for batch in batches if batch)]
    for change in changes:
        parts = change.get("optim.microbatches", 1) * config.data.batch / change.get("data.batch", config.data.batch)
        if peak > _SAVED * parts * capacity:
            continue  # each try is a compilation
        try:
            experiment, compiled, _ = compile_config(_changed(config, change), devices)
        except UserError:
            continue  # it does not suit the config, as microbatches that do not divide its batch
        if compiled is not None and (capacity == math.inf or usage(experiment, compiled)["peak"] <= capacity):
            return " ".join(f"--config.{key}={value}" for key, value in change.items())
    return ""


def _written(jaxpr: Any) -> float:
    """Bytes of all values that a jaxpr computes on all devices: more than it ever needs at once."""
    result = 0.0
    for equation in jaxpr.eqns:
        values = [item for x in equation.params.values() for item in (x if isinstance(x, (tuple, list)) else (x,))]
        inner = [getattr(value, "jaxpr", value) for value in values]
        inner = [value for value in inner if hasattr(value, "eqns")]
        if inner:
            result += equation.params.get("length", 1) * _shards(equation) * sum(map(_written, inner))
        else:
            arrays = [x.aval for x in equation.outvars if hasattr(x.aval, "size")]
            result += sum(x.size * x.dtype.itemsize for x in arrays)
    return result


def _shards(equation: Any) -> int:
    """In how many parts an equation computes its inner values: those of a shard_map have the shapes of one part."""
    if equation.primitive.name != "shard_map":
        return 1
    mesh = equation.params["mesh"]
    return math.prod(mesh.shape[axis] for axis in equation.params.get("newly_manual_axes", mesh.shape))


def check(experiment: Experiment) -> None:
    """Check, before anything is written or trained, that the state and the train step fit the devices.

    A step that is far from filling them is not compiled for it; others are compiled once more when they are first run,
    or taken from the compilation cache. Prints a warning where memory of the host is taken by other programs.

    Raises:
      UserError: says what the step needs and the nearest change with which it fits.
    """
    devices = list(experiment.mesh.devices.flat)
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        return  # they may share a machine, which none of them knows
    shared_by = jax.local_device_count() if on_cpu else 1
    limit, state = total(device) / shared_by, bytes_on_device(experiment.abstract)
    if state > limit:
        raise UserError(f"{state_too_large(state, limit)}; {STATE_REMEDY}{_elsewhere(on_cpu)}.")
    # Devices along the model axis hold the same activations of the towers.
    shards = math.prod(experiment.mesh.shape[axis] for axis in BATCH_AXES)
    written = _written(trace(experiment).jaxpr.jaxpr) / shards
    if written + 8 * state <= min(limit, capacity(device)):
        return
    compiled, trouble = compile_if_fits(experiment)
    peak = usage(experiment, compiled)["peak"] if compiled is not None else 0.0
    if compiled is None or peak > limit:
        needs = f"it takes {format_bytes(peak)}" if peak else trouble
        log0(f"the step does not fit a device's {format_bytes(limit)}: {needs}; looking for a change that fits")
        config = schema.complete(schema.to_dict(experiment.config))
        config.data.length_groups = str(experiment.length_groups)  # those that "auto" chose
        raise UserError(f"{too_large(config, devices, limit, needs, peak)}{_elsewhere(on_cpu)}.")
    if peak > (free := capacity(device)):
        log0(f"WARNING: a step takes {format_bytes(peak)} of memory, and {format_bytes(free)} are free at the moment")


STATE_REMEDY = "shard it, --config.mesh.strategy=fsdp on more devices, or take a smaller model"


def state_too_large(state: float, limit: float) -> str:
    """Return the sentence about a state that exceeds a device's memory; both in bytes."""
    return f"the state alone takes {format_bytes(state)} of a device's {format_bytes(limit)}"


def too_large(config: ml_collections.ConfigDict, devices: list[Any], limit: float, needs: str, peak: float) -> str:
    """Return the sentence about a step that does not fit, with the change that `suggest` recommends."""
    change = suggest(config, devices, limit, peak)
    remedy = f"it fits with {change}" if change else "no change that was tried makes it fit; take more devices"
    return f"the step does not fit a device's {format_bytes(limit)}: {needs}; {remedy}"


def _elsewhere(on_cpu: bool) -> str:
    return ", or start from a recipe with sizes for this machine, --config small:pairs=PATH" if on_cpu else ""
