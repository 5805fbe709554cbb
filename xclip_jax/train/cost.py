"""Cost of a train step: FLOPs, MFU's peak FLOP/s, and memory, with flags that reduce it.

FLOPs are analytic, since XLA's cost analysis counts the body of a loop over layers once. Only matrix products count, by
custom; a multiplication and an addition count as two. Causal attention counts in full, since it is computed in full.
Memory is the compiled step's.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import ml_collections
import optax

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_bytes
from xclip_jax.core.environment import host_memory
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.models.heads import ClusterHead, Head
from xclip_jax.models.lora import LoraConfig
from xclip_jax.models.tower import TextTower
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.objectives import make_objective
from xclip_jax.parallel.mesh import batch_sharding, batch_shards
from xclip_jax.plan.roofline import CHIPS
from xclip_jax.train.build import Experiment, build, make_model
from xclip_jax.train.state import init_fn

# Dense bf16 FLOP/s of one device, by JAX's name of its kind. Sources: cloud.google.com/tpu/docs, and NVIDIA's data
# sheets, which from H100 on state twice as much, with sparsity.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5e": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v5p": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
    "TPU v6e": CHIPS["v6e"].peak,
    "TPU7x": CHIPS["tpu7x"].peak,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
}
HEADS_SHARE = 0.05  # of a step's FLOPs; above it the heads cost more than they should
UNCOUNTED = "FLOPs are unknown: a custom tower does not report them"


def forward_flops(config: Config, *, train: bool = True) -> dict[str, float] | None:
    """Return one pair's forward FLOPs {"img", "txt", "heads", "loss"}; None if a tower does not report them.

    Training includes patch dropout and the comparison of pairs in the batch.
    """
    model = config.model
    objective = make_objective(config.objective)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    rest = objective.flops(model, vocab, config.data.batch if train else 0)
    towers = {name: model.tower(name).flops(train) if name in objective.towers else 0.0 for name in TOWERS}
    counted = {name: operations for name, operations in towers.items() if operations is not None}
    return counted | rest if counted.keys() == towers.keys() else None


def num_parameters(config: Config) -> dict[str, int]:
    """Count the parameters of each tower and head, without computing any."""
    model = make_model(config, make_objective(config.objective), tokenizer.load(config.data.tokenizer))
    init = init_fn(model, optax.identity(), loss_state={}, ema=False, seed=0, adapters=LoraConfig())
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in jax.eval_shape(init).params.items()}


def cluster_heads(config: Config) -> list[str]:
    """Return the names of the objective's cluster heads."""
    heads = make_objective(config.objective).heads(
        config.model, vocab=1
    )  # the kind of a head is independent of the vocabulary
    return [name for name, head in heads.items() if isinstance(head, Head) and isinstance(head.module, ClusterHead)]


def heads_share(config: Config) -> float | None:
    """Return the heads' share of forward FLOPs in training; None if a tower does not report them."""
    parts = forward_flops(config)
    return parts["heads"] / sum(parts.values()) if parts else None


def step_flops(config: Config, groups: LengthGroups | None = None, rows: int | None = None) -> float | None:
    """Return the model FLOPs of a train step: three forward passes, and the teacher's; None if a tower reports none.

    A frozen tower has no backward pass. Recomputation by rematerialisation and microbatches does not count, by MFU's
    definition; nor do cut tokens of texts.

    Args:
      config: the config of a run.
      groups: length groups of texts; None for the config's.
      rows: texts per device and microbatch (`Experiment.text_rows`), to round groups to whole texts; None for exact
        shares.
    """
    parts = forward_flops(config)
    if parts is None:
        return None
    tower = config.model.tower("txt")
    groups = groups or LengthGroups.parse(config.data.length_groups)
    if parts["txt"] and groups.cuts:
        cut = cut_flops(tower)
        if cut is None:
            return None
        sizes = None if rows is None else groups.sizes(rows, tower.context_length)
        if rows is None:
            parts["txt"] = groups.mean(cut, tower.context_length)
        elif sizes:
            parts["txt"] = sum(n * cut(tokens) for n, tokens in sizes) / rows
    teacher = 0.0
    if make_objective(config.objective).teacher:  # a teacher drops no patches
        teacher = (forward_flops(config, train=False) or parts)["img"] + parts["txt"] + parts["heads"]
    passes = dict.fromkeys(parts, 3)
    if config.finetune.lora.rank:  # only adapters have weight gradients
        passes |= dict.fromkeys(TOWERS, 2)
    passes |= dict.fromkeys(config.init.freeze, 1)
    return config.data.batch * (sum(passes[name] * part for name, part in parts.items()) + teacher)


def cut_flops(tower: TextTower) -> Callable[[int], float] | None:
    """Return a text's FLOPs as a function of its cut length; None if the tower does not report them."""
    return None if tower.cut_flops(1) is None else cast("Callable[[int], float]", tower.cut_flops)  # none or all


