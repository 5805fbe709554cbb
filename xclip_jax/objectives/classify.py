"""The fine-tuning term: cross-entropy with soft targets, or squared error if labels are numbers."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from xclip_jax.core.fields import at_least, choice, fraction_below_one, key
from xclip_jax.data import transforms
from xclip_jax.models.heads import Classifier, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.term import Arrays, Curve, LossConfig, Result, Term

Array = jax.Array
HEAD_STD = {"img": 2e-5, "txt": 0.02}  # of the classifier's initial weights, by tower; BEiT's and BERT's


@dataclasses.dataclass(frozen=True)
class Classify(Term):
    """Config group `objective.classify`: fine-tuning of one tower on labelled items."""

    title: ClassVar[str] = "fine-tuning"
    labelled: ClassVar[bool] = True

    tower: str = key("img", "the tower to train; the model has no other", choice(("img", "txt")))
    classes: int = key(0, "number of classes; 1 fits the label itself, a number, by squared error", at_least(0))
    smoothing: float = key(0.0, "label smoothing", fraction_below_one())
    mixup: float = key(0.0, "parameter of mixup's beta distribution; 0 for none", at_least(0))
    cutmix: float = key(0.0, "parameter of cutmix's beta distribution; 0 for none", at_least(0))

    @property
    def towers(self) -> tuple[str, ...]:
        return (self.tower,)

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        flops = 2 * self.classes * model.widths[self.tower]
        return {"classifier": Head(Classifier(self.classes, HEAD_STD[self.tower]), self.tower, "logits", flops=flops)}

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add the inputs of mixup and cutmix: "other", the reversed batch, and "share", the kept part of an image."""
        if not (self.mixup or self.cutmix):
            return inputs
        b = len(inputs["image"])
        mixed = inputs | {"other": jax.tree.map(lambda x: x[::-1], inputs)}
        return mixed | transforms.sample_mix(jax.random.fold_in(random_key, 1), b, size, self.mixup, self.cutmix)

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`; `batch` contains "label" (b,) and, if mixed, "share" and "other"."""
        logits = out["logits"].astype(jnp.float32)
        if self.classes == 1:
            loss = jnp.square(logits[:, 0] - batch["label"]).mean()
            return loss, {"loss": loss}, {}
        labels = batch["label"].astype(jnp.int32)
        target = self._target(labels)
        if "other" in batch:
            other = self._target(batch["other"]["label"].astype(jnp.int32))
            share = batch["share"][:, None]
            target = share * target + (1 - share) * other
        loss = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1).mean()
        return loss, {"loss": loss, "top1": (logits.argmax(axis=-1) == labels).mean()}, {}

    def _target(self, labels: Array) -> Array:
        """Convert class ids (b,) to smoothed distributions (b, classes)."""
        return optax.smooth_labels(jax.nn.one_hot(labels, self.classes), self.smoothing)

    def conflicts_with(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        if self.classes < 1:
            yield f"objective.classify.classes is {self.classes}; give the number of classes of the data"
        if (self.mixup or self.cutmix) and (self.tower == "txt" or self.classes == 1):
            yield "objective.classify.mixup and .cutmix need images in classes; set both to 0"
        if self.smoothing and self.classes == 1:
            yield "objective.classify.smoothing is for classes, and one class is a number; set it to 0"

    def progress(self, metrics: Mapping[str, float]) -> str:
        return f"top-1 {metrics['top1']:.1%}" if "top1" in metrics else ""

    def curves(self) -> tuple[Curve, ...]:
        unit = "squared error" if self.classes == 1 else "nats"
        return (Curve("Loss", (("loss", "training"),), unit), Curve("Accuracy", (("top1", "training"),), "%"))
