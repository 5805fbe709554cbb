"""Both towers with their heads in one module, config group `model`, and the presets of sizes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.core.fields import Check, at_least, choice, group, key, read_plugin
from xclip_jax.models.heads import ClusterHeadConfig, Head, Heads, Scalar
from xclip_jax.models.layers import Style, named
from xclip_jax.models.tower import ImageTower, TextTower
from xclip_jax.models.transformer import TextTowerConfig, TransformerConfig
from xclip_jax.models.vit import ImageTowerConfig
from xclip_jax.parallel.sharding import constrain

__all__ = ["PRESETS", "ModelConfig", "TwoTowers", "preset"]

Array = jax.Array
Variables = Mapping[str, Any]  # arrays by collection ("params", "batch_stats"), the input of `TwoTowers.apply`

TOWERS = ("img", "txt")
TYPES: dict[str, dict[str, Any]] = {"img": {"vit": ImageTowerConfig}, "txt": {"transformer": TextTowerConfig}}

# (width, depth, heads) of both towers, and the embedding, equal to open_clip's; "Ti" is for the demo on two CPU cores.
_SIZES = {
    "Ti": ((192, 4, 3), (128, 1, 2), 128),
    "S": ((384, 12, 6), (384, 12, 6), 384),
    "B": ((768, 12, 12), (512, 12, 8), 512),
    "L": ((1024, 24, 16), (768, 12, 12), 768),
}
PRESETS = ("Ti/12", "S/16", "B/32", "B/16", "L/16", "L/14")


def preset(name: str) -> dict[str, Any]:
    """Return the sizes {"img", "txt", "embed"} of the preset `name`; `UserError` lists the valid names."""
    check_choice("preset", name, PRESETS)
    size, patch = name.split("/")
    img, txt, embed = _SIZES[size]
    sizes = [dict(zip(("width", "depth", "heads"), tower, strict=True)) for tower in (img, txt)]
    return {"img": sizes[0] | {"patch": int(patch)}, "txt": sizes[1], "embed": embed}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Config group `model`: both towers, their heads and the computation's dtype.

    The options of a tower of another type are in `plugins` and replace the group `img` or `txt`:

        config.model.plugins = {"img": {"type": "my_lab.towers:ConvNet", "width": 512}}
    """

    img: ImageTowerConfig = group(ImageTowerConfig)
    txt: TextTowerConfig = group(TextTowerConfig)
    embed: int = key(512, "e, size of the embedding that images and texts share", at_least(1))
    scan: bool = key(True, "one compiled block for all of a tower, with stacked parameters")
    cluster_head: ClusterHeadConfig = group(ClusterHeadConfig)
    dtype: str = key(
        "bfloat16", "computation dtype; parameters stay float32", choice(("float32", "bfloat16")), card="model"
    )
    plugins: Mapping[str, Mapping[str, Any]] = key(
        {},
        "towers of other types, which replace group img or txt: its 'type', 'package.module:Class', and its options",
        Check("groups 'img' and 'txt'", lambda plugins: set(plugins) <= set(TOWERS)),
    )

    def tower(self, name: str) -> Any:
        """Return the options of the tower "img" or "txt"; `UserError` for a wrong type or option of a plug-in."""
        tower: Any = self.img if name == "img" else self.txt
        if name in self.plugins:
            base, what = (ImageTower, "image tower") if name == "img" else (TextTower, "text tower")
            tower = read_plugin(self.plugins[name], f"model.plugins.{name}", TYPES[name], base, what)
        return dataclasses.replace(tower, scan=self.scan) if isinstance(tower, TransformerConfig) else tower

    def style(self, name: str) -> Style:
        """Return the style of the tower "img" or "txt"; plug-ins have a plain projection."""
        return getattr(self.tower(name), "details", Style())

    def conflicts(self) -> Iterator[str]:
        """Yield faults of plug-ins, and contradictory sizes."""
        for name in self.plugins:
            try:
                self.tower(name)
            except UserError as error:
                text = str(error).rstrip(".")
                yield text.removeprefix("model.") if text.startswith("model.") else f"plugins.{name}: {text}"
                return
        width = self.tower("img").width
        if not self.style("img").project_img and self.embed != width:
            yield f"embed {self.embed} must be the image tower's width {width}: its style does not project images"

    @property
    def widths(self) -> dict[str, int]:
        """Feature widths {"img", "txt"}."""
        return {name: self.tower(name).width for name in TOWERS}


class TwoTowers(nn.Module):
    """Image and text towers, or one of them, with the heads of the objective."""

    img: ImageTower
    txt: TextTower
    vocab: int  # tokens of the tokenizer
    eot_id: int  # end-of-text token of the tokenizer
    heads: Heads = dataclasses.field(default_factory=dict)
    towers: tuple[str, ...] = TOWERS  # towers of the model
    dtype: DTypeLike = jnp.float32  # parameters, norms, softmax and logits stay fp32

    def setup(self) -> None:
        self.tower_img = self.img.module(self.dtype).clone(parent=self, name="img")
        self.tower_txt = self.txt.module(self.vocab, self.eot_id, self.dtype).clone(parent=self, name="txt")
        self.made: dict[str, Any] = {
            name: head.module.clone(parent=self, name=name)
            if isinstance(head, Head)
            else self.param(name, named(nn.initializers.constant(head.initial)), ())
            for name, head in self.heads.items()
        }

    def encode_image(self, image: Array, **noise: Array) -> Array:
        """Encode normalised pixels (b, h, w, 3) as h_img (b, d); for `noise` see `Tower.sample_noise`."""
        return constrain(self.tower_img(image, **noise), "batch", None)

    def encode_text(self, text: Array, **noise: Array) -> Array:
        """Encode int32 tokens (b, n) as h_txt (b, d); for `noise` see `Tower.sample_noise`."""
        return constrain(self.tower_txt(text, **noise), "batch", None)

    def project(
        self, h_img: Array | None, h_txt: Array | None, *negatives: Array, train: bool = False, logits: bool = True
    ) -> dict[str, Any]:
        """Apply the heads to features of one or both modalities, for losses and evaluators; all outputs are fp32.

        Contrastive heads return L2-normalised z_img, z_txt (b, e), `scale` and `bias`; cluster heads s_img, s_txt
        (b, k), or their `FactoredLogits` if `logits` is false; a classifier logits (b, classes). With `train` BatchNorm
        uses the batch's statistics and updates the running ones (collection "batch_stats", which must be mutable).
        Heads without options also get `negatives`, features of wrong texts, and return "negative_z_txt", for example.
        """
        features = {"img": h_img, "txt": h_txt}
        options = {"train": train, "logits": logits}
        out = {}
        for name, head in self.heads.items():
            if isinstance(head, Scalar):
                out[head.output] = head.transform(self.made[name]) if head.transform else self.made[name]
            elif features[head.input] is not None:
                out[head.output] = self.made[name](features[head.input], **{key: options[key] for key in head.options})
                if head.input == "txt" and not head.options:
                    out |= {f"negative_{head.output}": self.made[name](h) for h in negatives}
        return out

    def __call__(self, image: Array, text: Array, *, train: bool = False) -> dict[str, Any]:
        """Return `project(encode_image(image), encode_text(text))`, with h_img and h_txt among the results."""
        h_img = self.encode_image(image) if "img" in self.towers else None
        h_txt = self.encode_text(text) if "txt" in self.towers else None
        return {"h_img": h_img, "h_txt": h_txt} | self.project(h_img, h_txt, train=train)
