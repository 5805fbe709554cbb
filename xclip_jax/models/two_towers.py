"""Both towers and the heads on them in one module; the sizes that have a name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.config.fields import Check, at_least, choice, key
from xclip_jax.errors import one_of
from xclip_jax.models.heads import ClusterHeadConfig, Head, Heads, Scalar
from xclip_jax.models.layers import named
from xclip_jax.models.text import TextTowerConfig, TextTransformer
from xclip_jax.models.vit import ImageTowerConfig, VisionTransformer
from xclip_jax.parallel.sharding import constrain

Array = jax.Array
MAX_SCALE = 100.0  # of the logit scale, see `optim.project_scale`

# Sizes of open_clip's models of the same name. "Ti/12" is the demo's, for two CPU cores.
_TEXT = {
    "Ti": {"width": 128, "depth": 1, "heads": 2},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 512, "depth": 12, "heads": 8},
    "L": {"width": 768, "depth": 12, "heads": 12},
}
_IMAGE = {
    "Ti": {"width": 192, "depth": 4, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}
_EMBED = {"Ti": 128, "S": 384, "B": 512, "L": 768}
PRESETS = ("Ti/12", "S/16", "B/32", "B/16", "L/16", "L/14")


def preset(name: str) -> dict[str, Any]:
    """{"img", "txt", "embed"} sizes of the preset `name`; `UserError` lists the valid names."""
    one_of("preset", name, PRESETS)
    size, patch = name.split("/")
    return {"img": _IMAGE[size] | {"patch": int(patch)}, "txt": _TEXT[size], "embed": _EMBED[size]}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Config group `model`: both towers, their heads and the computation's dtype."""

    img: ImageTowerConfig = dataclasses.field(default_factory=ImageTowerConfig)
    txt: TextTowerConfig = dataclasses.field(default_factory=TextTowerConfig)
    embed: int = key(512, "e, size of the embedding that images and texts share", at_least(1))
    scale_init: float = key(
        1 / 0.07, "logit scale at the start", Check(f"above 0 and at most {MAX_SCALE:g}", lambda x: 0 < x <= MAX_SCALE)
    )
    bias_init: float = key(-10.0, "logit bias at the start, of the sigmoid loss alone")
    cluster_head: ClusterHeadConfig = dataclasses.field(default_factory=ClusterHeadConfig)
    dtype: str = key("bfloat16", "of towers and heads; parameters stay float32", choice(("float32", "bfloat16")))

    @property
    def widths(self) -> dict[str, int]:
        """{"img", "txt"} features of the towers."""
        return {"img": self.img.width, "txt": self.txt.width}


class TwoTowers(nn.Module):
    """Image and text towers, and the heads on them; or one of the towers.

    Attributes:
      img: fields of `VisionTransformer`.
      txt: fields of `TextTransformer`.
      heads: {name: `Head` or `Scalar`}; a head's parameters have its name. The objective chooses them.
      towers: those that the model has.
      dtype: computation dtype of the towers; parameters, norms, softmax and logits stay fp32.
    """

    img: Mapping[str, Any]
    txt: Mapping[str, Any]
    heads: Heads = dataclasses.field(default_factory=dict)
    towers: tuple[str, ...] = ("img", "txt")
    dtype: Any = jnp.float32

    @property
    def outputs(self) -> tuple[str, ...]:
        """Keys of what `project` returns for features of both modalities."""
        return tuple(head.writes for head in self.heads.values())

    def setup(self) -> None:
        self.tower_img = VisionTransformer(**self.img, dtype=self.dtype, name="img")
        self.tower_txt = TextTransformer(**self.txt, dtype=self.dtype, name="txt")
        self.made = {
            name: head.module.clone(parent=self, name=name)
            if isinstance(head, Head)
            else self.param(name, named(nn.initializers.constant(head.initial)), ())
            for name, head in self.heads.items()
        }

    def encode_image(self, image: Array, noise: Array | None = None, paths: Array | None = None) -> Array:
        """Normalised pixels (b, h, w, 3) -> h_img (b, d); for `noise` and `paths` see `VisionTransformer`."""
        return constrain(self.tower_img(image, noise, paths), "batch", None)

    def encode_text(self, text: Array) -> Array:
        """int32 tokens (b, n) -> h_txt (b, d)."""
        return constrain(self.tower_txt(text), "batch", None)

    def project(
        self, h_img: Array | None, h_txt: Array | None, *, train: bool = False, logits: bool = True
    ) -> dict[str, Any]:
        """Features of one or both modalities -> what the losses and the evaluators read.

        Returns:
          {key: output} of each head whose features are given, and of each scalar, by the key that it writes: z_img,
          z_txt (b, e) L2-normalised, `scale` and `bias` of contrastive heads; s_img, s_txt (b, k) of cluster heads, or
          their `Factors` where `logits` is false; logits (b, classes) of a classifier. All fp32. With `train`
          BatchNorm uses the batch's statistics and moves the running ones (collection "batch_stats", to be made
          mutable).
        """
        features, options = {"img": h_img, "txt": h_txt}, {"train": train, "logits": logits}
        out = {}
        for name, head in self.heads.items():
            if isinstance(head, Scalar):
                out[head.writes] = head.transform(self.made[name]) if head.transform else self.made[name]
            elif features[head.reads] is not None:
                out[head.writes] = self.made[name](features[head.reads], **{key: options[key] for key in head.takes})
        return out

    def __call__(self, image: Array, text: Array, *, train: bool = False) -> dict[str, Array]:
        """`project(encode_image(image), encode_text(text))`, with h_img and h_txt among the results."""
        h_img = self.encode_image(image) if "img" in self.towers else None
        h_txt = self.encode_text(text) if "txt" in self.towers else None
        return {"h_img": h_img, "h_txt": h_txt} | self.project(h_img, h_txt, train=train)
