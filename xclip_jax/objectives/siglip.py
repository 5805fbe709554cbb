"""SigLIP's term: the sigmoid contrastive loss."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import ClassVar

import jax

from xclip_jax.models.heads import Heads, contrastive_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.clip import NOTHING_LEARNED, REMEDY, Contrastive
from xclip_jax.objectives.display import Curve, Health, Light

# [ours] A guess matches one pair of a batch right on average, and three or more in one batch of twelve.
_LEARNED_HITS = 3
_FEWEST_PAIRS = 16


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
        """The loss; ln b is not that of a uniform guess."""
        return f"{metrics['loss']:.3f}" if "loss" in metrics else ""

    def curves(self) -> tuple[Curve, ...]:
        """Those of CLIP, without ln b, which is not the value of a uniform guess."""
        return (Curve(f"{self.title} loss", (("loss", "contrastive"),), "nats"), *self._batch_curves())

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """An accuracy within the batch that is still that of a guess: a blind guess has no loss of its own here."""
        if not metrics.keys() >= {"acc_img", "acc_txt", "ln_b"} or _pairs(metrics) < _FEWEST_PAIRS:
            return []
        accuracy, b = max(metrics["acc_img"], metrics["acc_txt"]), _pairs(metrics)
        if accuracy * b >= _LEARNED_HITS:
            return []
        return [
            f"{NOTHING_LEARNED}: {accuracy:.2%} of the pairs of a batch are matched right, and a guess gets "
            f"{1 / b:.2%}. {REMEDY}"
        ]

    def health(self, metrics: Mapping[str, float]) -> Health:
        """Whether pairs are told apart within the batch."""
        summary = "The sigmoid loss fails where the accuracy within the batch stays at 1 / b, b being the batch size."
        if not metrics.keys() >= {"acc_img", "acc_txt", "ln_b"}:
            return Health(summary)
        accuracy, b = max(metrics["acc_img"], metrics["acc_txt"]), _pairs(metrics)
        light = Light(
            NOTHING_LEARNED,
            "Fails when the accuracy within the batch stays at that of a guess.",
            f"{accuracy:.2%} right; the alarm is below {_LEARNED_HITS / b:.2%}.",
            accuracy,
            _LEARNED_HITS / b,
            "" if b >= _FEWEST_PAIRS else f"Batches of fewer than {_FEWEST_PAIRS} pairs are too small to judge by.",
        )
        return Health(summary, (light,))

    def export_note(self, missing: Collection[str]) -> str:
        """The logit bias."""
        return "without bias similarities keep their order and are not logits of a match" if "bias" in missing else ""


def _pairs(metrics: Mapping[str, float]) -> int:
    """Batch size b."""
    return round(math.exp(metrics["ln_b"]))
