"""Config and parameters of this package by the names of other projects, in both directions."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing, mean_std
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.models.two_towers import ModelConfig

Flat = dict[str, np.ndarray]


class Export(NamedTuple):
    """A model in the format of another project.

    Attributes:
      content: content of its config file.
      tensors: tensors by their names.
      texts: {file: text} of tokenizer and preprocessing.
      notes: sentences on what the format cannot hold.
    """

    content: dict[str, Any]
    tensors: Flat
    texts: dict[str, str]
    notes: list[str]


_UNROLLED = {"scan": False}  # as in the weights of other projects
_SHOWN = 8  # names that an error lists


@dataclasses.dataclass(frozen=True)
class Names:
    """A project's tensors by the names of this package; names of modules lack ".weight".

    Attributes:
      img, txt: tensors and modules of a tower; "blocks" is the prefix of a block's number.
      block: tensors and modules of a block; "qkv" has the prefixes of three tensors, or of one for all.
      heads: tensors of heads; a projection whose name ends with ".weight" is a linear layer (e, d), else (d, e).
      img_block: blocks of the image tower, if they have other names.
    """

    img: Mapping[str, str]
    txt: Mapping[str, str]
    block: Mapping[str, str | tuple[str, ...]]
    heads: Mapping[str, str]
    img_block: Mapping[str, str | tuple[str, ...]] | None = None


# --- config


def model(
    img: Mapping[str, Any], txt: Mapping[str, Any], embed: int, *, log_scale: float, bias: float | None
) -> dict[str, Any]:
    """Return config group `model` of a CLIP, computed in fp32, with defaults for keys that weights do not have."""
    defaults = fields.default(ModelConfig)
    scalars = {"scale_init": math.exp(log_scale)} | ({} if bias is None else {"bias_init": bias})
    towers = {"img": defaults["img"] | _UNROLLED | dict(img), "txt": defaults["txt"] | _UNROLLED | dict(txt)}
    return defaults | towers | {"embed": embed, "dtype": "float32"} | scalars


def siglip(
    img: Mapping[str, Any], txt: Mapping[str, Any], embed: int, tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    """Return config group `model` of a SigLIP.

    Its towers have no class token and no norm before the blocks. The image tower pools by attention and has no
    projection; the text tower is not causal, pools at its last token, and its projection has a bias. SigLIP 2 of one
    resolution is the same model with another tokenizer.

    Raises:
      UserError: tensors of one tower, or towers that do not share an embedding space.
    """
    if missing := [name for name in ("logit_scale", "logit_bias") if name not in tensors or tensors[name].size != 1]:
        raise UserError(f"{where} is not a SigLIP with both towers: it lacks {', '.join(missing)}.")
    if embed != img["width"]:
        raise UserError(f"{where}: texts are projected to {embed} dimensions, and images have {img['width']}.")
    scale, bias = (float(tensors[name].reshape(())) for name in ("logit_scale", "logit_bias"))
    img = {"pre_norm": False, "pool": "map", "patch_bias": True, **img}
    txt = {"causal": False, "pool": "last", **txt}
    return model(img, txt, embed, log_scale=scale, bias=bias) | {"project_img": False, "project_bias": True}


def config(
    group: dict[str, Any],
    tokens: str,
    prepare: Preprocessing,
    weights_format: str,
    *,
    sigmoid: bool,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the config that `interop.read` returns.

    Args:
      group: config group `model`.
      tokens: config key `data.tokenizer`.
      prepare: preprocessing of images.
      weights_format: format of the weights.
      sigmoid: whether the model has a logit bias.
      notes: sentences on what was assumed.
    """
    keys = prepare.to_config()
    return {
        "model": group,
        "objective": {"name": "siglip" if sigmoid else "clip"},
        "data": {"tokenizer": tokens, "resample": "bicubic"} | keys["data"],
        "eval": keys["eval"],
        "source": {"format": weights_format, "notes": tuple(notes)},
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio r with int(r * width) == hidden."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def preprocessing(size: int, mean: Any, std: Any, where: str, **resizing: Any) -> Preprocessing:
    """Make the preprocessing of images.

    Args:
      size: side of the result, pixels.
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


# --- parameters


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """A parameter of this package and the tensors of another project that hold it.

    Attributes:
      ours: name of the parameter, such as "img/positions".
      theirs: names of the tensors, which are joined along their first axis.
      shape: shape of the joined tensors.
      read, write: functions from the joined tensor to the parameter and back.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray] = lambda x: x
    write: Callable[[np.ndarray], np.ndarray] = lambda x: x

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the other project's tensors."""
        shape = (self.shape[0] // len(self.theirs), *self.shape[1:]) if len(self.theirs) > 1 else self.shape
        return dict.fromkeys(self.theirs, shape)


def _linear(ours: str, theirs: str, shape: tuple[int, int], *, heads: int = 0) -> list[ParamMapping]:
    """Kernel and bias of a layer with weight `shape` (out, in); with `heads` the input is split over them."""
    out, features = shape
    kernel = (heads, features // heads, out) if heads else (features, out)
    return [
        ParamMapping(
            f"{ours}/kernel",
            (f"{theirs}.weight",),
            shape,
            lambda x: x.T.reshape(kernel),
            lambda x: x.reshape(features, out).T,
        ),
        ParamMapping(f"{ours}/bias", (f"{theirs}.bias",), (out,)),
    ]


def _to_heads(ours: str, theirs: Sequence[str], d: int, split: tuple[int, ...]) -> list[ParamMapping]:
    """Kernel (d, *split) and bias `split` of one or more maps to heads; `theirs` are prefixes of weight and bias."""
    out = d if len(split) == 2 else split[0] * d
    return [
        ParamMapping(
            f"{ours}/kernel",
            tuple(f"{start}weight" for start in theirs),
            (out, d),
            lambda x: x.T.reshape(d, *split),
            lambda x: x.reshape(d, out).T,
        ),
        ParamMapping(
            f"{ours}/bias",
            tuple(f"{start}bias" for start in theirs),
            (out,),
            lambda x: x.reshape(split),
            lambda x: x.reshape(-1),
        ),
    ]


def _norm(ours: str, theirs: str, d: int) -> list[ParamMapping]:
    """Scale and bias of a LayerNorm of `d` channels."""
    return [
        ParamMapping(f"{ours}/norm/scale", (f"{theirs}.weight",), (d,)),
        ParamMapping(f"{ours}/norm/bias", (f"{theirs}.bias",), (d,)),
    ]


def _block(ours: str, prefix: str, tower: Mapping[str, Any], names: Mapping[str, Any]) -> list[ParamMapping]:
    """All parameters of a block of the tower with the options `tower`."""
    d, heads, hidden = tower["width"], tower["heads"], int(tower["mlp_ratio"] * tower["width"])
    name = {key: f"{prefix}.{value}" for key, value in names.items() if key != "qkv"}
    return [
        *_norm(f"{ours}/norm_1", name["norm_1"], d),
        *_to_heads(f"{ours}/attention/qkv", [f"{prefix}.{x}" for x in names["qkv"]], d, (3, heads, d // heads)),
        *_linear(f"{ours}/attention/out", name["out"], (d, d), heads=heads),
        *_norm(f"{ours}/norm_2", name["norm_2"], d),
        *_linear(f"{ours}/mlp/up", name["up"], (hidden, d)),
        *_linear(f"{ours}/mlp/down", name["down"], (d, hidden)),
    ]


def _image(img: Mapping[str, Any], names: Mapping[str, str]) -> list[ParamMapping]:
    """Parameters of an image tower before and after its blocks."""
    d, patch, heads = img["width"], img["patch"], img["heads"]
    hidden, cls = int(img["mlp_ratio"] * d), img["pool"] == "cls"
    mappings = [
        ParamMapping(
            "img/patches/kernel",
            (f"{names['patches']}.weight",),
            (d, 3, patch, patch),
            lambda x: x.transpose(2, 3, 1, 0).reshape(-1, d),
            lambda x: x.reshape(patch, patch, 3, d).transpose(3, 2, 0, 1),
        ),
        ParamMapping("img/positions", (names["positions"],), ((img["image_size"] // patch) ** 2 + cls, d)),
        *_norm("img/norm_post", names["norm_post"], d),
    ]
    if img["patch_bias"]:
        mappings.append(ParamMapping("img/patches/bias", (f"{names['patches']}.bias",), (d,)))
    if cls:
        mappings.append(ParamMapping("img/cls", (names["cls"],), (d,)))
    if img["pre_norm"]:
        mappings += _norm("img/norm_pre", names["norm_pre"], d)
    if img["pool"] == "map":
        pool = "img/pool_map"
        mappings += [
            ParamMapping(f"{pool}/probe", (names["probe"],), (1, 1, d)),
            *_to_heads(f"{pool}/query", [f"{names['query']}."], d, (heads, d // heads)),
            *_to_heads(f"{pool}/kv", [f"{names['kv']}."], d, (2, heads, d // heads)),
            *_linear(f"{pool}/out", names["out"], (d, d), heads=heads),
            *_norm(f"{pool}/norm", names["norm"], d),
            *_linear(f"{pool}/mlp/up", names["up"], (hidden, d)),
            *_linear(f"{pool}/mlp/down", names["down"], (d, hidden)),
        ]
    return mappings


def _mappings(group: Mapping[str, Any], vocab: int, names: Names, scalars: Sequence[str]) -> list[ParamMapping]:
    """All parameters of a model with unrolled blocks, of config group `model` and `vocab` tokens."""
    img, txt, embed = group["img"], group["txt"], group["embed"]
    mappings = [
        *_image(img, names.img),
        ParamMapping("txt/tokens", (names.txt["tokens"],), (vocab, txt["width"])),
        ParamMapping("txt/positions", (names.txt["positions"],), (txt["context_length"], txt["width"])),
        *_norm("txt/norm_post", names.txt["norm_post"], txt["width"]),
        *(ParamMapping(name, (names.heads[name],), ()) for name in scalars),
    ]
    for key, tower, prefix, block in (
        ("img", img, names.img["blocks"], names.img_block or names.block),
        ("txt", txt, names.txt["blocks"], names.block),
    ):
        for i in range(tower["depth"]):
            mappings += _block(f"{key}/transformer/block_{i}", f"{prefix}.{i}", tower, block)
    for key, tower in (("img", img), ("txt", txt)):
        if key == "img" and not group["project_img"]:
            continue
        ours, theirs, d = f"proj_{key}/linear", names.heads[f"proj_{key}"], tower["width"]
        if theirs.endswith(".weight"):
            layer = _linear(ours, theirs.removesuffix(".weight"), (embed, d))
            mappings += layer if group["project_bias"] else layer[:1]
        else:
            mappings.append(ParamMapping(f"{ours}/kernel", (theirs,), (d, embed)))
    return mappings


def read(tensors: Mapping[str, np.ndarray], group: Mapping[str, Any], vocab: int, names: Names, where: str) -> Flat:
    """Convert tensors of another project to flat parameters.

    Args:
      tensors: tensors by name.
      group: config group `model`.
      vocab: size of the vocabulary.
      names: names of the project.
      where: path of the weights, for errors.

    Raises:
      UserError: tensors that are missing, unknown or of another shape; all are listed by name.
    """
    scalars = [name for name in ("log_scale", "bias") if name == "log_scale" or names.heads.get(name) in tensors]
    mappings = _mappings(group, vocab, names, scalars)
    shapes = {name: shape for mapping in mappings for name, shape in mapping.parts.items()}
    tensors = {name: _reshaped(x, shapes.get(name, x.shape)) for name, x in tensors.items()}
    _check(tensors, shapes, where)

    def joined(mapping: ParamMapping) -> np.ndarray:
        parts = [tensors[name] for name in mapping.theirs]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return {mapping.ours: np.asarray(mapping.read(joined(mapping)), order="C") for mapping in mappings}


def write(params: Mapping[str, np.ndarray], group: Mapping[str, Any], vocab: int, names: Names) -> Flat:
    """Convert flat parameters to tensors of another project, by name; arguments and errors as in `read`."""
    mappings = _mappings(group, vocab, names, [name for name in ("log_scale", "bias") if name in params])
    shapes = {mapping.ours: mapping.read(np.empty(mapping.shape, np.float32)).shape for mapping in mappings}
    _check(params, shapes, "the model")
    tensors = {}
    for mapping in mappings:
        x, theirs = mapping.write(params[mapping.ours]), mapping.theirs
        tensors |= dict(zip(theirs, np.split(x, len(theirs)) if len(theirs) > 1 else [x], strict=True))
    return tensors


def _reshaped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`x` in `shape` if the two differ only by axes of length 1."""
    same = [n for n in x.shape if n != 1] == [n for n in shape if n != 1]
    return x.reshape(shape) if same else x


def _check(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

    wrong = []
    if missing := [name for name in shapes if name not in tensors]:
        wrong.append(f"missing: {listed(missing)}")
    if extra := [name for name in tensors if name not in shapes]:
        wrong.append(f"unknown: {listed(extra)}")
    misshapen = [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if misshapen:
        wrong.append(listed(misshapen))
    if wrong:
        raise UserError(f"{where}: tensors do not match its config; {'; '.join(wrong)}.")
