"""What configs of other projects have in common: our groups of keys, filled with what a file of weights needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.data.preprocessing import Preprocessing, mean_std
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.errors import UserError

_TOWER = {"scan": False, "remat": "none"}
# Not of the weights; what a new run would start with, as in configs/common.py.
_CLUSTERS = {"clusters": 32768, "hidden": 4096, "layers": 1, "last_norm": False}


def model(
    img: Mapping[str, Any], txt: Mapping[str, Any], embed: int, *, log_scale: float, bias: float | None
) -> dict[str, Any]:
    """Group `model`: towers of a CLIP, to be computed in fp32."""
    return {
        "img": _TOWER | {"stem": "linear", "pool": "cls", "patch_dropout": 0.0, "drop_path": 0.0} | dict(img),
        "txt": _TOWER | dict(txt),
        "embed": embed,
        "scale_init": math.exp(log_scale),
        "bias_init": -10.0 if bias is None else bias,
        "cluster_head": dict(_CLUSTERS),
        "dtype": "float32",
    }


def config(
    group: dict[str, Any], tokens: str, prepare: Preprocessing, notes: Sequence[str], kind: str, *, bias: bool
) -> dict[str, Any]:
    """What `interop.read` returns first."""
    keys = prepare.to_config()
    return {
        "model": group,
        "objective": {"name": "siglip" if bias else "clip"},
        "data": {"tokenizer": tokens, "resample": "bicubic"} | keys["data"],
        "eval": keys["eval"],
        "source": {"format": kind, "notes": tuple(notes)},
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """r with int(r * width) == hidden."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def preprocessing(size: int, mean: Any, std: Any, where: str, **resizing: Any) -> Preprocessing:
    """Of images of `size` pixels. `mean` and `std`: one number, three, or None for CLIP's; `resizing` as its fields.

    Raises:
      UserError: no numbers, or a deviation that is not above 0.
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
    """A size that may be written as a pair."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"{where}: {key} is {value}; towers here take squares only.")
    return side
