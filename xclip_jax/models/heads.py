"""Heads on the towers: CLIP's linear projection, nCLIP's cluster head, and the classifier for fine-tuning.

`TwoTowers` takes its heads as a mapping {name: Head or Scalar}, made by the terms of an objective.
"""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xclip_jax.core.fields import at_least, key
from xclip_jax.models.layers import ACTIVATIONS, NORM, dense, named
from xclip_jax.parallel.sharding import FactoredLogits, constrain

Array = jax.Array


def l2_normalize(x: Array) -> Array:
    """Normalise rows to unit length in fp32, (..., e) -> (..., e); an all-zero row stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


@dataclasses.dataclass(frozen=True)
class Head:
    """A module on the features (b, d) of one tower; its parameters have its name in the model."""

    module: nn.Module  # not bound to a parent
    input: str  # the tower, "img" or "txt"
    output: str  # key of its output in the result of `TwoTowers.project`
    options: tuple[str, ...] = ()  # its keyword arguments from `TwoTowers.project`, "train" and "logits"
    flops: float = 0.0  # FLOPs of one example's forward pass; a multiplication and an addition count as two


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A learned number, such as the logit scale; the parameter has its name in the model."""

    output: str  # key of the value in the result of `TwoTowers.project`
    initial: float  # initial value of the parameter
    transform: Callable[[Array], Array] | None = None  # parameter -> value


Heads = Mapping[str, Head | Scalar]


class Projection(nn.Module):
    """CLIP's linear projection and L2 normalisation, h (b, d) -> z (b, e) in fp32; CLIP uses no `bias`.

    With 0 features the projection is left out (SigLIP's images).
    """

    features: int
    dtype: DTypeLike = jnp.float32
    bias: bool = False

    @nn.compact
    def __call__(self, h: Array) -> Array:
        if self.features:
            std = h.shape[-1] ** -0.5
            linear = dense(self.features, ("embed", None), std=std, dtype=self.dtype, use_bias=self.bias, name="linear")
            h = linear(h)
        return l2_normalize(h)


class Classifier(nn.Module):
    """Linear classifier, features (b, d) -> fp32 logits (b, classes), near zero at first so that it is fitted first.

    It computes in fp32 whatever the towers' dtype: bf16 would round numeric labels to 8 bits.
    """

    classes: int
    std: float

    @nn.compact
    def __call__(self, h: Array) -> Array:
        return dense(self.classes, ("embed", None), std=self.std, dtype=jnp.float32, name="linear")(h)


@dataclasses.dataclass(frozen=True)
class ClusterHeadConfig:
    """Config group `model.cluster_head`; see `ClusterHead`."""

    clusters: int = key(32768, "k, number of clusters", at_least(1))
    hidden: int = key(4096, "hidden width of the MLP", at_least(1))
    layers: int = key(1, "hidden layers; 0 for a linear head", at_least(0))


class ClusterHead(nn.Module):
    """nCLIP's head [ours, after TWIST, arXiv 2110.07402]: h (b, d) -> cluster logits s (b, k) in fp32.

    Linear, BatchNorm and GELU, `layers` times, then a linear map to `clusters` logits. Under `jax.jit` the batch of
    BatchNorm is the global batch, whatever the mesh. With `logits` false the loss applies the last map, see
    `FactoredLogits`. For the fields see `ClusterHeadConfig`.
    """

    clusters: int = 32768
    hidden: int = 4096
    layers: int = 1
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Array, *, train: bool = False, logits: bool = True) -> Array | FactoredLogits:
        x = h
        for i in range(self.layers):
            # BatchNorm subtracts the mean, so a bias before it would do nothing. The hidden width is not split over the
            # mesh's model axis: two ("fsdp", "model") kernels in a row with statistics over the batch after them get
            # wrong gradients from XLA (jaxlib 0.10.2) if data, fsdp and model are all above 1.
            std = x.shape[-1] ** -0.5
            x = dense(self.hidden, ("embed", None), std=std, dtype=self.dtype, use_bias=False, name=f"hidden_{i}")(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, **NORM, name=f"norm_{i}")
            x = ACTIVATIONS["gelu"](norm(x)).astype(self.dtype)
        kernel, bias = _Clusters(self.clusters, name="clusters")(x.shape[-1])
        if not logits:
            return FactoredLogits(x, kernel, bias)
        # A split kernel is gathered in the dtype of the product.
        return FactoredLogits(x, constrain(kernel.astype(self.dtype), None, "cluster"), bias).logits()


class _Clusters(nn.Module):
    """Parameters of a linear map, without applying it: kernel (d, clusters) and bias."""

    clusters: int

    @nn.compact
    def __call__(self, d: int) -> tuple[Array, Array]:
        init = named(nn.initializers.normal(d**-0.5), "hidden", "cluster")
        kernel = self.param("kernel", init, (d, self.clusters))
        return kernel, self.param("bias", named(nn.initializers.zeros, "cluster"), (self.clusters,))
