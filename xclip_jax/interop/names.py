"""Configs and parameters converted to and from the names of other projects."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing, mean_std
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.models.layers import STYLES
from xclip_jax.models.two_towers import ModelConfig, TwoTowers
from xclip_jax.objectives.clip import Clip, Siglip

Flat = dict[str, np.ndarray]


_SHOWN = 8  # names that an error lists

# {our name: another project's}. Our name is a parameter's, with a tensor of the same shape, or a module's; theirs is
# then the prefix of "weight" and "bias", or several prefixes if our layer joins theirs. "{}" is a block's number.
Names = Mapping[str, str | tuple[str, ...]]


def model(img: Mapping[str, Any], txt: Mapping[str, Any], embed: int) -> dict[str, Any]:
    """Return the config group `model` of a CLIP, computed in fp32, with defaults for keys missing in weights."""
    defaults = fields.as_dict(ModelConfig())
    towers = {name: defaults[name] | dict(tower) for name, tower in (("img", img), ("txt", txt))}
    # Blocks are unrolled, like in the weights of other projects.
    return defaults | towers | {"embed": embed, "scan": False, "dtype": "float32"}


def find_style(act: str, eps: float, *, siglip: bool = False) -> str:
    """Return the style of a tower with this activation and LayerNorm; raise `UserError` if none matches."""
    tower = dataclasses.replace(STYLES["siglip" if siglip else "xclip"], act=act, eps=eps)
    for name, style in STYLES.items():
        if style == tower:
            return name
    raise UserError(
        f"it has a tower with activation {act!r} and eps {eps:g} in LayerNorm; no style of model.img and model.txt has "
        f"these: {', '.join(STYLES)}."
    )


def config(
    group: dict[str, Any], tokens: str, prepare: Preprocessing, source: str, *, sigmoid: bool, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the config for `interop.read` with the group `model`, the format `source`, and notes on assumptions."""
    keys = prepare.to_config()
    return {
        "model": group,
        "objective": {"name": "siglip" if sigmoid else "clip"},
        "data": {"tokenizer": tokens, "resample": "bicubic"} | keys["data"],
        "eval": keys["eval"],
        "source": {"format": source, "notes": tuple(notes)},
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """Return a ratio with int(ratio * width) == hidden."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def preprocessing(file: str, size: int, mean: Any, std: Any, **options: Any) -> Preprocessing:
    """Make the preprocessing for images of `size` pixels; `mean` and `std` are 1 or 3 numbers, or None for CLIP's."""
    try:
        pair = tuple(
            known if value is None else tuple(np.broadcast_to(np.asarray(value, np.float64), 3).tolist())
            for value, known in zip((mean, std), STATISTICS["clip"], strict=True)
        )
        return Preprocessing(size, *mean_std(pair), **options)
    except ValueError as error:
        raise UserError(f"{file}: mean {mean} and standard deviation {std} cannot be used ({error}).") from error


class Param(NamedTuple):
    """A parameter of this package and its tensors in another project, to be joined along their first axis."""

    ours: str  # name of the parameter
    shape: tuple[int, ...]  # of the parameter
    theirs: tuple[str, ...]  # names of the tensors
    joined: tuple[int, ...]  # shape of the joined tensors
    axes: tuple[int, ...]  # order of the axes of the joined tensors before they are reshaped to `shape`

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        n = len(self.theirs)
        return dict.fromkeys(self.theirs, (self.joined[0] // n, *self.joined[1:]) if n > 1 else self.joined)

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the parameter."""
        parts = [tensors[name] for name in self.theirs]
        x = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return np.asarray(x.transpose(self.axes).reshape(self.shape), order="C")

    def write(self, x: np.ndarray) -> Flat:
        """Return the tensors of the parameter `x`."""
        x = x.reshape([self.joined[axis] for axis in self.axes]).transpose(np.argsort(self.axes).astype(int))
        return dict(zip(self.theirs, np.split(x, len(self.theirs)) if len(self.theirs) > 1 else [x], strict=True))


def _shapes(group: Mapping[str, Any], vocab: int, *, sigmoid: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters of a model with scanned blocks, whose first axis counts the blocks."""
    faults: list[str] = []
    config = fields.read_group(ModelConfig, group, "model", faults)
    if faults:
        raise ValueError(faults[0])
    img, txt = (dataclasses.replace(tower, scan=True) for tower in (config.img, config.txt))
    model = TwoTowers(img, txt, vocab, vocab - 1, (Siglip() if sigmoid else Clip()).heads(config, vocab))
    image, text = (1, img.image_size, img.image_size, 3), (1, txt.context_length)
    # Inside, since recipes read weights before processes join, and a real array would open the devices.
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(image), jnp.zeros(text, jnp.int32)))
    return {name: x.shape for name, x in flatten_dict(nn.unbox(made["params"]), sep="/").items()}


def _params(group: Mapping[str, Any], vocab: int, names: Names, *, sigmoid: bool) -> list[Param]:
    """Return all parameters of a model with unrolled blocks, the config group `model` and `vocab` tokens."""
    shapes = _shapes(group, vocab, sigmoid=sigmoid)
    params = []
    patch = group["img"]["patch"]
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition("/")
        if name in names:
            params.append(Param(name, shape, (str(names[name]),), shape, tuple(range(len(shape)))))
            continue
        prefixes = (names[module],) if isinstance(names[module], str) else names[module]
        theirs = [f"{prefix}{'bias' if leaf == 'bias' else 'weight'}" for prefix in prefixes]
        blocks = "/blocks/" in name
        shape = shape[1:] if blocks else shape
        joined = (math.prod(shape),)
        axes = (0,)
        if leaf == "kernel":
            out = math.prod(shapes[f"{module}/bias"][blocks:]) if f"{module}/bias" in shapes else shape[-1]
            joined = (out, math.prod(shape) // out)
            axes = (1, 0)
        if name == "img/patches/kernel":
            joined, axes = (shape[-1], 3, patch, patch), (2, 3, 1, 0)
        for i in range(group[name[:3]]["depth"] if blocks else 1):
            numbered = tuple(x.format(i) for x in theirs)
            params.append(Param(name.replace("/blocks/", f"/block_{i}/"), shape, numbered, joined, axes))
    return params


def read(tensors: Mapping[str, np.ndarray], group: Mapping[str, Any], vocab: int, names: Names) -> Flat:
    """Convert another project's tensors to flat parameters of a model with config `group` and `vocab` tokens.

    A `UserError` lists missing, unknown or misshapen tensors by name.
    """
    if max(group[tower]["depth"] for tower in ("img", "txt")) > len(tensors):
        raise UserError(f"the config has more layers than the {len(tensors)} tensors of the weights.")
    params = _params(group, vocab, names, sigmoid=names.get("bias") in tensors)
    shapes = {name: shape for param in params for name, shape in param.parts.items()}
    reshaped = dict(tensors)
    for name, shape in shapes.items():
        x = tensors.get(name)
        if x is not None and [n for n in x.shape if n != 1] == [n for n in shape if n != 1]:
            reshaped[name] = x.reshape(shape)  # only axes of length 1 may differ
    _check(reshaped, shapes)
    return {param.ours: param.read(reshaped) for param in params}


def write(params: Mapping[str, np.ndarray], group: Mapping[str, Any], vocab: int, names: Names) -> Flat:
    """Convert flat parameters to another project's tensors, by name; for arguments and errors see `read`."""
    table = _params(group, vocab, names, sigmoid="bias" in params)
    _check(params, {param.ours: param.shape for param in table})
    return {name: x for param in table for name, x in param.write(params[param.ours]).items()}


def _check(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"missing: {name}" for name in shapes if name not in tensors]
    wrong += [f"unknown: {name}" for name in tensors if name not in shapes]
    wrong += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"tensors do not match the config; {', '.join(wrong[:_SHOWN])}{more}.")
