"""CLIP's term: the softmax contrastive loss of all pairs of the batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from xclip_jax.config.fields import fraction_below_one, key
from xclip_jax.losses import contrastive, ring
from xclip_jax.models.heads import Heads, contrastive_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.base import LossConfig, Result, Term
from xclip_jax.objectives.display import Curve, Health, Level, Light
from xclip_jax.objectives.similarity import CosineSimilarity

Array = jax.Array

# [ours] Shares of ln b. Runs that learn are a tenth below it when their warm-up ends, those that do not are at it.
LEARNED_SHARE = 0.02
NOTHING_LEARNED = "nothing learned"
REMEDY = "Lengthen optim.warmup or lower optim.lr, and check that captions belong to their images (xclip-jax check)."


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
    """A loss of all pairs of the batch: what the softmax and the sigmoid have in common."""

    form: ClassVar[str] = "softmax"  # function of `losses.contrastive` and of `losses.ring`
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale")  # its arguments

    @property
    def similarity(self) -> CosineSimilarity:
        """The cosine of the embeddings."""
        return CosineSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Projections of both towers and the logit scale."""
        dtype = jax.numpy.dtype(model.dtype)
        return contrastive_heads(model.embed, model.widths, scale_init=model.scale_init, dtype=dtype)

    def in_form(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """With `loss.impl` "ring" around a ring of devices."""
        return functools.partial(self.__call__, mesh=mesh) if loss.impl == "ring" else self

    def __call__(
        self,
        out: Mapping[str, Array],
        teacher: Mapping[str, Array] | None,
        state: Mapping[str, Array],
        batch: Mapping[str, Any],
        *,
        mesh: Mesh | None = None,
    ) -> Result:
        """See `Term.__call__`. With a `mesh` the pairs are compared on a ring of its devices."""
        arguments, options = [out[name] for name in self.outputs], dataclasses.asdict(self)
        if mesh is None:
            loss, metrics = getattr(contrastive, self.form)(*arguments, **options)
        else:
            loss, metrics = getattr(ring, self.form)(*arguments, mesh=mesh, **options)
        return loss, metrics | {"scale": out["scale"]}, {}

    def progress(self, metrics: Mapping[str, float]) -> str:
        """The loss beside ln b, that of a uniform guess."""
        return f"{metrics['loss']:.3f} (ln b {metrics['ln_b']:.2f})" if "loss" in metrics else ""

    def flops(self, model: ModelConfig, batch: int) -> float:
        """The comparison of a sample with the batch."""
        return 2 * batch * model.embed

    def curves(self) -> tuple[Curve, ...]:
        """Loss, accuracy within the batch, logit scale."""
        loss = (("loss", "contrastive"),)
        note = "ln b, with b the batch size, is the loss of a guess that does not depend on the inputs."
        return (Curve(f"{self.title} loss", loss, "nats", (Level("ln b", "ln_b"),), note), *self._batch_curves())

    def _batch_curves(self) -> tuple[Curve, ...]:
        accuracy = (("acc_img", "image to text"), ("acc_txt", "text to image"))
        return (
            Curve("Accuracy within the batch", accuracy, "%", note="Share whose best match is their own partner."),
            Curve("Logit scale", (("scale", "scale"),)),
        )

    def describe(self, model: ModelConfig) -> str:
        """The shared embedding space."""
        return f"embeddings of images and texts in one space of {model.embed} dimensions"


@dataclasses.dataclass(frozen=True)
class Clip(Contrastive):
    """Config group `objective.clip`: options of `losses.contrastive.softmax`."""

    title: ClassVar[str] = "CLIP"

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """A loss that is still ln b, of a guess that does not depend on the inputs."""
        if not metrics.keys() >= {"loss", "ln_b"} or self._learned(metrics) >= self._least:
            return []
        return [
            f"{NOTHING_LEARNED}: the contrastive loss is {metrics['loss']:.3f}, and {metrics['ln_b']:.3f} is that of a "
            f"guess that does not depend on the inputs. {REMEDY}"
        ]

    def health(self, metrics: Mapping[str, float]) -> Health | None:
        """Whether the loss has left ln b."""
        summary = (
            "The contrastive loss fails where it stays at ln b, that of a guess that does not depend on the inputs."
        )
        if not metrics.keys() >= {"loss", "ln_b"}:
            return Health(summary)
        light = Light(
            NOTHING_LEARNED,
            "Fails when the loss stays at ln b.",
            f"{metrics['loss']:.2f} nats, ln b is {metrics['ln_b']:.2f}; the alarm is above "
            f"{(1 - self._least) * metrics['ln_b']:.2f}.",
            max(self._learned(metrics), 0.0),
            self._least,
            "" if metrics["ln_b"] > 0 else "A batch of one pair has nothing to learn.",
        )
        return Health(summary, (light,))

    @property
    def _least(self) -> float:
        """Share of ln b that has to be learned; smoothed targets leave less of it to learn."""
        return LEARNED_SHARE * (1 - self.label_smoothing)

    def _learned(self, metrics: Mapping[str, float]) -> float:
        """Share of ln b by which the loss is below it."""
        return 1 - metrics["loss"] / metrics["ln_b"] if metrics["ln_b"] > 0 else 1.0
