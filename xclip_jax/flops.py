"""Analytic floating point operations of a model: what MFU is measured against.

A multiplication and an addition count as two. Only matrix products count, as is the custom; XLA's own cost analysis
counts the body of a loop over layers once. Causal attention counts in full, since it is computed in full.
"""

from xclip_jax.config.schema import Config
from xclip_jax.data import tokenizer
from xclip_jax.objectives import make_objective


def forward(config: Config, *, train: bool = True) -> dict[str, float]:
    """FLOPs of one pair's forward pass: {"img", "txt", "heads", "loss"}.

    Args:
      config: of a run.
      train: with patch dropout, and with the comparison of the batch's pairs.
    """
    model, objective = config.model, make_objective(config.objective)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    rest = objective.flops(model, vocab, config.data.batch if train else 0)
    towers = {name: model.tower(name).flops(train) if name in objective.towers else 0.0 for name in ("img", "txt")}
    return towers | rest


def train_step(config: Config) -> float:
    """Model FLOPs of a training step on the whole batch: three forward passes, the teacher's one more.

    What rematerialisation and microbatches compute again does not count, by definition of MFU.
    """
    parts = forward(config)
    objective = make_objective(config.objective)
    teacher = parts["img"] + parts["txt"] + parts["heads"] if objective.teacher else 0.0
    return config.data.batch * (3 * sum(parts.values()) + teacher)
