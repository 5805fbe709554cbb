"""Parameters of this package as tensors of other projects: one table for each naming, read in both directions."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.errors import UserError

Flat = dict[str, np.ndarray]
_SHOWN = 8  # names that an error lists


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a project's tensors, by the names here; names of modules are without ".weight".

    Attributes:
      img, txt: single tensors and norms of a tower; "blocks" is the prefix of a block's number.
      block: the same inside of a block; "qkv" has the prefixes of three names, or of one for all.
      heads: heads that the project's model has.
      linear: whether projections are linear layers (e, d), and not matrices (d, e).
    """

    img: Mapping[str, str]
    txt: Mapping[str, str]
    block: Mapping[str, str | tuple[str, ...]]
    heads: Mapping[str, str]
    linear: bool


def open_clip(prefix: str = "", *, linear: bool = False) -> Names:
    """Names of OpenAI's CLIP and of open_clip, whose newer models have the `prefix` "text." in the text tower."""
    return Names(
        img={
            "patches/kernel": "visual.conv1.weight", "positions": "visual.positional_embedding",
            "cls": "visual.class_embedding", "norm_pre": "visual.ln_pre", "norm_post": "visual.ln_post",
            "blocks": "visual.transformer.resblocks",
        },
        txt={
            "tokens": f"{prefix}token_embedding.weight", "positions": f"{prefix}positional_embedding",
            "norm_post": f"{prefix}ln_final", "blocks": f"{prefix}transformer.resblocks",
        },
        block={
            "norm_1": "ln_1", "qkv": ("attn.in_proj_",), "out": "attn.out_proj", "norm_2": "ln_2", "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        heads={
            "proj_img": "visual.proj", "log_scale": "logit_scale", "bias": "logit_bias",
            "proj_txt": f"{prefix}text_projection" + (".weight" if linear else ""),
        },
        linear=linear,
    )  # fmt: skip