def device_memory(device: jax.Device) -> float:
    """Return the memory of a device in bytes; CPU devices share their machine's."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else host_memory()


def bytes_on_device(tree: Any) -> float:
    """Return the bytes of abstract arrays on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def compile_for(experiment: Experiment) -> Any:
    """Return the compiled step of `experiment`; `jax.errors.JaxRuntimeError` if it exceeds the chips' memory."""
    return trace(experiment).lower().compile()


def trace(experiment: Experiment) -> Any:
    """Trace the step of `experiment` for abstract arrays; JAX caches the result for the first step."""
    # With another layout than `loader.to_global`'s the step would be traced again.
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(experiment.mesh))
    shapes = experiment.transform().arrays(experiment.config.data.batch)
    batch = {field: array(*shape) for field, shape in shapes.items()}
    return experiment.compiled.trace(experiment.abstract, batch)


def memory_usage(experiment: Experiment, compiled: Any) -> dict[str, float]:
    """Return the bytes on each chip: state arrays, temporaries ("activations"), and their sum ("peak")."""
    usage = compiled.memory_analysis()
    state = experiment.abstract
    fixed = usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
    temporary = usage.temp_size_in_bytes
    # CPUs and GPUs reserve temporaries as one block. TPUs never need all at once, and their compiler checks the peak.
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
    """Return the compiled step and "", or None and the reason if the compiler refuses it for lack of memory.

    Only TPU compilers refuse; elsewhere compare `memory_usage` with the device's memory.
    """
    try:
        return compile_for(experiment), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(
            error
        ):  # vector memory is independent of config keys
            raise
        needed = re.search(r"(?:Used |temporaries \()([\d.]+[KMGT])\b", str(error))
        return None, f"it needs {needed[1]} besides the state" if needed else "it needs more"


def compile_config(config: ml_collections.ConfigDict, devices: list[Any]) -> tuple[Experiment, Any, str]:
    """Build a config; return the experiment with the results of `compile_if_fits`."""
    experiment = build(config, devices)
    return experiment, *compile_if_fits(experiment)


def remedies(config: Config, rows: int = 0, devices: int = 0) -> list[str]:
    """Return flags that reduce the memory of the step, in order of cost.

    Args:
      config: the config of a run.
      rows: pairs per microbatch and device (`Experiment.text_rows`); 0 for one device.
      devices: number of devices of the mesh; 0 if unknown.
    """
    steps = []
    if config.mesh.strategy == "dp" and devices != 1:
        steps.append("--config.mesh.strategy=zero1")
    known = [name for name in TOWERS if name not in config.model.plugins]  # custom towers may have no remat
    flags = [f"--config.model.{name}.remat=full" for name in known if config.model.tower(name).remat != "full"]
    if flags:
        steps.append(" ".join(flags))
    parts = config.optim.microbatches
    rows = rows or config.data.batch // parts
    steps += [f"--config.optim.microbatches={n * parts}" for n in (4, 2) if rows % n == 0][:1]
    return steps


def too_large(experiment: Experiment, limit: float, needs: str) -> tuple[str, str]:
    """Return two sentences on a step that exceeds a device's `limit` bytes: the fault and the remedies."""
    flags = ", ".join(remedies(experiment.config, experiment.text_rows[0], experiment.mesh.size))
    remedy = f"add one after the other until it fits: {flags}; or take more devices" if flags else "take more devices"
    return f"the step does not fit a device's {format_bytes(limit)}: {needs}", remedy


def activation_bytes(config: Config | ml_collections.ConfigDict) -> float:
    """Estimate the bytes kept by the towers for the backward pass of one pair."""
    img = config.model.img
    txt = config.model.txt
    total = 0.0
    width = 4 if config.model.dtype == "float32" else 2
    for tower, n in ((img, (img.image_size // img.patch) ** 2 + 1), (txt, txt.context_length)):
        kept = {"none": 20 * tower.width + 3 * tower.heads * n, "dots": 9 * tower.width, "full": tower.width}
        total += tower.depth * n * kept[tower.remat] * width
    return total + 12 * img.image_size**2 * width


def fits_by_far(experiment: Experiment, limit: float) -> bool:
    """Return whether eight times the state and estimated activations fit `limit` bytes of a device."""
    config = experiment.config
    if config.model.plugins or config.objective.plugins:
        return False  # custom towers and heads have unknown sizes
    # Devices along the model axis hold the same tower activations.
    rows = config.data.batch / batch_shards(experiment.mesh)
    logits = 24 * rows * max(config.data.batch, config.model.cluster_head.clusters)
    activations = rows / config.optim.microbatches * activation_bytes(config)
    return 8 * (bytes_on_device(experiment.abstract) + logits + activations) <= limit
