"""Contrastive terms: CLIP's softmax and SigLIP's sigmoid loss of all pairs of the batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from xclip_jax.core.fields import choice, fraction_below_one, key
from xclip_jax.losses import contrastive, ring
from xclip_jax.models.heads import Head, Heads, Projection, Scalar
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.similarity import CosineSimilarity
from xclip_jax.objectives.term import Arrays, Check, Curve, Health, Level, LossConfig, Report, Result, Term

# [ours] On the plateau the loss is less than this share below the loss of a blind guess; runs that learn are a tenth
# below it at the end of the warm-up.
PLATEAU_SHARE = 0.01
# Fields of a batch whose equal rows are matching pairs, by the value of `positives`.
_KEYS = {"pair": "", "caption": "text_key", "image": "image_key"}


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
    """A loss of all pairs of the batch: the common part of softmax and sigmoid."""

    form: ClassVar[str] = "softmax"  # a function of `losses.contrastive` and `losses.ring`
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale")  # its arguments
    max_scale: ClassVar[float] = math.inf  # bound of the logit scale

    positives: str = key(
        "pair", "what pairs of a batch match: themselves, or others of one caption or image", choice(_KEYS)
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """Images and texts, and the hash that tells which pairs match, if they are not alone."""
        return (*super().fields, _KEYS[self.positives]) if _KEYS[self.positives] else super().fields

    @property
    def similarity(self) -> CosineSimilarity:
        return CosineSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Projections of the towers, the logit scale and, if the loss takes it, the logit bias."""
        dtype, e = jax.numpy.dtype(model.dtype), model.embed
        heads: dict[str, Head | Scalar] = {
            f"proj_{tower}": Head(Projection(e, dtype, model.project_bias), tower, f"z_{tower}", flops=2 * e * width)
            for tower, width in model.widths.items()
        }
        if not model.project_img:  # the features themselves are the embeddings
            heads["proj_img"] = Head(Projection(0, dtype), "img", "z_img")
        heads["log_scale"] = Scalar("scale", math.log(model.scale_init), jax.numpy.exp)
        if "bias" in self.outputs:
            heads["bias"] = Scalar("bias", model.bias_init)
        return heads

    def specialise(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """Return `__call__`, around a ring of devices with `loss.impl` "ring"."""
        return functools.partial(self.__call__, mesh=mesh) if loss.impl == "ring" else self

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, mesh: Mesh | None = None
    ) -> Result:
        """Compute the loss, see `Term.__call__`. With a `mesh` the pairs are compared on a ring of its devices."""
        arguments, options = [out[name] for name in self.outputs], dataclasses.asdict(self)
        if field := _KEYS[options.pop("positives")]:
            options["keys"] = batch[field]
        module, where = (contrastive, {}) if mesh is None else (ring, {"mesh": mesh})
        loss, metrics = getattr(module, self.form)(*arguments, **where, **options)
        return loss, metrics | {"scale": out["scale"]}, {}

    def constrain(self, params: Any) -> Any:
        """Hold the logit scale at `max_scale` or below.

        Clipping in the forward pass instead would leave no gradient to come back from the bound.
        """
        if self.max_scale == math.inf:
            return params
        return params | {"log_scale": jax.numpy.minimum(params["log_scale"], math.log(self.max_scale))}

    def problems(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """Yield a logit scale that starts above its bound, with a margin for the fp16 rounding of OpenAI's weights."""
        if model.scale_init > self.max_scale * (1 + 1e-3):
            bound = f"{self.max_scale:g}, the bound of {self.title}"
            yield f"model.scale_init={model.scale_init:g} is above {bound}; lower it"

    def flops(self, model: ModelConfig, batch: int) -> float:
        """Cost of the comparison of a sample with the batch."""
        return 2 * batch * model.embed

    def blind_loss(self, metrics: Mapping[str, float]) -> float:
        """Return the loss, in nats, of the best guess that does not depend on the inputs."""
        return metrics["ln_b"]

    @property
    def report(self) -> Report:
        return ContrastiveReport(self)


@dataclasses.dataclass(frozen=True)
class ContrastiveReport(Report[Contrastive]):
    """Report of a contrastive term: the loss compared with a blind guess, accuracy, and logit scale."""

    def progress(self, metrics: Mapping[str, float]) -> str:
        """Return the loss, and CLIP's loss of a blind guess."""
        blind = f" (ln b {metrics['ln_b']:.2f})" if self.term.form == "softmax" and "loss" in metrics else ""
        return super().progress(metrics) + blind

    def curves(self) -> tuple[Curve, ...]:
        """Loss, accuracy within the batch, logit scale."""
        accuracy = (("acc_img", "image to text"), ("acc_txt", "text to image"))
        note = "ln b, with b the batch size, is the loss of CLIP for a guess that does not depend on the inputs."
        return (
            Curve(f"{self.term.title} loss", (("loss", "contrastive"),), "nats", (Level("ln b", "ln_b"),), note),
            Curve("Accuracy within the batch", accuracy, "%", note="Share whose best match is their own partner."),
            Curve("Logit scale", (("scale", "scale"),)),
        )

    def health(self, metrics: Mapping[str, float]) -> Health:
        """Whether the loss has left the plateau on which all inputs have one embedding."""
        blind = self.term.blind_loss(metrics) if metrics.keys() >= {"loss", "ln_b"} else 0.0
        if not blind:  # a batch of one pair leaves nothing to guess
            return Health()
        loss, share = metrics["loss"], PLATEAU_SHARE * (1 - getattr(self.term, "label_smoothing", 0.0))
        check = Check(
            "plateau",
            max(0.0, 1 - loss / blind),  # 0 for a NaN loss, which fails
            share,
            "Share by which the loss is below a blind guess; fails when all inputs have much the same embedding, where "
            "the gradient vanishes.",
            f"the loss is {loss:.3f}, no better than {blind:.3f} of a guess that does not depend on the inputs. "
            "Lengthen optim.warmup or lower optim.lr.",
        )
        return Health("A contrastive loss can stay at the value of a blind guess for a while, or for ever.", (check,))


@dataclasses.dataclass(frozen=True)
class Clip(Contrastive):
    """Config group `objective.clip`: options of `losses.contrastive.softmax`."""

    title: ClassVar[str] = "CLIP"
    max_scale: ClassVar[float] = 100.0  # arXiv 2103.00020, section 2.5

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())


@dataclasses.dataclass(frozen=True)
class Siglip(Contrastive):
    """Sigmoid contrastive loss, see `losses.contrastive.sigmoid`: CLIP's heads and a logit bias."""

    title: ClassVar[str] = "SigLIP"
    form: ClassVar[str] = "sigmoid"
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale", "bias")

    def blind_loss(self, metrics: Mapping[str, float]) -> float:
        """Loss of the logit ln(1 / (b - 1)) for each of b * b pairs, if b of them match."""
        b = math.exp(metrics["ln_b"])
        return metrics["ln_b"] + (b - 1) * math.log(b / (b - 1)) if b > 1 else 0.0
