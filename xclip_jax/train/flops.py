"""Analytic floating point operations of a model: what MFU is measured against.

A multiplication and an addition count as two. Only matrix products count, as is the custom; XLA's own cost analysis
counts the body of a loop over layers once. Causal attention counts in full, since it is computed in full.
"""

from collections.abc import Callable
from typing import cast

from xclip_jax.config.schema import Config
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.models.tower import TextTower
from xclip_jax.models.two_towers import TOWERS
from xclip_jax.objectives import make_objective
from xclip_jax.parallel.topology import CHIPS

# Dense bf16 FLOP/s of one device, by JAX's name of its kind. Sources: cloud.google.com/tpu/docs, and NVIDIA's data
# sheets, which from H100 on state twice as much, with sparsity.
PEAK = {
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
UNCOUNTED = "FLOPs are not known, as a tower does not count its own"


def forward(config: Config, *, train: bool = True) -> dict[str, float] | None:
    """FLOPs of one pair's forward pass: {"img", "txt", "heads", "loss"}; None where a tower does not count its own.

    In training with patch dropout, and with the comparison of the batch's pairs.
    """
    model, objective = config.model, make_objective(config.objective)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    rest = objective.flops(model, vocab, config.data.batch if train else 0)
    towers = {name: model.tower(name).flops(train) if name in objective.towers else 0.0 for name in TOWERS}
    counted = {name: operations for name, operations in towers.items() if operations is not None}
    return counted | rest if counted.keys() == towers.keys() else None


def train_step(config: Config, groups: LengthGroups | None = None, rows: int | None = None) -> float | None:
    """Model FLOPs of a training step on the whole batch: three forward passes, the teacher's one more.

    None where a tower does not count its own. A frozen tower has no backward pass. What rematerialisation and
    microbatches compute again does not count, by definition of MFU; nor does what is cut from texts.

    Args:
      config: of a run.
      groups: groups of its texts; None for the config's own groups.
      rows: texts that a device orders together (`Experiment.text_rows`), in whole numbers of which they are cut; None
        for the shares of the groups as they are.
    """
    parts = forward(config)
    tower, groups = config.model.tower("txt"), groups or LengthGroups.parse(config.data.length_groups)
    if parts is None:
        return None
    if parts["txt"] and groups.cuts:
        if (cut := cut_flops(tower)) is None:
            return None
        if rows is None:
            parts["txt"] = groups.mean(cut, tower.context_length)
        elif sizes := groups.sizes(rows, tower.context_length):
            parts["txt"] = sum(n * cut(tokens) for n, tokens in sizes) / rows
    objective, teacher = make_objective(config.objective), 0.0
    if objective.teacher:  # which drops no patches
        teacher = (forward(config, train=False) or parts)["img"] + parts["txt"] + parts["heads"]
    # Weights beside adapters have no gradient of their own.
    trained = 2 if config.finetune.lora.rank else 3
    passes = {name: 1 if name in config.init.frozen else trained if name in TOWERS else 3 for name in parts}
    return config.data.batch * (sum(passes[name] * part for name, part in parts.items()) + teacher)


def cut_flops(tower: TextTower) -> Callable[[int], float] | None:
    """Tokens that a text is cut to -> its FLOPs; None where the tower does not count them."""
    return None if tower.cut_flops(1) is None else cast("Callable[[int], float]", tower.cut_flops)  # none or all
