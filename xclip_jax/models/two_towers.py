"""Both towers, their heads and the learned temperature in one module; the sizes that have a name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.config.fields import Check, at_least, choice, key
from xclip_jax.errors import one_of
from xclip_jax.models.heads import Classifier, ClusterHead, ClusterHeadConfig, Projection
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


class TwoTowers(nn.Module):
    """Image and text towers with a projection head, a cluster head, or both; or one of them with a classifier.

    Attributes:
      img: fields of `VisionTransformer`.
      txt: fields of `TextTransformer`.
      embed: e, the size of the shared embedding space; 0 leaves CLIP's projection, scale and bias out.
      scale_init: initial value of the logit scale t = exp(log_scale).
      bias_init: initial logit bias of the sigmoid loss, or None for no bias.
      cluster_head: fields of `ClusterHead`, or None for no cluster heads.
      classifier: fields of `Classifier` for fine-tuning, or None.
      towers: those that the model has; the classifier stands on the first.
      dtype: computation dtype of towers and heads; parameters, norms, softmax and logits stay fp32.
    """

    img: Mapping[str, Any]
    txt: Mapping[str, Any]
    embed: int = 512
    scale_init: float = 1 / 0.07
    bias_init: float | None = None
    cluster_head: Mapping[str, Any] | None = None
    classifier: Mapping[str, Any] | None = None
    towers: tuple[str, ...] = ("img", "txt")
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.tower_img = VisionTransformer(**self.img, dtype=self.dtype, name="img")
        self.tower_txt = TextTransformer(**self.txt, dtype=self.dtype, name="txt")
        if self.embed:
            self.project_img = Projection(self.embed, self.dtype, name="proj_img")
            self.project_txt = Projection(self.embed, self.dtype, name="proj_txt")
            constant = nn.initializers.constant
            self.log_scale = self.param("log_scale", named(constant(math.log(self.scale_init))), ())
            if self.bias_init is not None:
                self.bias = self.param("bias", named(constant(self.bias_init)), ())
        if self.cluster_head is not None:
            self.cluster_img = ClusterHead(**self.cluster_head, dtype=self.dtype, name="clusters_img")
            self.cluster_txt = ClusterHead(**self.cluster_head, dtype=self.dtype, name="clusters_txt")
        if self.classifier is not None:
            self.classify = Classifier(**self.classifier, dtype=self.dtype, name="classifier")

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
          z_img, z_txt (b, e) L2-normalised, `scale` = exp(log_scale) and `bias`, where there are projections;
          s_img, s_txt (b, k) cluster logits, where there are cluster heads, or their `Factors` where `logits` is false;
          logits (b, classes) of a classifier. All fp32. With `train` BatchNorm uses the
          batch's statistics and moves the running ones (collection "batch_stats", to be made mutable).
        """
        out = {}
        if self.embed:
            if h_img is not None:
                out["z_img"] = self.project_img(h_img)
            if h_txt is not None:
                out["z_txt"] = self.project_txt(h_txt)
            out["scale"] = jnp.exp(self.log_scale)
            if self.bias_init is not None:
                out["bias"] = self.bias
        if self.cluster_head is not None:
            if h_img is not None:
                out["s_img"] = self.cluster_img(h_img, train=train, logits=logits)
            if h_txt is not None:
                out["s_txt"] = self.cluster_txt(h_txt, train=train, logits=logits)
        if self.classifier is not None:
            out["logits"] = self.classify(h_img if self.towers[0] == "img" else h_txt)
        return out

    def __call__(self, image: Array, text: Array, *, train: bool = False) -> dict[str, Array]:
        """`project(encode_image(image), encode_text(text))`, with h_img and h_txt among the results."""
        h_img = self.encode_image(image) if "img" in self.towers else None
        h_txt = self.encode_text(text) if "txt" in self.towers else None
        return {"h_img": h_img, "h_txt": h_txt} | self.project(h_img, h_txt, train=train)