HF = Names(
    img={
        "patches/kernel": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "cls": "vision_model.embeddings.class_embedding", "norm_pre": "vision_model.pre_layrnorm",
        "norm_post": "vision_model.post_layernorm", "blocks": "vision_model.encoder.layers",
    },
    txt={
        "tokens": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "norm_post": "text_model.final_layer_norm", "blocks": "text_model.encoder.layers",
    },
    block={
        "norm_1": "layer_norm1", "qkv": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        "out": "self_attn.out_proj", "norm_2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2",
    },
    heads={
        "proj_img": "visual_projection.weight", "proj_txt": "text_projection.weight", "log_scale": "logit_scale",
    },
    linear=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """A parameter of this package and the tensors of another project that hold it.

    Attributes:
      ours: name of the parameter, "img/positions".
      theirs: one name, or those of tensors that are joined along their first axis.
      shape: of the other project's tensors, joined.
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


def linear(ours: str, theirs: str, shape: tuple[int, int], *, heads: int = 0) -> list[ParamMapping]:
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


def norm(ours: str, theirs: str, d: int) -> list[ParamMapping]:
    """Scale and bias of a LayerNorm of `d` channels."""
    return [
        ParamMapping(f"{ours}/norm/scale", (f"{theirs}.weight",), (d,)),
        ParamMapping(f"{ours}/norm/bias", (f"{theirs}.bias",), (d,)),
    ]


def block(ours: str, theirs: str, tower: Mapping[str, Any], names: Names) -> list[ParamMapping]:
    """All parameters of a block of the tower with the options `tower`."""
    d, heads = tower["width"], tower["heads"]
    hidden, split = int(tower["mlp_ratio"] * d), (3, heads, d // heads)
    name = {key: f"{theirs}.{value}" for key, value in names.block.items() if key != "qkv"}
    starts = [f"{theirs}.{start}" for start in names.block["qkv"]]
    return [
        *norm(f"{ours}/norm_1", name["norm_1"], d),
        ParamMapping(
            f"{ours}/attention/qkv/kernel",
            tuple(f"{start}weight" for start in starts),
            (3 * d, d),
            lambda x: x.T.reshape(d, *split),
            lambda x: x.reshape(d, 3 * d).T,
        ),
        ParamMapping(
            f"{ours}/attention/qkv/bias",
            tuple(f"{start}bias" for start in starts),
            (3 * d,),
            lambda x: x.reshape(split),
            lambda x: x.reshape(-1),
        ),
        *linear(f"{ours}/attention/out", name["out"], (d, d), heads=heads),
        *norm(f"{ours}/norm_2", name["norm_2"], d),
        *linear(f"{ours}/mlp/up", name["up"], (hidden, d)),
        *linear(f"{ours}/mlp/down", name["down"], (d, hidden)),
    ]


def patches(theirs: str, d: int, patch: int) -> ParamMapping:
    """Kernel of a convolution that makes tokens of `d` channels of patches of `patch` x `patch` pixels."""
    return ParamMapping(
        "img/patches/kernel",
        (theirs,),
        (d, 3, patch, patch),
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, d),
        lambda x: x.reshape(patch, patch, 3, d).transpose(3, 2, 0, 1),
    )


def param_mappings(model: Mapping[str, Any], vocab: int, names: Names, heads: Collection[str]) -> list[ParamMapping]:
    """Return the mappings of all parameters of a CLIP of group `model` with a class token and unrolled blocks.

    Args:
      model: config group `model`.
      vocab: size of the vocabulary.
      names: of the other project.
      heads: those of the model: "proj_img", "proj_txt" and scalars.
    """
    img, txt, embed = model["img"], model["txt"], model["embed"]
    d, patch, tokens = img["width"], img["patch"], (img["image_size"] // img["patch"]) ** 2 + 1
    mappings = [
        patches(names.img["patches/kernel"], d, patch),
        ParamMapping("img/positions", (names.img["positions"],), (tokens, d)),
        ParamMapping("img/cls", (names.img["cls"],), (d,)),
        *(norm("img/norm_pre", names.img["norm_pre"], d) if img["pre_norm"] else []),
        *norm("img/norm_post", names.img["norm_post"], d),
        ParamMapping("txt/tokens", (names.txt["tokens"],), (vocab, txt["width"])),
        ParamMapping("txt/positions", (names.txt["positions"],), (txt["context_length"], txt["width"])),
        *norm("txt/norm_post", names.txt["norm_post"], txt["width"]),
        *(ParamMapping(name, (names.heads[name],), ()) for name in heads if not name.startswith("proj_")),
    ]
    for key, tower, tower_names in (("img", img, names.img), ("txt", txt, names.txt)):
        for i in range(tower["depth"]):
            mappings += block(f"{key}/transformer/block_{i}", f"{tower_names['blocks']}.{i}", tower, names)
        shape, ours, theirs = (tower["width"], embed), f"proj_{key}/linear/kernel", (names.heads[f"proj_{key}"],)
        # open_clip's projection of images stays a matrix where that of texts is a layer.
        if names.linear and theirs[0].endswith(".weight"):
            mappings.append(ParamMapping(ours, theirs, shape[::-1], lambda x: x.T, lambda x: x.T))
        else:
            mappings.append(ParamMapping(ours, theirs, shape))
    return mappings


def read(tensors: Mapping[str, np.ndarray], mappings: Sequence[ParamMapping], where: str) -> Flat:
    """Convert tensors of another project, by name, to flat parameters.

    Raises:
      UserError: some are missing, unknown or of another shape; all are listed by name.
    """
    shapes = {name: shape for mapping in mappings for name, shape in mapping.parts.items()}
    tensors = {name: x.reshape(()) if shapes.get(name) == () and x.size == 1 else x for name, x in tensors.items()}
    _check(tensors, shapes, where)

    def joined(mapping: ParamMapping) -> np.ndarray:
        parts = [tensors[name] for name in mapping.theirs]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return {mapping.ours: np.asarray(mapping.read(joined(mapping)), order="C") for mapping in mappings}


def write(params: Mapping[str, np.ndarray], mappings: Sequence[ParamMapping], where: str) -> Flat:
    """Convert flat parameters to tensors of another project, by name; raises as `read` does."""
    shapes = {mapping.ours: mapping.read(np.empty(mapping.shape, np.float32)).shape for mapping in mappings}
    _check(params, shapes, where)
    tensors = {}
    for mapping in mappings:
        x, names = mapping.write(params[mapping.ours]), mapping.theirs
        tensors |= dict(zip(names, np.split(x, len(names)) if len(names) > 1 else [x], strict=True))
    return tensors


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
