"""Matryoshka embeddings: the first dimensions are embeddings too, by a term in a file outside the package.

config.objective.name = "matryoshka"
config.objective.terms = {"clip": 1.0, "nested": 1.0}
config.objective.plugins = {"nested": {"type": "examples.matryoshka:Nested", "dims": (64, 128, 256)}}

Source: Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from xclip_jax import losses
from xclip_jax.core.fields import Check, choice, key
from xclip_jax.models.heads import Heads, l2_normalize
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import TERMS, Curve, Term
from xclip_jax.objectives.similarity import CosineSimilarity, Similarity
from xclip_jax.objectives.term import Arrays, LossConfig, Result

SCALARS = {"clip": ("scale",), "siglip": ("scale", "bias")}
RISING = Check("rising numbers from 1 on", lambda dims: min(dims, default=0) > 0 and list(dims) == sorted(set(dims)))


@dataclasses.dataclass(frozen=True)
class Nested(Term):
    """Sum of contrastive losses, each of embeddings cut to their first dimensions and normalised again.

    The whole embedding has its own term, "clip" or "siglip", whose heads, scale and bias this term shares. Options of
    that term, such as label smoothing, have no effect here.
    """

    title: ClassVar[str] = "nested"

    dims: tuple[int, ...] = key((64, 128, 256), "sizes of the cut embeddings", RISING)
    form: str = key("clip", "loss of a size", choice(SCALARS))

    @property
    def similarity(self) -> Similarity:
        """Compare the whole embeddings, also if the weight of their own term is 0."""
        return CosineSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Return the heads of the whole embedding."""
        return TERMS[self.form]().heads(model, vocab)

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        loss_of = getattr(losses, self.form)
        scalars = [out[name] for name in SCALARS[self.form]]
        metrics: dict[str, Any] = {}
        for size in self.dims:
            z_img, z_txt = (l2_normalize(out[name][:, :size]) for name in ("z_img", "z_txt"))
            loss, of_size = loss_of(z_img, z_txt, *scalars, chunk=chunk)
            metrics |= {f"loss_{size}": loss, f"acc_img_{size}": of_size["acc_img"]}
        total: Any = sum(metrics[f"loss_{size}"] for size in self.dims)
        return total, metrics | {"loss": total}, {}

    def conflicts_with(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """Yield a fault of a size that cuts nothing."""
        if self.dims[-1] >= model.embed:
            yield f"model.embed is {model.embed}; set it above {self.dims[-1]}, the largest of the plugin's dims"

    def flops(self, model: ModelConfig, batch: int) -> float:
        """Return the FLOPs of all similarities."""
        return 2.0 * batch * sum(self.dims)

    def curves(self) -> tuple[Curve, ...]:
        """Return charts of the loss and the accuracy of each size."""
        of_losses, of_accuracies = (
            tuple((f"{name}_{size}", f"first {size}") for size in self.dims) for name in ("loss", "acc_img")
        )
        return (
            Curve("Loss of the first dimensions", of_losses, "nats"),
            Curve("Image to text within the batch, by the first dimensions", of_accuracies, "%"),
        )
