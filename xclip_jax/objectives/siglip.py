"""SigLIP's term: the sigmoid contrastive loss."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import ClassVar

from xclip_jax.objectives.clip import Contrastive


@dataclasses.dataclass(frozen=True)
class Siglip(Contrastive):
    """Sigmoid contrastive loss, see `losses.contrastive.sigmoid`: CLIP's heads and a logit bias."""

    title: ClassVar[str] = "SigLIP"
    form: ClassVar[str] = "sigmoid"
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale", "bias")

    def blind_loss(self, metrics: Mapping[str, float]) -> float:
        """The loss of the logit ln(1 / (b - 1)) for each of the b * b pairs, b of which match."""
        b = math.exp(metrics["ln_b"])
        return metrics["ln_b"] + (b - 1) * math.log(b / (b - 1)) if b > 1 else 0.0

    def export_note(self, missing: Collection[str]) -> str:
        """What a model loses without its logit bias."""
        return "without bias similarities keep their order and are not logits of a match" if "bias" in missing else ""
