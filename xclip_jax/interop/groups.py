"""What configs of other projects have in common: our groups of keys, filled with what a file of weights needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.data import tokenizer
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.errors import UserError

CLIP_VOCAB = 49408
TOKENIZER = "tokenizer.json"
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
    group: dict[str, Any], tokens: str, statistics: str, notes: Sequence[str], kind: str, *, bias: bool
) -> dict[str, Any]:
    """What `interop.read` returns first."""
    return {
        "model": group,
        "objective": {"name": "siglip" if bias else "clip"},
        "data": {"tokenizer": tokens, "statistics": statistics, "resample": "bicubic"},
        "source": {"format": kind, "notes": tuple(notes)},
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """r with int(r * width) == hidden."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def statistics(mean: Any, std: Any, where: str) -> str:
    """The name of a channel mean and deviation; CLIP's own where they are None."""
    if mean is None and std is None:
        return "clip"
    for name, known in STATISTICS.items():
        pair = [np.broadcast_to(np.asarray(x, np.float64), 3) for x in (mean, std)]
        if np.allclose(pair, known, rtol=0, atol=1e-4):
            return name
    raise UserError(f"{where} normalises images by mean {mean} and deviation {std}; known are {', '.join(STATISTICS)}.")


def tokens(folder: epath.Path, vocab: int, eot: int | None, where: str) -> str:
    """The tokenizer of a text tower of `vocab` words that pools at id `eot` (None: the largest id).

    CLIP's, or the folder's tokenizer.json.

    Raises:
      UserError: none of them has this vocabulary and this end.
    """
    if vocab == CLIP_VOCAB and eot in (None, CLIP_VOCAB - 1):
        return "clip"
    file = folder / TOKENIZER
    if file.exists():
        found = tokenizer.load(str(file))
        end = vocab - 1 if eot is None else eot
        if (found.vocab_size, found.eot_id) == (vocab, end):
            return str(file)
        raise UserError(
            f"{where} knows {vocab} ids and pools texts at {end}; {file} has {found.vocab_size} and ends with "
            f"{found.eot_id}."
        )
    raise UserError(f"{where} has a vocabulary of {vocab}, which is not CLIP's, and no {TOKENIZER} beside it.")


def square(value: Any, key: str, where: str) -> int:
    """A size that may be written as a pair."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"{where}: {key} is {value}; towers here take squares only.")
    return side
