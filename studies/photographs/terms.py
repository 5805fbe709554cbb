"""Objective terms of controls: a second contrastive head, SuperCLIP's tokens over only the common ones, idle heads.

Each head costs about as much as a cluster head.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from examples.superclip import Tokens
from xclip_jax.models.heads import ClusterHead, Head, Heads, Scalar, l2_normalize
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.similarity import CosineSimilarity
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
        return super().heads(model, len(common_tokens()))

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, jax.Array]:
        return super().initial_state(model, len(common_tokens()))

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        known = common_tokens()
        classes = np.zeros(known.max() + 1, np.int32)
        classes[known] = np.arange(len(known))
        text = jnp.asarray(classes).at[batch["text"]].get(mode="fill", fill_value=0)
        return super().__call__(out, teacher, state, {**batch, "text": text}, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class FixedHead(Nclip):
    """Cluster heads that learn and teach nothing, but are read like nCLIP's.

    Weight decay still shrinks their kernels, in the study's runs to 0.85 of their initial values.
    """

    title: ClassVar[str] = "fixed cluster head"

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Return a loss of 0 with nCLIP's metrics, see `Term.__call__`."""
        _, metrics, state = super().__call__(out, teacher, state, batch, chunk=chunk)
        return jnp.zeros(()), metrics, state


class DetachedClusters(ClusterHead):
    """`ClusterHead` without a gradient for its inputs."""

    def __call__(self, h: jax.Array, **options: Any) -> Any:
        return super().__call__(jax.lax.stop_gradient(h), **options)


@dataclasses.dataclass(frozen=True)
class DetachedHead(Nclip):
    """nCLIP's loss of cluster heads, which does not train the towers."""

    title: ClassVar[str] = "detached cluster head"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        module = DetachedClusters(**dataclasses.asdict(model.cluster_head), dtype=jnp.dtype(model.dtype))
        heads = super().heads(model, vocab).items()
        return {name: dataclasses.replace(head, module=module) for name, head in heads}


class UnitHead(ClusterHead):
    """`ClusterHead` with outputs of unit length."""

    def __call__(self, h: jax.Array, **options: Any) -> Any:
        logits: Any = super().__call__(h, **options)
        return l2_normalize(logits)


class SecondSimilarity(CosineSimilarity):
    """The cosine of outputs of the second head."""

    name: ClassVar[str] = "second"
    output: ClassVar[str] = "second"
    scale: ClassVar[str | None] = "second_scale"


@dataclasses.dataclass(frozen=True)
class SecondHead(Clip):
    """A second contrastive loss (arXiv 2103.00020) on MLP heads of the size of cluster heads: a control [ours]."""

    title: ClassVar[str] = "second contrastive head"

    @property
    def similarity(self) -> SecondSimilarity:
        return SecondSimilarity()

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        module = UnitHead(**dataclasses.asdict(model.cluster_head), dtype=jnp.dtype(model.dtype))
        heads: dict[str, Head | Scalar] = {
            "second_log_scale": Scalar("second_scale", math.log(self.initial_scale), jnp.exp)
        }
        for tower, head in zip(self.towers, Nclip().heads(model, vocab).values(), strict=True):
            name = f"second_{tower}"
            heads[name] = dataclasses.replace(head, module=module, output=name, options=("train",))
        return heads

    def constrain(self, params: Any) -> Any:
        return params | {"second_log_scale": jnp.minimum(params["second_log_scale"], math.log(self.max_scale))}

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        second = {"z_img": out["second_img"], "z_txt": out["second_txt"], "scale": out["second_scale"]}
        return super().__call__(second, teacher, state, batch, chunk=chunk)
