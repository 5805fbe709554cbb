"""Memory of a train step: how much the compiled step needs, how much the devices have, and what needs less."""

import functools
import math
import re
from typing import Any

import jax
import ml_collections

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_bytes
from xclip_jax.core.environment import host_memory
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.parallel.mesh import BATCH_AXES, batch_sharding
from xclip_jax.train.build import Experiment, build


def total(device: jax.Device) -> float:
    """Return the bytes of memory of a device; all devices of a CPU share the memory of its machine."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else host_memory("MemTotal")


def bytes_on_device(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def compile_for(experiment: Experiment) -> Any:
    """Return the compiled step of `experiment`; `jax.errors.JaxRuntimeError` if it exceeds the chips' memory."""
    return trace(experiment).lower().compile()


def trace(experiment: Experiment) -> Any:
    """Return the step of `experiment`, traced for abstract arrays, which JAX keeps for the first step."""
    # The layout of `loader.to_global`: with another one the step would be traced again.
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(experiment.mesh))
    batch = {
        field: array(*shape) for field, shape in experiment.transform().arrays(experiment.config.data.batch).items()
    }
    return experiment.compiled.trace(experiment.abstract, batch)


def usage(experiment: Experiment, compiled: Any) -> dict[str, float]:
    """Bytes on each chip: the arrays of the state, temporaries ("activations"), and their sum ("peak")."""
    usage, state = compiled.memory_analysis(), experiment.abstract
    fixed = usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
    temporary = usage.temp_size_in_bytes
    # CPUs and GPUs reserve temporaries as one block. TPUs never need all of it at once: the peak is what their compiler
    # compares with the limit.
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
    """Return the compiled step and "", or None and the compiler's reason if it refuses the step for lack of memory.

    Only compilers for TPUs refuse; elsewhere compare `usage` with the memory of the device.
    """
    try:
        return compile_for(experiment), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error):  # vector memory depends on no key
            raise
        needed = re.search(r"(?:Used |temporaries \()([\d.]+[KMGT])\b", str(error))
        return None, f"it needs {needed[1]} besides the state" if needed else "it needs more"


def compile_config(config: ml_collections.ConfigDict, devices: list[Any]) -> tuple[Experiment, Any, str]:
    """Build a config; return the experiment with the results of `compile_if_fits`."""
    experiment = build(config, devices)
    return experiment, *compile_if_fits(experiment)


def remedies(config: Config) -> list[str]:
    """Return flags with which the step of `config` needs less memory, in the order of what they cost."""
    steps = []
    if config.mesh.strategy == "dp":
        steps.append("--config.mesh.strategy=zero1")
    towers = [name for name in TOWERS if name not in config.model.plugins]  # another package's may have no remat
    towers = [name for name in towers if getattr(config.model.tower(name), "remat", "full") != "full"]
    if flags := [f"--config.model.{name}.remat=full" for name in towers]:
        steps.append(" ".join(flags))
    parts = [factor * config.optim.microbatches for factor in (4, 2)]
    steps += [f"--config.optim.microbatches={n}" for n in parts if config.data.batch % n == 0][:1]
    return steps


def too_large(config: Config, limit: float, needs: str) -> tuple[str, str]:
    """Return a sentence about a step that does not fit a device of `limit` bytes, and the remedies in one."""
    remedy = f"add one after the other until it fits: {', '.join(remedies(config))}; or take more devices"
    return f"the step does not fit a device's {format_bytes(limit)}: {needs}", remedy


def activation_bytes(config: Config | ml_collections.ConfigDict) -> float:
    """Estimate the bytes that the towers keep for the backward pass of one pair."""
    img, txt = config.model.img, config.model.txt
    total, width = 0.0, 4 if config.model.dtype == "float32" else 2
    for tower, n in ((img, (img.image_size // img.patch) ** 2 + 1), (txt, txt.context_length)):
        kept = {"none": 20 * tower.width + 3 * tower.heads * n, "dots": 9 * tower.width, "full": tower.width}
        total += tower.depth * n * kept[tower.remat] * width
    return total + 12 * img.image_size**2 * width


def fits_by_far(experiment: Experiment, limit: float) -> bool:
    """Whether eight times the state and the estimated values of a step fit `limit` bytes of a device."""
    config = experiment.config
    if config.model.plugins:
        return False  # towers of another package
    # Devices along the model axis hold the same activations of the towers.
    rows = config.data.batch / math.prod(experiment.mesh.shape[axis] for axis in BATCH_AXES)
    classes = experiment.tokenizer.vocab_size if "tokens" in experiment.model.outputs else 0
    logits = 24 * rows * max(config.data.batch, config.model.cluster_head.clusters, classes)
    activations = rows / config.optim.microbatches * activation_bytes(config)
    return 8 * (bytes_on_device(experiment.abstract) + logits + activations) <= limit
