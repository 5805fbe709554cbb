"""nCLIP's loss over the global batch, its collapse alarms and what to do about them.

Each modality is projected to a distribution over k clusters that is the pseudo-label of the other, without
negatives [paper]; a sharpness and a smoothness regulariser hold off the trivial solutions [note]. The targets'
form, their balancing and all default weights are [ours].

With p, q the softmax of image and text logits over tau, a hat for targets and H for (cross-)entropy in nats:

    align      = 1/2 [ mean_i H(p^_i, q_i) + mean_i H(q^_i, p_i) ]
    sharpness  = 1/2 [ mean_i H(p_i) + mean_i H(q_i) ]     minimised: each pair commits to few clusters
    smoothness = 1/2 [ H(mean_i p_i) + H(mean_i q_i) ]     maximised: the batch uses all clusters
    loss       = align + lambda_sharp * sharpness - lambda_smooth * smoothness

The means run over the global batch. Smoothness does not decompose over devices or microbatches: under plain
`jax.jit` with a sharded batch XLA inserts the collectives, and an average of per-device losses is a different loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xclip_jax.logits import Factors, Logits
from xclip_jax.parallel.sharding import map_rows

Metrics = dict[str, jax.Array]

TARGETS = ("detach", "joint", "ema")
BALANCES = ("none", "center", "sinkhorn")
SINKHORN_ITERATIONS = 3

# Thresholds of `diagnose` [ours], read off the trials that chose the defaults (batch 256, k 1024, so ln b = 5.5).
# Stuck runs had 0.12-0.2 nats of mutual information, 2-4 % of ln b; the slowest run that trained had 0.6, 11 %.
FLAT_SHARE = 0.06
# The run with few clusters (14 of 1024) had H(mean) = 3.1, 56 % of ln b; smooth runs stand near or above ln b.
FEW_CLUSTERS_SHARE = 0.7
# Sharp: the entropy of single predictions is at most this share of their mean's; a fresh model has nearly 1.
SHARP_SHARE = 0.6
# The run that disagreed had 1 % equal argmax, chance being 0.5 %; counted above chance, as a share of what is left.
AGREEMENT_ABOVE_CHANCE = 0.05


def nclip(
    s_img: Logits,
    s_txt: Logits,
    *,
    target: str = "detach",
    tau: ArrayLike = 1.0,
    target_tau: ArrayLike | None = None,
    sharpness: ArrayLike = 1.0,
    smoothness: ArrayLike = 2.0,
    balance: str = "none",
    teacher_img: Logits | None = None,
    teacher_txt: Logits | None = None,
    center_img: jax.Array | None = None,
    center_txt: jax.Array | None = None,
    chunk: int = 0,
) -> tuple[jax.Array, Metrics]:
    """nCLIP's loss; the module's docstring has the formulas. Defaults are [ours].

    Args:
        s_img, s_txt: cluster logits of the global batch, shape (b, k) each, row i a pair; any float type, or `Factors`.
        target: "detach" (targets from the logits, no gradient), "joint" (gradient to both sides) or "ema" (targets
            from the teacher's logits, no gradient). [ours]
        tau: temperature of p and q. target_tau: temperature of the targets, None for tau.
        sharpness, smoothness: the weights lambda_sharp and lambda_smooth.
        balance: how targets are balanced [ours]: "none", "center" (a center is subtracted from the target logits) or
            "sinkhorn" (see `sinkhorn`).
        teacher_img, teacher_txt: teacher logits, shape (b, k); exactly with target "ema".
        center_img, center_txt: centers, shape (k,), from `update_center`; exactly with balance "center".
        chunk: pairs of the global batch to take at a time, 0 for all. Logits and distributions of more pairs are then
            never in memory, in the backward pass neither; they are given as `Factors`. The value is the same.

    Returns:
        The loss (fp32 scalar, nats) and fp32 scalar metrics: "loss", "align", "sharpness", "smoothness" (unweighted),
        "agreement" (share of pairs whose image and text have one argmax), "ln_k", "ln_b", and with the suffixes _img
        and _txt "entropy", "marginal_entropy", "mutual_information" (their difference, at most the smaller of ln b
        and ln k) and "clusters" (how many clusters are somebody's argmax in the batch).

    Raises:
        ValueError: unknown target or balance; a teacher or center that is missing, or given where it is unused; a
            chunk that does not divide the batch, or with balance "sinkhorn", which normalises over the whole batch.
        AssertionError: shapes other than the above.
    """
    _check(s_img, s_txt, target, balance, (teacher_img, teacher_txt), (center_img, center_txt))
    b, k = s_img.shape
    if chunk and (b % chunk or balance == "sinkhorn"):
        raise ValueError(f"chunk={chunk} must divide the batch of {b}, with a balance other than 'sinkhorn'")
    given = {"s_img": s_img, "s_txt": s_txt, "teacher_img": teacher_img, "teacher_txt": teacher_txt}
    given = {name: value for name, value in given.items() if value is not None}
    centers = {"img": center_img, "txt": center_txt}
    options = {
        "target": target,
        "balance": balance,
        "tau": tau,
        "target_tau": tau if target_tau is None else target_tau,
    }
    if chunk:
        # Each kind of array alone: a part of the batch has its own x, and the kernels of all.
        shared = ({name: (value.kernel, value.bias) for name, value in given.items()}, centers)

        def part(shared: Any, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
            kernels, centers = shared
            return _sums({name: Factors(x[name], *kernels[name]).logits() for name in x}, centers, **options)

        sums = map_rows(part, shared, {name: value.x for name, value in given.items()}, b // chunk, stack=True)
    else:
        whole = {name: v.logits() if isinstance(v, Factors) else v.astype(jnp.float32) for name, v in given.items()}
        sums = jax.tree.map(lambda x: x[None], _sums(whole, centers, **options))
    align = jnp.sum(sums["align"]) / b
    alarms = _alarms("img", sums, b) | _alarms("txt", sums, b)
    sharp = 0.5 * (alarms["entropy_img"] + alarms["entropy_txt"])
    smooth = 0.5 * (alarms["marginal_entropy_img"] + alarms["marginal_entropy_txt"])
    loss = align + sharpness * sharp - smoothness * smooth
    return loss, {
        "loss": loss,
        "align": align,
        "sharpness": sharp,
        "smoothness": smooth,
        "agreement": jnp.sum(sums["agree"]) / b,
        "ln_k": jnp.log(jnp.float32(k)),
        "ln_b": jnp.log(jnp.float32(b)),
        **alarms,
    }


def sinkhorn(logits: jax.Array, tau: ArrayLike = 1.0, iterations: int = SINKHORN_ITERATIONS) -> jax.Array:
    """Log of balanced assignments: exp(logits / tau) with columns and rows normalised in turn, rows last.

    After SwAV (arXiv 2006.09882): rows sum to 1 exactly, columns to b / k as nearly as the iterations reach.

    Args:
        logits: shape (b, k), of the global batch.
        tau: temperature. iterations: rounds of columns, then rows.

    Returns:
        Log-probabilities, shape (b, k), fp32. Log space: exp(logits / tau) would overflow at small tau.
    """
    log_a = logits.astype(jnp.float32) / tau
    for _ in range(iterations):
        # Columns are brought to 1, not b / k: the constant cancels in the rows' turn.
        log_a = jax.nn.log_softmax(jax.nn.log_softmax(log_a, axis=0), axis=1)
    return log_a


def update_center(center: jax.Array, target_logits: Logits, momentum: float = 0.9) -> jax.Array:
    """Running mean of target logits, after DINO (arXiv 2104.14294), for the next step's balance "center".

    Args:
        center: shape (k,), zeros at the start.
        target_logits: what targets are made of (the teacher's logits with target "ema"), shape (b, k), global batch.
        momentum: the share kept of the old center.

    Returns:
        The new center, shape (k,), fp32, without gradient.

    Raises:
        AssertionError: if the shapes are not (k,) and (b, k).
    """
    chex.assert_shape(center, target_logits.shape[1:])
    if isinstance(target_logits, Factors):  # the mean of linear logits is the logits of the mean
        x = jnp.mean(target_logits.x.astype(jnp.float32), axis=0, keepdims=True)
        mean = target_logits.replace(x=x).logits()[0]
    else:
        chex.assert_rank(target_logits, 2)
        mean = jnp.mean(target_logits.astype(jnp.float32), axis=0)
    return jax.lax.stop_gradient(momentum * center.astype(jnp.float32) + (1 - momentum) * mean)


def effective_rank(h: jax.Array) -> jax.Array:
    """Effective number of directions in which features vary over the batch: (tr C)^2 / tr(C^2), C their covariance.

    This is the participation ratio, the exponential of the Renyi-2 entropy of C's normalised spectrum, and a lower
    bound of Roy and Vetterli's effective rank (EUSIPCO 2007), which takes Shannon's entropy and so needs the spectrum
    itself. Here one matrix product suffices, of the smaller of the two Gram matrices.

    Args:
        h: features, shape (b, d), of the global batch; any float type.

    Returns:
        fp32 scalar between 1 and min(b - 1, d), without gradient; 0 if all features are equal up to rounding.

    Raises:
        AssertionError: if h is not of rank 2.
    """
    chex.assert_rank(h, 2)
    h = jax.lax.stop_gradient(h).astype(jnp.float32)
    centred = h - jnp.mean(h, axis=0)
    trace = jnp.sum(centred**2)
    # Equal features leave the mean's rounding error, a spurious rank of 1: relative 1e-6 at worst, squared.
    varies = trace > 1e-11 * jnp.sum(h**2)
    unit = centred / jnp.sqrt(jnp.where(varies, trace, 1.0))
    small = unit.T if h.shape[1] <= h.shape[0] else unit
    gram = jnp.matmul(small, small.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.where(varies, 1.0 / jnp.sum(jnp.where(varies, gram, 1.0) ** 2), 0.0)


def diagnose(metrics: Mapping[str, float], *, k: int, b: int) -> list[str]:
    """Plain warnings, each with its remedy, if the alarms of `nclip` show one of the three known failures.

    The failures [ours]: flat (predictions tell pairs nothing apart), few clusters, and disagreement (image and text
    commit, to different clusters). A model's first hundred steps are always flat: judge later.

    Args:
        metrics: the metrics of `nclip`, as Python floats; only the alarms are read. NaN raises no warning.
        k: number of clusters. b: size of the global batch.

    Returns:
        One message per failure; empty if healthy.

    Raises:
        KeyError: if an alarm is missing.
    """
    if min(b, k) == 1:  # no information to lose
        return []
    ceiling = min(math.log(b), math.log(k))
    information, name = min((metrics[f"mutual_information_{m}"], m) for m in ("img", "txt"))
    marginal, narrow = min((metrics[f"marginal_entropy_{m}"], m) for m in ("img", "txt"))
    chance = 1 / max(metrics["clusters_img"], metrics["clusters_txt"], 1)
    sharp = any(metrics[f"entropy_{m}"] < SHARP_SHARE * metrics[f"marginal_entropy_{m}"] for m in ("img", "txt"))
    above_chance = metrics["agreement"] - chance
    warnings = []
    # One collapsed cluster also has no mutual information, but flat's remedy (sharpen) would be the wrong one.
    if marginal < FEW_CLUSTERS_SHARE * ceiling:
        warnings.append(
            f"few clusters: H(mean) of {narrow} is {marginal:.2f} nats of {ceiling:.2f} possible, with "
            f"{metrics[f'clusters_{narrow}']:.0f} of {k} clusters in use. Raise objective.nclip.smoothness (2 where "
            "objective.nclip.sharpness is 1)."
        )
    elif information < FLAT_SHARE * ceiling:
        warnings.append(
            f"flat: mutual information of {name} is {information:.3f} nats of {ceiling:.2f} possible. Past the first "
            "hundred steps, raise objective.nclip.sharpness to 1 and keep objective.nclip.smoothness above it (2), "
            "raise objective.nclip.tau to 1, and set model.cluster_head.last_norm to false."
        )
    if sharp and above_chance < AGREEMENT_ABOVE_CHANCE * (1 - chance):
        warnings.append(
            f"disagreement: predictions are sharp, yet image and text agree on {100 * metrics['agreement']:.1f} % of "
            f"pairs (chance is about {100 * chance:.1f} %). Lower optim.lr or objective.nclip.sharpness, and set "
            "model.cluster_head.last_norm to false."
        )
    return warnings


def _check(
    s_img: Logits,
    s_txt: Logits,
    target: str,
    balance: str,
    teachers: tuple[Logits | None, Logits | None],
    centers: tuple[jax.Array | None, jax.Array | None],
) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; valid are {', '.join(TARGETS)}")
    if balance not in BALANCES:
        raise ValueError(f"unknown balance {balance!r}; valid are {', '.join(BALANCES)}")
    for name, option, needed, arrays in (
        ("teacher", "target='ema'", target == "ema", teachers),
        ("center", "balance='center'", balance == "center", centers),
    ):
        if any((array is not None) != needed for array in arrays):
            verb = "needs both" if needed else "alone uses"
            raise ValueError(f"{option} {verb} {name}_img and {name}_txt (here target={target!r}, balance={balance!r})")
    if not isinstance(s_img, Factors):
        chex.assert_rank(s_img, 2)
    chex.assert_equal(len({x.shape for x in (s_img, s_txt, *teachers) if x is not None}), 1)
    chex.assert_shape([x for x in centers if x is not None], s_img.shape[1:])


def _target(
    s: jax.Array,
    teacher: jax.Array | None,
    center: jax.Array | None,
    target: str,
    balance: str,
    tau: ArrayLike,
) -> jax.Array:
    """Target probabilities (b, k) of one modality, from its fp32 logits or its teacher's."""
    logits = s if teacher is None else teacher.astype(jnp.float32)
    if target != "joint":
        logits = jax.lax.stop_gradient(logits)
    if center is not None:
        logits = logits - jax.lax.stop_gradient(center.astype(jnp.float32))
    log_target = sinkhorn(logits, tau) if balance == "sinkhorn" else jax.nn.log_softmax(logits / tau)
    return jnp.exp(log_target)


def _sums(
    s: Mapping[str, jax.Array],
    centers: Mapping[str, jax.Array | None],
    *,
    target: str,
    balance: str,
    tau: ArrayLike,
    target_tau: ArrayLike,
) -> dict[str, jax.Array]:
    """What the loss needs of some rows of the batch: their sums, and for each cluster the log of its summed mass."""
    log_p, p_hat, found = {}, {}, {}
    for m in ("img", "txt"):
        logits = s[f"s_{m}"]
        log_p[m] = jax.nn.log_softmax(logits / tau)
        p_hat[m] = _target(logits, s.get(f"teacher_{m}"), centers[m], target, balance, target_tau)
        found[f"entropy_{m}"] = -jnp.sum(jnp.exp(log_p[m]) * log_p[m])
        # The mean's logarithm by log-sum-exp: log(mean(p)) has an infinite gradient where a probability underflows.
        found[f"log_mass_{m}"] = jax.nn.logsumexp(log_p[m], axis=0)
        # A comparison and a reduction: a scatter of sharded indices would cost a gather over devices.
        found[f"used_{m}"] = jnp.any(jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(logits.shape[1]), axis=0)
    found["align"] = -0.5 * jnp.sum(p_hat["img"] * log_p["txt"] + p_hat["txt"] * log_p["img"])
    same = jnp.argmax(s["s_img"], -1) == jnp.argmax(s["s_txt"], -1)
    return found | {"agree": jnp.sum(same, dtype=jnp.float32)}


def _alarms(name: str, sums: Mapping[str, jax.Array], b: int) -> Metrics:
    """Entropies (nats) and clusters in use of one modality, from `_sums` of all parts of the batch."""
    log_mean = jax.nn.logsumexp(sums[f"log_mass_{name}"], axis=0) - jnp.log(jnp.float32(b))
    entropy = jnp.sum(sums[f"entropy_{name}"]) / b
    marginal = -jnp.sum(jnp.exp(log_mean) * log_mean)
    return {
        f"entropy_{name}": entropy,
        f"marginal_entropy_{name}": marginal,
        f"mutual_information_{name}": marginal - entropy,
        f"clusters_{name}": jnp.sum(jnp.any(sums[f"used_{name}"], axis=0), dtype=jnp.float32),
    }
