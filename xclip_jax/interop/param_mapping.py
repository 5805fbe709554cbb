"""Which tensor of ours is which of theirs: one table for each naming, read in both directions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xclip_jax.errors import UserError

Flat = dict[str, np.ndarray]
_SHOWN = 8  # names that an error lists


@dataclasses.dataclass(frozen=True)
class Names:
    """What a project calls its tensors; names of modules end where ".weight" follows.

    Attributes:
      img, txt: names of single tensors and norms of a tower by ours; "blocks" is what stands before a block's number.
      block: the same inside of a block; "qkv" are the beginnings of three names, or of one for all.
      heads: "proj_img", "proj_txt", "log_scale" and "bias".
      linear: whether projections are linear layers (e, d), and not matrices (d, e).
    """

    img: Mapping[str, str]
    txt: Mapping[str, str]
    block: Mapping[str, str | tuple[str, ...]]
    heads: Mapping[str, str]
    linear: bool


def open_clip(prefix: str = "", *, linear: bool = False) -> Names:
    """Names of OpenAI's CLIP, which open_clip keeps; its newer models put `prefix` "text." before the text tower."""
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
class Link:
    """One tensor of ours and what holds it there.

    Attributes:
      ours: its name, "img/positions".
      theirs: one name, or those of tensors that are joined along their first axis.
      shape: of theirs, joined.
      read, write: theirs, joined, to ours and back.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray] = lambda x: x
    write: Callable[[np.ndarray], np.ndarray] = lambda x: x

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of theirs."""
        shape = (self.shape[0] // len(self.theirs), *self.shape[1:]) if len(self.theirs) > 1 else self.shape
        return dict.fromkeys(self.theirs, shape)


def _linear(ours: str, theirs: str, shape: tuple[int, int], *, heads: int = 0) -> list[Link]:
    """Kernel and bias of a layer with weight `shape` (out, in); with `heads` the input is split over them."""
    out, features = shape
    kernel = (heads, features // heads, out) if heads else (features, out)
    return [
        Link(f"{ours}/kernel", (f"{theirs}.weight",), shape, lambda x: x.T.reshape(kernel),
             lambda x: x.reshape(features, out).T),
        Link(f"{ours}/bias", (f"{theirs}.bias",), (out,)),
    ]  # fmt: skip


def _norm(ours: str, theirs: str, d: int) -> list[Link]:
    return [
        Link(f"{ours}/norm/scale", (f"{theirs}.weight",), (d,)), Link(f"{ours}/norm/bias", (f"{theirs}.bias",), (d,))
    ]  # fmt: skip


def _block(ours: str, theirs: str, tower: Mapping[str, Any], names: Names) -> list[Link]:
    d, heads = tower["width"], tower["heads"]
    hidden, split = int(tower["mlp_ratio"] * d), (3, heads, d // heads)
    name = {key: f"{theirs}.{value}" for key, value in names.block.items() if key != "qkv"}
    starts = [f"{theirs}.{start}" for start in names.block["qkv"]]
    return [
        *_norm(f"{ours}/norm_1", name["norm_1"], d),
        Link(f"{ours}/attention/qkv/kernel", tuple(f"{start}weight" for start in starts), (3 * d, d),
             lambda x: x.T.reshape(d, *split), lambda x: x.reshape(d, 3 * d).T),
        Link(f"{ours}/attention/qkv/bias", tuple(f"{start}bias" for start in starts), (3 * d,),
             lambda x: x.reshape(split), lambda x: x.reshape(-1)),
        *_linear(f"{ours}/attention/out", name["out"], (d, d), heads=heads),
        *_norm(f"{ours}/norm_2", name["norm_2"], d),
        *_linear(f"{ours}/mlp/up", name["up"], (hidden, d)),
        *_linear(f"{ours}/mlp/down", name["down"], (d, hidden)),
    ]  # fmt: skip


def links(model: Mapping[str, Any], vocab: int, names: Names, *, bias: bool) -> list[Link]:
    """All tensors of a CLIP of group `model`, with a class token and unrolled blocks; `bias` is the sigmoid's."""
    img, txt, embed = model["img"], model["txt"], model["embed"]
    d, patch, tokens = img["width"], img["patch"], (img["image_size"] // img["patch"]) ** 2 + 1
    found = [
        Link("img/patches/kernel", (names.img["patches/kernel"],), (d, 3, patch, patch),
             lambda x: x.transpose(2, 3, 1, 0).reshape(-1, d),
             lambda x: x.reshape(patch, patch, 3, d).transpose(3, 2, 0, 1)),
        Link("img/positions", (names.img["positions"],), (tokens, d)),
        Link("img/cls", (names.img["cls"],), (d,)),
        *(_norm("img/norm_pre", names.img["norm_pre"], d) if img["pre_norm"] else []),
        *_norm("img/norm_post", names.img["norm_post"], d),
        Link("txt/tokens", (names.txt["tokens"],), (vocab, txt["width"])),
        Link("txt/positions", (names.txt["positions"],), (txt["context_length"], txt["width"])),
        *_norm("txt/norm_post", names.txt["norm_post"], txt["width"]),
        Link("log_scale", (names.heads["log_scale"],), ()),
    ]  # fmt: skip
    if bias:
        found.append(Link("bias", (names.heads["bias"],), ()))
    for key, tower, of in (("img", img, names.img), ("txt", txt, names.txt)):
        for i in range(tower["depth"]):
            found += _block(f"{key}/transformer/block_{i}", f"{of['blocks']}.{i}", tower, names)
        shape, ours, theirs = (tower["width"], embed), f"proj_{key}/linear/kernel", (names.heads[f"proj_{key}"],)
        # open_clip's projection of images stays a matrix where that of texts is a layer.
        if names.linear and theirs[0].endswith(".weight"):
            found.append(Link(ours, theirs, shape[::-1], lambda x: x.T, lambda x: x.T))
        else:
            found.append(Link(ours, theirs, shape))
    return found


def read(found: Mapping[str, np.ndarray], table: list[Link], where: str) -> Flat:
    """Tensors by their names -> ours.

    Raises:
      UserError: some are missing, unknown or of another shape; all are listed by name.
    """
    shapes = {name: shape for link in table for name, shape in link.parts.items()}
    found = {name: x.reshape(()) if shapes.get(name) == () and x.size == 1 else x for name, x in found.items()}
    _check(found, shapes, where)

    def joined(link: Link) -> np.ndarray:
        parts = [found[name] for name in link.theirs]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return {link.ours: np.asarray(link.read(joined(link)), order="C") for link in table}


def write(params: Mapping[str, np.ndarray], table: list[Link], where: str) -> Flat:
    """Ours, flat -> tensors by their names; raises as `read` does."""
    _check(params, {link.ours: link.read(np.empty(link.shape, np.float32)).shape for link in table}, where)
    found = {}
    for link in table:
        x = link.write(params[link.ours])
        found |= dict(zip(link.theirs, np.split(x, len(link.theirs)) if len(link.theirs) > 1 else [x], strict=True))
    return found


def _check(found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    def some(names: list[str]) -> str:
        return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

    wrong = []
    if missing := [name for name in shapes if name not in found]:
        wrong.append(f"missing are {some(missing)}")
    if extra := [name for name in found if name not in shapes]:
        wrong.append(f"unknown are {some(extra)}")
    misshapen = [f"{name} is {found[name].shape} and should be {shape}" for name, shape in shapes.items()
                 if name in found and found[name].shape != shape]  # fmt: skip
    if misshapen:
        wrong.append(f"misshapen are {some(misshapen)}")
    if wrong:
        raise UserError(f"{where} does not have the tensors that its config promises: {'; '.join(wrong)}.")
