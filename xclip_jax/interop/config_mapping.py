"""Config groups of this package for weights of other projects."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing, mean_std
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import objective_of_heads

_UNROLLED = {"scan": False}  # as the weights of other projects are


def model(
    img: Mapping[str, Any], txt: Mapping[str, Any], embed: int, *, log_scale: float, bias: float | None
) -> dict[str, Any]:
    """Config group `model`: towers of a CLIP, computed in fp32; keys that weights do not have are the defaults."""
    defaults = fields.default(ModelConfig)
    scalars = {"scale_init": math.exp(log_scale)} | ({} if bias is None else {"bias_init": bias})
    towers = {"img": defaults["img"] | _UNROLLED | dict(img), "txt": defaults["txt"] | _UNROLLED | dict(txt)}
    return defaults | towers | {"embed": embed, "dtype": "float32"} | scalars


def config(
    group: dict[str, Any],
    tokens: str,
    prepare: Preprocessing,
    notes: Sequence[str],
    weights_format: str,
    heads: Collection[str],
) -> dict[str, Any]:
    """Return the config that `interop.read` returns.

    Args:
      group: config group `model`.
      tokens: config key `data.tokenizer`.
      prepare: preprocessing of images.
      notes: sentences on what was assumed.
      weights_format: of the weights.
      heads: names of the model's heads, which decide the objective.
    """
    keys = prepare.to_config()
    return {
        "model": group,
        "objective": objective_of_heads(heads),
        "data": {"tokenizer": tokens, "resample": "bicubic"} | keys["data"],
        "eval": keys["eval"],
        "source": {"format": weights_format, "notes": tuple(notes)},
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio r with int(r * width) == hidden."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def preprocessing(size: int, mean: Any, std: Any, where: str, **resizing: Any) -> Preprocessing:
    """Make the preprocessing of images of `size` pixels.

    Args:
      size: side of the result.
      mean, std: one number, three, or None for CLIP's.
      where: the file, for errors.
      resizing: further fields.

    Raises:
      UserError: other values, or a standard deviation that is not above 0.
    """
    try:
        pair = tuple(
            known if value is None else tuple(np.broadcast_to(np.asarray(value, np.float64), 3).tolist())
            for value, known in zip((mean, std), STATISTICS["clip"], strict=True)
        )
        return Preprocessing(size, *mean_std(pair), **resizing)
    except ValueError as error:
        raise UserError(
            f"{where}: mean {mean} and standard deviation {std} with {resizing} cannot be used ({error})."
        ) from error


def square(value: Any, key: str, where: str) -> int:
    """Return a size that may be written as a pair of equal numbers."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"{where}: {key} is {value}; only square images and patches are supported.")
    return side
