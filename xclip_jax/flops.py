"""Analytic floating point operations of a model: what MFU is measured against.

A multiplication and an addition count as two. Only matrix products count, as is the custom; XLA's own cost analysis
counts the body of a loop over layers once. Causal attention counts in full, since it is computed in full.
"""

import ml_collections

from xclip_jax.config.schema import Config, resolve
from xclip_jax.data import tokenizer
from xclip_jax.models.vit import ImageTowerConfig, stem_stages
from xclip_jax.objectives import make_objective


def transformer(tokens: float, width: int, depth: int, mlp_ratio: float, first: bool = False) -> float:
    """Forward pass of one sequence: four projections, two products of attention, and the MLP, `depth` times.

    With `first` the last of the blocks makes queries of all tokens and goes on with the first alone.
    """
    qkv = 6 * width**2
    rest = 2 * width * (width + 2 * int(mlp_ratio * width)) + 4 * tokens * width
    going_on = (depth - 1) * tokens + 1 if first else depth * tokens
    return depth * tokens * qkv + going_on * rest


def _image(img: ImageTowerConfig, patch_dropout: float) -> float:
    patches = (img.image_size // img.patch) ** 2
    kept = max(1, round(patches * (1 - patch_dropout)))
    embedding, side, channels = 0, img.image_size, 3
    for joined, features in stem_stages(img.stem, img.patch, img.width):
        side //= joined
        embedding += 2 * side**2 * joined**2 * channels * features
        channels = features
    pooled = 0.0
    if img.pool == "map":  # one query, its keys and values, and a residual MLP of one token
        pooled = 4 * kept * img.width**2 + (4 + 4 * img.mlp_ratio) * img.width**2 + 4 * kept * img.width
    tokens, first = kept + (img.pool == "cls"), img.pool == "cls" and not img.scan
    return embedding + transformer(tokens, img.width, img.depth, img.mlp_ratio, first) + pooled


def forward(config: ml_collections.ConfigDict | Config, *, train: bool = True) -> dict[str, float]:
    """FLOPs of one pair's forward pass: {"img", "txt", "heads", "loss"}.

    Args:
      config: of a run.
      train: with patch dropout, and with the comparison of the batch's pairs.
    """
    config = resolve(config)
    img, txt, model = config.model.img, config.model.txt, config.model
    objective = make_objective(config.objective)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    rest = objective.flops(model, vocab, config.data.batch if train else 0)
    towers = {
        "img": _image(img, img.patch_dropout if train else 0.0),
        "txt": transformer(txt.context_length, txt.width, txt.depth, txt.mlp_ratio),
    }
    return {name: value * (name in objective.towers) for name, value in towers.items()} | rest


def train_step(config: ml_collections.ConfigDict | Config) -> float:
    """Model FLOPs of a training step on the whole batch: three forward passes, the teacher's one more.

    What rematerialisation and microbatches compute again does not count: it is no use to the model.
    """
    config = resolve(config)
    parts = forward(config)
    objective = make_objective(config.objective)
    teacher = parts["img"] + parts["txt"] + parts["heads"] if objective.teacher else 0.0
    return config.data.batch * (3 * sum(parts.values()) + teacher)
