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
from xclip_jax.objectives.base import Curve, LossConfig, Result, Term

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
    """A loss of all pairs of the batch: what the softmax and the sigmoid have in common."""

    similarity: ClassVar[str | None] = "cosine"
    form: ClassVar[str] = "softmax"  # function of `losses.contrastive` and of `losses.ring`
    outputs: ClassVar[tuple[str, ...]] = ("z_img", "z_txt", "scale")  # its arguments

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Projections of both towers and the logit scale."""
        dtype = jax.numpy.dtype(model.dtype)
        return contrastive_heads(model.embed, model.widths, scale_init=model.scale_init, dtype=dtype)

    def in_form(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """Around a ring of devices where `loss.impl` says so."""
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
        """The loss beside that of a blind guess."""
        return f"{metrics['loss']:.3f} (ln b {metrics['ln_b']:.2f})" if "loss" in metrics else ""

    def flops(self, model: ModelConfig, batch: int) -> float:
        """The comparison of a sample with the batch."""
        return 2 * batch * model.embed

    def curves(self) -> tuple[Curve, ...]:
        """Loss, accuracy within the batch, scale."""
        return (
            Curve(f"{self.title} loss", (("loss", "contrastive"),), "nats", ("ln_b", "ln b")),
            Curve(
                "Own partner is the best in the batch",
                (("acc_img", "image to text"), ("acc_txt", "text to image")),
                "%",
            ),
            Curve("Logit scale", (("scale", "scale"),)),
        )


@dataclasses.dataclass(frozen=True)
class Clip(Contrastive):
    """Config group `objective.clip`: options of `losses.contrastive.softmax`."""

    title: ClassVar[str] = "CLIP"

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())
