"""Objective terms of two controls: a second contrastive head, and SuperCLIP's tokens over only the common tokens.

Each head costs about as much as a cluster head.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from examples.superclip import Tokens, classify, initial_state
from xclip_jax.core.fields import fraction_below_one, key
from xclip_jax.losses import contrastive
from xclip_jax.models.heads import Classifier, ClusterHead, Head, Heads, Scalar, l2_normalize
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import Term
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.similarity import CosineSimilarity, unit
from xclip_jax.objectives.term import Arrays, Result

FILE = pathlib.Path(__file__).with_name("tokens.txt")


@functools.cache
def common_tokens() -> np.ndarray:
    """Return the commonest tokens of "clip" in the training titles, int (n,), the start of a text first."""
    return np.array(FILE.read_text().split(), int)


@dataclasses.dataclass(frozen=True)
class CommonTokens(Tokens):
    """`Tokens` over `common_tokens`; all others share the class of the start of a text, whose weight is always 0."""

    title: ClassVar[str] = "common tokens"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        width = model.widths["img"]
        classes = len(common_tokens())
        return {"tokens": Head(Classifier(classes, width**-0.5), "img", "tokens", flops=2 * classes * width)}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, jax.Array]:
        return initial_state(len(common_tokens()))

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        known = common_tokens()
        classes = np.zeros(int(known.max()) + 1, np.int32)
        classes[known] = np.arange(len(known))
        text = jnp.asarray(classes)[jnp.minimum(batch["text"], len(classes) - 1)]
        text = jnp.where(batch["text"] < len(classes), text, 0)
        return classify(out["tokens"], text, batch["text_end"], state)


class SecondSimilarity(CosineSimilarity):
    """The cosine of outputs of the second head, which are normalised first."""

    name: ClassVar[str] = "second"
    output: ClassVar[str] = "second"
    scale: ClassVar[str | None] = "second_scale"

    def rows(self, output: Any) -> Any:
        return unit(output)

    def scores(self, img: Any, txt: Any) -> dict[str, Any]:
        return super().scores(unit(img), txt)


@dataclasses.dataclass(frozen=True)
class SecondHead(Term):
    """A second contrastive loss (arXiv 2103.00020) on MLP heads of the size of cluster heads: a control [ours]."""

    title: ClassVar[str] = "second contrastive head"

    label_smoothing: float = key(0.0, "share of the target that is spread over the batch", fraction_below_one())

    @property
    def similarity(self) -> SecondSimilarity:
        return SecondSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        options = model.cluster_head
        module = ClusterHead(**dataclasses.asdict(options), dtype=jnp.dtype(model.dtype))
        heads: dict[str, Head | Scalar] = {
            "second_log_scale": Scalar("second_scale", math.log(Clip.initial_scale), jnp.exp)
        }
        for tower, width in model.widths.items():
            layers = [width] + [options.hidden] * options.layers + [options.clusters]
            flops = 2 * sum(a * b for a, b in itertools.pairwise(layers))
            heads[f"second_{tower}"] = Head(module, tower, f"second_{tower}", ("train",), flops)
        return heads

    def constrain(self, params: Any) -> Any:
        return params | {"second_log_scale": jnp.minimum(params["second_log_scale"], math.log(100.0))}

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        z_img, z_txt = (l2_normalize(out[f"second_{tower}"]) for tower in self.towers)
        smoothing = self.label_smoothing
        loss, metrics = contrastive.clip(z_img, z_txt, out["second_scale"], label_smoothing=smoothing, chunk=chunk)
        return loss, metrics, {}
