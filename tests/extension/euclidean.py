"""Points instead of directions: images and texts are compared by Euclidean distance."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.core.fields import at_least, key
from xclip_jax.models.heads import Head
from xclip_jax.objectives import Similarity, Term


class Euclidean(Similarity):
    """The negative distance of two points; a class is at the mean of its prompts."""

    name = "euclidean"
    output = "point"

    def scores(self, img, txt):
        """See `Similarity.scores`."""
        return {"": -np.sqrt(((img[:, None] - txt) ** 2).sum(axis=2))}


@dataclasses.dataclass(frozen=True)
class Points(Term):
    """Softmax contrastive loss of negative distances."""

    title: ClassVar[str] = "points"

    size: int = key(4, "dimensions of a point", at_least(1))

    @property
    def similarity(self):
        """The distance that it trains."""
        return Euclidean()

    def heads(self, model, vocab):
        """A linear map of each tower's features."""
        return {
            f"points_{tower}": Head(nn.Dense(self.size), tower, f"point_{tower}", flops=2 * self.size * width)
            for tower, width in model.widths.items()
        }

    def __call__(self, out, teacher, state, batch, *, chunk=0):
        """See `Term.__call__`."""
        difference = out["point_img"][:, None] - out["point_txt"]  # (b, b, size)
        logits = -jnp.sqrt((difference**2).sum(axis=2) + 1e-6)
        labels = jnp.arange(len(logits))
        loss = sum(optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)) / 2
        return loss, {"loss": loss}, {}
