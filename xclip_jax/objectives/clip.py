"""CLIP's term: the softmax contrastive loss of all pairs of the batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from xclip_jax.core.fields import fraction_below_one, key
from xclip_jax.losses import contrastive, ring
from xclip_jax.models.heads import Heads, contrastive_heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.base import LossConfig, Result, Term
from xclip_jax.objectives.display import Curve, Health, Level, Light
from xclip_jax.objectives.similarity import CosineSimilarity

Array = jax.Array

# [ours] Runs that learn are a tenth below the loss of a blind guess when their warm-up ends, others at it.
PLATEAU_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
    """A loss of all pairs of the batch: what the softmax and the sigmoid have in common."""

    form: ClassVar[str] = "softmax"  # function of `losses.contrastive` and of `losses.ring`
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale")  # its arguments
    max_scale: ClassVar[float] = math.inf  # bound of the logit scale

    @property
    def similarity(self) -> CosineSimilarity:
        """The cosine of the embeddings."""
        return CosineSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Projections of the towers, the logit scale and, where the loss takes one, the logit bias."""
        return contrastive_heads(
            model.embed,
            model.widths,
            scale_init=model.scale_init,
            bias_init=model.bias_init if "bias" in self.outputs else None,
            project_img=model.project_img,
            project_bias=model.project_bias,
            dtype=jax.numpy.dtype(model.dtype),
        )

    def in_form(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """Return `__call__`, around a ring of devices with `loss.impl` "ring"."""
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
        """Compute the loss, see `Term.__call__`. With a `mesh` the pairs are compared on a ring of its devices."""
        arguments, options = [out[name] for name in self.outputs], dataclasses.asdict(self)
        if mesh is None:
            loss, metrics = getattr(contrastive, self.form)(*arguments, **options)
        else:
            loss, metrics = getattr(ring, self.form)(*arguments, mesh=mesh, **options)
        return loss, metrics | {"scale": out["scale"]}, {}

    def constrain(self, params: Any) -> Any:
        """Hold the logit scale at `max_scale` or below.

        Clipping in the forward pass instead would leave no gradient to come back from the bound.
        """
        if self.max_scale == math.inf:
            return params
        return params | {"log_scale": jax.numpy.minimum(params["log_scale"], math.log(self.max_scale))}

    def problems(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """A logit scale that starts above its bound, but for what fp16 adds to the one of OpenAI's weights."""
        if model.scale_init > self.max_scale * (1 + 1e-3):
            bound = f"{self.max_scale:g}, the bound of {self.title}"
            yield f"model.scale_init={model.scale_init:g} is above {bound}; lower it"

    def flops(self, model: ModelConfig, batch: int) -> float:
        """The comparison of a sample with the batch."""
        return 2 * batch * model.embed

    def curves(self) -> tuple[Curve, ...]:
        """Loss, accuracy within the batch, logit scale."""
        accuracy = (("acc_img", "image to text"), ("acc_txt", "text to image"))
        return (
            Curve(f"{self.title} loss", (("loss", "contrastive"),), "nats"),
            Curve("Accuracy within the batch", accuracy, "%", note="Share whose best match is their own partner."),
            Curve("Logit scale", (("scale", "scale"),)),
        )

    def blind_loss(self, metrics: Mapping[str, float]) -> float:
        """The loss, in nats, of the best guess that does not depend on the inputs."""
        return metrics["ln_b"]

    @property
    def plateau_share(self) -> float:
        """A loss that is less than this share below that of a blind guess is on the plateau."""
        return PLATEAU_SHARE

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """A warning where the loss rests at that of a blind guess."""
        if not metrics.keys() >= {"loss", "ln_b"} or not (blind := self.blind_loss(metrics)):
            return []
        loss = metrics["loss"]
        if loss < (1 - self.plateau_share) * blind:
            return []
        return [
            f"plateau: the loss is {loss:.3f}, no better than {blind:.3f} of a guess that does not depend on the "
            "inputs. Lengthen optim.warmup or lower optim.lr."
        ]

    def health(self, metrics: Mapping[str, float]) -> Health | None:
        """Whether the loss has left the plateau on which all inputs have one embedding."""
        if not metrics.keys() >= {"loss", "ln_b"}:
            return None
        loss, blind = metrics["loss"], self.blind_loss(metrics)
        below = 100 * (1 - loss / blind) if blind else 0.0
        side = "below" if below >= 0 else "above"
        light = Light(
            "plateau",
            "Fails when all inputs have much the same embedding, where the gradient vanishes: the loss stays at that "
            "of a blind guess.",
            f"The loss is {loss:.3f} nats, {abs(below):.1f} % {side} the {blind:.3f} of a blind "
            f"guess; a model that learns is more than {100 * self.plateau_share:g} % below.",
            max(0.0, below / 100),
            self.plateau_share,
            "" if blind else "A batch of one pair leaves nothing to guess.",
        )
        return Health("A contrastive loss can rest at that of a blind guess before it learns, or for ever.", (light,))

    def describe(self, model: ModelConfig) -> str:
        """The shared embedding space."""
        return f"embeddings of images and texts in one space of {model.embed} dimensions"


@dataclasses.dataclass(frozen=True)
class Clip(Contrastive):
    """Config group `objective.clip`: options of `losses.contrastive.softmax`."""

    title: ClassVar[str] = "CLIP"
    max_scale: ClassVar[float] = 100.0  # arXiv 2103.00020, section 2.5

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())

    @property
    def plateau_share(self) -> float:
        """The share, smaller for smoothed targets, which leave less to learn."""
        return PLATEAU_SHARE * (1 - self.label_smoothing)

    def progress(self, metrics: Mapping[str, float]) -> str:
        """The loss beside ln b, that of a uniform guess."""
        return f"{metrics['loss']:.3f} (ln b {metrics['ln_b']:.2f})" if "loss" in metrics else ""

    def curves(self) -> tuple[Curve, ...]:
        """The curves of a contrastive loss, with ln b beside the loss."""
        loss, *others = super().curves()
        note = "ln b, with b the batch size, is the loss of a guess that does not depend on the inputs."
        return (dataclasses.replace(loss, levels=(Level("ln b", "ln_b"),), note=note), *others)
