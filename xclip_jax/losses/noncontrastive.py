"""nCLIP's loss over the global batch.

Each modality is projected to a distribution over k clusters, which is the pseudo-label of the other modality, without
negatives [paper]; a sharpness and a smoothness regulariser prevent the trivial solutions [note]. The form of the
targets and all default weights are [ours].

With p, q the softmax of image and text logits over tau, a hat for targets and H for (cross-)entropy in nats:

    align      = 1/2 [ mean_i H(p^_i, q_i) + mean_i H(q^_i, p_i) ]
    sharpness  = 1/2 [ mean_i H(p_i) + mean_i H(q_i) ]     minimised: each pair commits to few clusters
    smoothness = 1/2 [ H(mean_i p_i) + H(mean_i q_i) ]     maximised: the batch uses all clusters
    loss       = align + lambda_sharp * sharpness - lambda_smooth * smoothness

The means run over the global batch. Smoothness does not decompose over devices or microbatches.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xclip_jax.losses.explicit_axes import on_any_mesh
from xclip_jax.parallel.sharding import FactoredLogits, Logits, argmax, constrain, map_microbatches

__all__ = ["effective_rank", "nclip"]

Metrics = dict[str, jax.Array]
Sums = Mapping[str, jax.Array]

MODALITIES = ("img", "txt")
TARGETS = ("detach", "joint", "ema")
TAU = 0.5  # [ours], the best of nCLIP's settings in the study, docs/study.md


@on_any_mesh
def nclip(
    s_img: Logits,
    s_txt: Logits,
    *,
    target: str = "detach",
    tau: ArrayLike = TAU,
    sharpness: ArrayLike = 1.0,
    smoothness: ArrayLike = 2.0,
    teacher_img: Logits | None = None,
    teacher_txt: Logits | None = None,
    chunk: int = 0,
) -> tuple[jax.Array, Metrics]:
    """Return nCLIP's loss and its metrics; the module's docstring has the formulas. Defaults are [ours].

    Args:
        s_img, s_txt: cluster logits of the global batch, (b, k), row i a pair; any float type, or `FactoredLogits`.
        target: "detach" (targets from the logits, no gradient), "joint" (gradient to both sides) or "ema" (targets
            from the teacher's logits, no gradient). [ours]
        tau: temperature of p, q and the targets.
        sharpness, smoothness: the weights lambda_sharp and lambda_smooth.
        teacher_img, teacher_txt: teacher logits, shape (b, k); required for target "ema", not allowed otherwise.
        chunk: pairs of the global batch to process at a time, 0 for all. Memory never holds logits and distributions of
            more pairs, not even in the backward pass. It needs `FactoredLogits`; the value is the same.

    Returns:
        The loss (fp32 scalar, nats) and fp32 scalar metrics: "loss", "align", "sharpness", "smoothness" (unweighted),
        "agreement" (fraction of pairs whose image and text have the same argmax), "ln_k", "ln_b", and with the suffixes
        _img and _txt "entropy", "marginal_entropy", "mutual_information" (their difference, at most the smaller of
        ln b and ln k) and "clusters" (number of clusters that are the argmax of a row).

    Raises:
        ValueError: options contradict each other.

    Example:
        >>> import jax.numpy as jnp
        >>> from xclip_jax import losses
        >>> s_img = 20 * jnp.eye(4)  # four pairs, each sure of its own cluster
        >>> loss, metrics = losses.nclip(s_img, s_img)
        >>> f"{metrics['mutual_information_img']:.2f} nats, {metrics['clusters_img']:.0f} clusters"
        '1.39 nats, 4 clusters'
    """
    logits = {"s_img": s_img, "s_txt": s_txt, "teacher_img": teacher_img, "teacher_txt": teacher_txt}
    logits = {name: value for name, value in logits.items() if value is not None}
    _check(logits, target, chunk)
    b, k = s_img.shape
    sums = _sums_of_batch(logits, target, tau, chunk)
    metrics = _metrics(sums, b, k)
    loss = metrics["align"] + sharpness * metrics["sharpness"] - smoothness * metrics["smoothness"]
    return loss, {"loss": loss} | metrics


def _check(logits: dict[str, Logits], target: str, chunk: int) -> None:
    b, k = logits["s_img"].shape
    if target not in TARGETS or any((f"teacher_{m}" in logits) != (target == "ema") for m in MODALITIES):
        raise ValueError(
            f"target is {target!r}; expected one of {TARGETS}, 'ema' with teacher_img and teacher_txt, others without"
        )
    chex.assert_equal({x.shape for x in logits.values()}, {(b, k)})
    if chunk and (b % chunk or not all(isinstance(x, FactoredLogits) for x in logits.values())):
        raise ValueError(f"chunk={chunk} needs FactoredLogits, and must divide the batch of {b}")


def _sums_of_batch(logits: dict[str, Logits], target: str, tau: ArrayLike, chunk: int) -> Sums:
    """Return the `_sums` of each chunk of the batch, stacked along a leading axis (chunks,)."""
    if not chunk:
        s = {name: x.logits() if isinstance(x, FactoredLogits) else x.astype(jnp.float32) for name, x in logits.items()}
        return jax.tree.map(lambda x: x[None], _sums(s, target, tau))
    factors: Any = logits
    kernels = {name: (value.kernel, value.bias) for name, value in factors.items()}

    def sums_of_chunk(kernels: Any, x: dict[str, jax.Array]) -> Sums:
        return _sums({name: FactoredLogits(x[name], *kernels[name]).logits() for name in x}, target, tau)

    rows = {name: value.x for name, value in factors.items()}
    num_chunks = logits["s_img"].shape[0] // chunk
    return map_microbatches(sums_of_chunk, kernels, rows, num_chunks, clusters=True)


def _sums(s: Mapping[str, jax.Array], target: str, tau: ArrayLike) -> Sums:
    """Return sums over rows of the batch for the loss, and the log of each cluster's summed probability."""
    log_p = {}
    p_hat = {}
    top = {}
    sums = {}
    for m in MODALITIES:
        logits = s[f"s_{m}"]
        log_p[m] = jax.nn.log_softmax(logits / tau)
        labels = s[f"teacher_{m}"] if target == "ema" else logits
        if target != "joint":
            labels = jax.lax.stop_gradient(labels)
        p_hat[m] = jnp.exp(jax.nn.log_softmax(labels / tau))
        sums[f"entropy_{m}"] = -jnp.sum(jnp.exp(log_p[m]) * log_p[m])
        # The mean's logarithm by log-sum-exp: log(mean(p)) has an infinite gradient if a probability underflows.
        sums[f"log_mass_{m}"] = jax.nn.logsumexp(log_p[m], axis=0)
        top[m] = argmax(logits, 1)
        clusters = constrain(jnp.arange(logits.shape[1]), "cluster")
        # A comparison and a reduction: a scatter of sharded indices would cost a gather over devices.
        sums[f"used_{m}"] = jnp.any(top[m][:, None] == clusters, axis=0)
    sums["align"] = -0.5 * jnp.sum(p_hat["img"] * log_p["txt"] + p_hat["txt"] * log_p["img"])
    return sums | {"agree": jnp.sum(top["img"] == top["txt"], dtype=jnp.float32)}


def _metrics(sums: Sums, b: int, k: int) -> Metrics:
    align = jnp.sum(sums["align"]) / b
    clusters = _cluster_metrics("img", sums, b) | _cluster_metrics("txt", sums, b)
    return {
        "align": align,
        "sharpness": 0.5 * (clusters["entropy_img"] + clusters["entropy_txt"]),
        "smoothness": 0.5 * (clusters["marginal_entropy_img"] + clusters["marginal_entropy_txt"]),
        "agreement": jnp.sum(sums["agree"]) / b,
        "ln_k": jnp.log(jnp.float32(k)),
        "ln_b": jnp.log(jnp.float32(b)),
        **clusters,
    }


def _cluster_metrics(m: str, sums: Sums, b: int) -> Metrics:
    """Return the entropies (nats) and the number of used clusters of modality `m`, "img" or "txt"."""
    log_mean = jax.nn.logsumexp(sums[f"log_mass_{m}"], axis=0) - jnp.log(jnp.float32(b))
    entropy = jnp.sum(sums[f"entropy_{m}"]) / b
    marginal = -jnp.sum(jnp.exp(log_mean) * log_mean)
    return {
        f"entropy_{m}": entropy,
        f"marginal_entropy_{m}": marginal,
        f"mutual_information_{m}": marginal - entropy,
        f"clusters_{m}": jnp.sum(jnp.any(sums[f"used_{m}"], axis=0), dtype=jnp.float32),
    }


@on_any_mesh
def effective_rank(h: jax.Array) -> jax.Array:
    """Return the effective number of directions in which features vary: (tr C)^2 / tr(C^2), with their covariance C.

    This is the participation ratio, a lower bound of Roy and Vetterli's effective rank (EUSIPCO 2007), which uses
    Shannon's entropy and therefore needs the spectrum. Here one matrix product suffices, for the smaller Gram matrix.

    Args:
        h: features, shape (b, d), of the global batch; any float type.

    Returns:
        fp32 scalar between 1 and min(b - 1, d), without gradient; 0 if all features are equal up to rounding.

    Example:
        >>> import jax.numpy as jnp
        >>> from xclip_jax.losses.noncontrastive import effective_rank
        >>> effective_rank(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        Array(2., dtype=float32)
    """
    h = jax.lax.stop_gradient(h).astype(jnp.float32)
    centred = h - jnp.mean(h, axis=0)
    trace = jnp.sum(centred**2)
    # If all features are equal, the mean's rounding error remains, of rank 1: relative 1e-6 at worst, squared.
    varies = trace > 1e-11 * jnp.sum(h**2)
    unit = centred / jnp.sqrt(jnp.where(varies, trace, 1.0))
    small = unit.T if h.shape[1] <= h.shape[0] else unit
    gram = jnp.matmul(small, small.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.where(varies, 1.0 / jnp.sum(jnp.where(varies, gram, 1.0) ** 2), 0.0)
