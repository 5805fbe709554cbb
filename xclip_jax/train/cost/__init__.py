"""Cost of a train step: FLOPs, the peak FLOP/s that MFU is relative to, and memory, with flags that reduce it.

FLOPs are analytic and count matrix products, two per multiplication and addition; XLA's cost analysis would count the
body of a loop over layers once. Causal attention counts in full, as it is computed. Memory is the compiled step's.
"""

import functools
import math
import re
from typing import Any

import jax
import ml_collections

from xclip_jax.config.schema import Config
from xclip_jax.core.console import format_bytes
from xclip_jax.core.environment import host_memory
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import WHOLE, LengthGroups
from xclip_jax.models.heads import ClusterHead, Head
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.objectives import make_objective
from xclip_jax.parallel.mesh import batch_sharding, batch_shards
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.cost.roofline import CHIPS

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
HEADS_SHARE = 0.05  # of a step's FLOPs, the most that heads should take


def forward_flops(config: Config, *, train: bool = True) -> dict[str, float] | None:
    """Return the FLOPs of one pair's forward pass, {"img", "txt", "heads", "loss"}; None if a tower reports none.

    In training they include negatives and the comparison of the batch's pairs.
    """
    model = config.model
    objective = make_objective(config.objective)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    towers = {name: model.tower(name).flops(train) if name in objective.towers else 0.0 for name in TOWERS}
    if None in towers.values():
        return None
    texts = 1 + config.data.negatives * train
    towers["txt"] *= texts
    return towers | objective.flops(model, vocab, texts * config.data.batch if train else 0)


def cluster_heads(config: Config) -> list[str]:
    """Return the names of the objective's cluster heads."""
    heads = make_objective(config.objective).heads(config.model, vocab=1)  # the vocabulary changes no kind of head
    return [name for name, head in heads.items() if isinstance(head, Head) and isinstance(head.module, ClusterHead)]


def heads_share(config: Config) -> float | None:
    """Return the heads' fraction of a training forward pass's FLOPs; None if a tower reports none."""
    parts = forward_flops(config)
    return parts["heads"] / sum(parts.values()) if parts else None


def step_flops(config: Config, groups: LengthGroups = WHOLE, rows: int = 1) -> float | None:
    """Return the model FLOPs of a training step on the whole batch; None if a tower reports none.

    They are three forward passes, plus one of a teacher; a frozen tower has no backward pass. Recomputation by
    rematerialisation and microbatches does not count, by definition of MFU; nor do tokens cut by the length `groups`,
    which are rounded to whole texts of the `rows` per device and microbatch (`Experiment.text_rows`).
    """
    parts = forward_flops(config)
    if parts is None:
        return None
    tower = config.model.tower("txt")
    if parts["txt"] and groups.cuts:
        if tower.cut_flops(1) is None:
            return None
        if sizes := groups.sizes(rows, tower.context_length):
            cut = sum(n * tower.cut_flops(tokens) for n, tokens in sizes) / rows
            parts["txt"] = (1 + config.data.negatives) * cut
    teacher = 0.0
    if make_objective(config.objective).teacher:  # which drops nothing, and has no negatives
        captions = parts["txt"] / (1 + config.data.negatives)
        teacher = (forward_flops(config, train=False) or parts)["img"] + captions + parts["heads"]
    passes = dict.fromkeys(parts, 3)
    if config.finetune.lora.rank:  # adapted kernels have no gradient
        passes |= dict.fromkeys(TOWERS, 2)
    passes |= dict.fromkeys(config.init.freeze, 1)
    return config.data.batch * (sum(passes[name] * part for name, part in parts.items()) + teacher)


def device_memory(device: jax.Device) -> float:
    """Return the bytes of memory of a device; all devices of a CPU share the memory of its machine."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else host_memory()


def bytes_on_device(tree: Any) -> float:
    """Return the bytes per device of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trace(experiment: Experiment) -> Any:
    """Trace the step of `experiment` for abstract arrays; JAX caches it for the first step."""
    # With another layout than by `loader.to_global` the step would be traced again.
    array = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(experiment.mesh))
    fields = experiment.transform().arrays(experiment.config.data.batch)
    batch = {name: array(*shape) for name, shape in fields.items()}
    return experiment.compiled.trace(experiment.abstract, batch)


def memory_usage(experiment: Experiment, compiled: Any) -> dict[str, float]:
    """Return bytes per chip: arrays of the state, temporaries ("activations"), and their sum ("peak")."""
    usage = compiled.memory_analysis()
    state = experiment.abstract
    fixed = usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
    temporary = usage.temp_size_in_bytes
    # CPUs and GPUs reserve temporaries as one block; TPUs never need all at once, and their compiler limits the peak.
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

    Only compilers for TPUs refuse; elsewhere compare `memory_usage` with the memory of the device.
    """
    try:
        return trace(experiment).lower().compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error):  # no key changes vector memory
            raise
        needed = re.search(r"(?:Used |temporaries \()([\d.]+[KMGT])\b", str(error))
        return None, f"it needs {needed[1]} besides the state" if needed else "it needs more"


def compile_config(config: ml_collections.ConfigDict, devices: list[Any], memory: float) -> tuple[Experiment, Any, str]:
    """Build a config; return the experiment with the results of `compile_if_fits`.

    If the state exceeds `memory`, a device's bytes, the step is not compiled, which would take minutes.
    """
    experiment = build(config, devices)
    state = bytes_on_device(experiment.abstract)
    if state > memory:
        return experiment, None, f"its state takes {format_bytes(state)}"
    return experiment, *compile_if_fits(experiment)


def remedies(experiment: Experiment) -> list[str]:
    """Return flags that reduce the memory of a step, cheapest first."""
    config = experiment.config
    steps = []
    if config.mesh.strategy == "dp" and experiment.mesh.size > 1:
        steps.append("--config.mesh.strategy=zero1")
    towers = [name for name in TOWERS if name not in config.model.plugins]  # custom towers may lack remat
    towers = [name for name in towers if config.model.tower(name).remat != "full"]
    if towers:
        steps.append(" ".join(f"--config.model.{name}.remat=full" for name in towers))
    rows, _ = experiment.text_rows
    steps += [f"--config.optim.microbatches={n * config.optim.microbatches}" for n in (4, 2) if rows % n == 0][:1]
    return steps


def activation_bytes(config: Config | ml_collections.ConfigDict) -> float:
    """Estimate the bytes of activations that the towers keep for the backward pass of one pair."""
    img = config.model.img
    txt = config.model.txt
    values = 12.0 * img.image_size**2
    texts = [(txt, txt.context_length)] * (1 + config.data.negatives)
    for tower, n in ((img, (img.image_size // img.patch) ** 2 + 1), *texts):
        kept = {"none": 20 * tower.width + 3 * tower.heads * n, "dots": 9 * tower.width, "full": tower.width}
        values += tower.depth * n * kept[tower.remat]
    return values * (4 if config.model.dtype == "float32" else 2)


def fits_by_far(experiment: Experiment, limit: float) -> bool:
    """Whether eight times the state and the estimated values of a step fit `limit` bytes of a device."""
    config = experiment.config
    if config.model.plugins or config.objective.plugins:
        return False  # sizes of custom towers and heads are unknown
    # Devices along the model axis hold the same activations of the towers.
    rows = config.data.batch / batch_shards(experiment.mesh)
    logits = 24 * rows * max(config.data.batch * (1 + config.data.negatives), config.model.cluster_head.clusters)
    activations = rows / config.optim.microbatches * activation_bytes(config)
    return 8 * (bytes_on_device(experiment.abstract) + logits + activations) <= limit
