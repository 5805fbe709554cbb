"""SigLIP's term: the sigmoid contrastive loss."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from xclip_jax.models.heads import Heads, contrastive_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.clip import Contrastive


@dataclasses.dataclass(frozen=True)
class Siglip(Contrastive):
    """Sigmoid contrastive loss, see `losses.contrastive.sigmoid`: CLIP's heads and a logit bias."""

    title: ClassVar[str] = "SigLIP"
    form: ClassVar[str] = "sigmoid"
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale", "bias")

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Projections of both towers, the logit scale and the logit bias."""
        dtype = jax.numpy.dtype(model.dtype)
        return contrastive_heads(
            model.embed, model.widths, scale_init=model.scale_init, bias_init=model.bias_init, dtype=dtype
        )

    def progress(self, metrics: Mapping[str, float]) -> str:
        """The loss; ln b is not that of a blind guess."""
        return f"{metrics['loss']:.3f}" if "loss" in metrics else ""
