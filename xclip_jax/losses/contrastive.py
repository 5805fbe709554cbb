"""Contrastive losses over the global batch: CLIP's softmax and SigLIP's sigmoid.

With a `chunk` a loss compares that many texts at a time with all images, and the backward pass computes each chunk
again, so that memory never holds the logits of more texts (Inf-CL, arXiv 2410.17243). Value and gradient are the same.

Sources: Radford et al., arXiv 2103.00020 (softmax, called CLIP in nCLIP's paper [paper]); Zhai et al., arXiv 2303.15343
(sigmoid [ours]); Yang et al., arXiv 2204.03610 (UniCL: several positives [ours]); see also `robust`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xclip_jax.losses.explicit_axes import on_any_mesh
from xclip_jax.parallel.sharding import argmax, constrain

__all__ = ["clip", "robust", "siglip"]

Metrics = dict[str, jax.Array]
_LOG_ZERO = -1e30  # finite, and so with a gradient of 0


@on_any_mesh
def clip(
    z_img: jax.Array,
    z_txt: jax.Array,
    scale: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    keys: jax.Array | None = None,
    exists: jax.Array | None = None,
    q: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, Metrics]:
    """Return CLIP's loss: cross-entropy of the matching pair, image to text and text to image, averaged, in nats.

    With `keys`, for pairs that share a caption or an image, the target of pair i is 1 / n_i for each of the n_i pairs
    with its key, itself included (UniCL's bidirectional loss, equation 3; SupCon's L_out, arXiv 2004.11362).

    With `exists`, k wrong texts per pair, called negatives, follow the captions. The cross-entropy of image i is then
    -s_ii + ln(sum_j exp s_ij + sum_m exp s_im) of all captions j and existing negatives m of the batch. Negatives
    change neither the captions' cross-entropies nor any target (NegCLIP, arXiv 2210.01936).

    Args:
        z_img: image embeddings of the global batch, shape (b, e), L2-normalised; any float type.
        z_txt: text embeddings, shape (b, e), row i paired with row i of `z_img`; (b + b * k, e) with `exists`.
        scale: scalar, exp(log_scale): already exponentiated.
        label_smoothing: fraction of the target spread evenly over the batch (arXiv 1512.00567).
        keys: integers (b,) or (b, m); pairs with equal keys match each other. By default each pair matches itself.
        exists: whether each text exists, bool (b + b * k,): b captions, which do, then k negatives pair by pair.
        q: option of `robust`, which replaces the cross-entropy of each pair; for targets of one pair only.
        chunk: texts to compare with all images at a time, a divisor of b; 0 for all.

    Returns:
        The loss (fp32 scalar) and fp32 scalar metrics: "loss", "ln_b" (the loss of a blind guess), "acc_img" and
        "acc_txt" (fraction of images and of texts whose best match in the batch is their partner); "blind" (the loss
        of a blind guess) with `q` or negatives; "negatives" (number per image) and "acc_negatives" (fraction that
        matches its image less than the caption does).

    Example:
        >>> import jax.numpy as jnp
        >>> from xclip_jax import losses
        >>> z_img = jnp.eye(4)
        >>> loss, metrics = losses.clip(z_img, z_img, scale=1 / 0.07)
        >>> f"{loss:.6f} of ln b = {metrics['ln_b']:.2f}"
        '0.000002 of ln b = 1.39'
        >>> _, metrics = losses.clip(z_img, z_img[::-1], scale=1 / 0.07)  # all captions are mixed up
        >>> metrics["acc_img"]
        Array(0., dtype=float32)
    """
    check(z_img, z_txt, exists, scale)
    b = len(z_img)
    if chunk:
        others, in_chunks = _compare_in_chunks(_log_sums, chunk, exists, z_img, z_txt, scale, 0.0)
        img_to_txt = jax.nn.softplus(jax.nn.logsumexp(others["img"], axis=0))
        txt_to_img = jax.nn.softplus(others["txt"].reshape(-1)[:b])
    else:
        logits = jnp.asarray(scale, jnp.float32) * dot(z_img, z_txt)
        logits = logits if exists is None else jnp.where(exists, logits, _LOG_ZERO)
        # A masked sum, since jnp.diagonal gathers, which costs communication if the batch is sharded. It is subtracted
        # before the log-sum-exp, since a small loss would vanish in the rounding of two numbers as large as the scale.
        matching = jnp.sum(jnp.eye(b, len(z_txt)) * logits, axis=1)
        img_to_txt = jax.nn.logsumexp(logits - matching[:, None], axis=1)
        txt_to_img = jax.nn.logsumexp(logits[:, :b] - matching[None, :], axis=0)
    if q:
        img_to_txt, txt_to_img = (robust(x, q) for x in (img_to_txt, txt_to_img))
    loss = 0.5 * jnp.mean(img_to_txt + txt_to_img)
    if label_smoothing or keys is not None:
        loss = loss + target_margin(z_img, z_txt[:b], scale, label_smoothing, keys)
    metrics = {"loss": loss, **(in_chunks if chunk else _metrics(logits))}
    if exists is not None:
        metrics |= _of_negatives(z_img, z_txt, exists)
        ln_b = metrics["ln_b"]
        metrics["blind"] = 0.5 * (robust(ln_b + jnp.log1p(metrics["negatives"]), q) + robust(ln_b, q))
    elif q:
        metrics["blind"] = robust(metrics["ln_b"], q)
    return loss, metrics


def robust(cross_entropy: ArrayLike, q: float) -> jax.Array:
    """Return losses that tolerate wrong targets, (1 - p^q) / q, of cross-entropies -ln p in nats, of any shape.

    This is generalised cross-entropy (arXiv 1805.07836), at most 1 / q, for q from 0 to 1: q = 0 is its limit, -ln p,
    and q = 1 half of the mean absolute error. The derivative by the cross-entropy is p^q.

    Example:
        >>> from xclip_jax.losses.contrastive import robust
        >>> float(robust(100.0, q=0.5))  # the most that a wrong caption costs
        2.0
    """
    x = jnp.asarray(cross_entropy)
    return _missing(q * x) / q if q else x


@jax.custom_jvp
def _missing(x: jax.Array) -> jax.Array:
    """Return 1 - exp(-x), exact for values near 0 and for derivatives far from it."""
    return -jnp.expm1(-x)


@_missing.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # JAX's derivative of expm1 is expm1(-x) + 1, which is 0 if exp(-x) is below 6e-8.
    return _missing(*primals), jnp.exp(-primals[0]) * tangents[0]


def target_margin(
    z_img: jax.Array, z_txt: jax.Array, scale: ArrayLike, label_smoothing: float, keys: jax.Array | None
) -> jax.Array:
    """Return the increase of the cross-entropy by a spread target: mean matching logit minus mean target logit.

    It is the same in both directions. For the arguments see `clip`.
    """
    z_img, z_txt = (z.astype(jnp.float32) for z in (z_img, z_txt))
    scale = jnp.asarray(scale, jnp.float32)
    # The mean of all products is the product of the means, which needs no (b, b) logits.
    products = jnp.mean(jnp.sum(z_img * z_txt, axis=1)) - jnp.sum(jnp.mean(z_img, axis=0) * jnp.mean(z_txt, axis=0))
    smoothing = label_smoothing * (scale * products)
    if keys is None:
        return smoothing
    texts, counts = sum_over_equal(keys, z_txt)
    difference = z_txt - texts / counts[:, None]  # exactly 0 for a pair with a unique key
    margin = jnp.mean(jnp.sum(z_img * difference, axis=1))
    return smoothing + (1 - label_smoothing) * scale * margin


def sum_over_equal(keys: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return for each row i the sum of the rows of `x` (b, e) whose keys equal key i, and their number; both fp32.

    For `keys` see `clip`. A row with a unique key is returned unchanged.
    """
    keys = keys.reshape(len(keys), -1)
    order = jnp.lexsort(keys.T)
    changes = jnp.any(keys[order][1:] != keys[order][:-1], axis=1)
    groups = jnp.zeros(len(keys), jnp.int32).at[order[1:]].set(jnp.cumsum(changes, dtype=jnp.int32))
    sums = jax.ops.segment_sum(x.astype(jnp.float32), groups, num_segments=len(keys))
    counts = jax.ops.segment_sum(jnp.ones(len(keys)), groups, num_segments=len(keys))
    return sums[groups], counts[groups]


@on_any_mesh
def siglip(
    z_img: jax.Array,
    z_txt: jax.Array,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    keys: jax.Array | None = None,
    exists: jax.Array | None = None,
    chunk: int = 0,
) -> tuple[jax.Array, Metrics]:
    """Return SigLIP's loss: binary cross-entropy of each of the b * b pairs, summed and divided by b, in nats.

    The loss is -1/b sum_ij log sigmoid(y_ij (scale <z_img_i, z_txt_j> + bias)), with y = +1 for i = j and -1 otherwise;
    with `keys`, y = +1 for all pairs with equal keys. With `exists` the sum, still divided by b, includes all images
    with all existing negatives, y = -1 [ours].

    Arguments and metrics are the ones of `clip`, plus a scalar bias, added to each logit (SigLIP starts with a
    scale of 10 and a bias of -10). "ln_b" is for comparison with a softmax run and not the loss of a blind guess.
    "positives", with `keys`, is the mean number of positives per image.

    Example:
        >>> import jax.numpy as jnp
        >>> from xclip_jax import losses
        >>> z_img = jnp.eye(4)
        >>> loss, metrics = losses.siglip(z_img, z_img, scale=10.0, bias=-10.0)
        >>> f"{loss:.4f}, accuracy {metrics['acc_img']:.0%}"
        '0.6933, accuracy 100%'
    """
    check(z_img, z_txt, exists, scale, bias)
    b = len(z_img)
    if chunk:
        total, in_chunks = _compare_in_chunks(_sigmoid_sum, chunk, exists, z_img, z_txt, scale, bias)
        loss = jnp.sum(total) / b
    else:
        logits = jnp.asarray(scale, jnp.float32) * dot(z_img, z_txt) + jnp.asarray(bias, jnp.float32)
        logits = logits if exists is None else jnp.where(exists, logits, _LOG_ZERO)
        sign = 2 * jnp.eye(b, len(z_txt), dtype=jnp.float32) - 1
        loss = -jnp.sum(jax.nn.log_sigmoid(sign * logits)) / b
    others = {} if exists is None else _of_negatives(z_img, z_txt, exists)
    if keys is not None:
        # If a negative becomes a positive, the loss falls by its logit, since log sigmoid(x) - log sigmoid(-x) = x.
        z_img, z_txt = (z.astype(jnp.float32) for z in (z_img, z_txt[:b]))
        texts, counts = sum_over_equal(keys, z_txt)
        equal = jnp.asarray(scale, jnp.float32) * jnp.sum(z_img * (texts - z_txt), axis=1)
        loss = loss - jnp.mean(equal + jnp.asarray(bias, jnp.float32) * (counts - 1))
        others["positives"] = jnp.mean(counts)
    return loss, {"loss": loss, **(in_chunks if chunk else _metrics(logits)), **others}


def check(z_img: jax.Array, z_txt: jax.Array, exists: jax.Array | None, *scalars: ArrayLike) -> None:
    """Raise `AssertionError` unless embeddings have shapes (b, e), `z_txt` a row per value of `exists`, if any."""
    chex.assert_rank([z_img, z_txt], 2)
    chex.assert_shape(z_txt, z_img.shape if exists is None else (len(exists), z_img.shape[1]))
    chex.assert_shape([jnp.asarray(x) for x in scalars], ())


def dot(z_img: jax.Array, z_txt: jax.Array) -> jax.Array:
    """Return the similarities of all pairs, fp32 (b, b), row i for image i."""
    # HIGHEST: the default precision of TPUs and of TF32 rounds fp32 factors to 8 or 10 bits, and the scale (up to 100)
    # multiplies this error. The product takes few of a step's FLOPs.
    return jnp.matmul(
        z_img.astype(jnp.float32),
        z_txt.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _of_negatives(z_img: jax.Array, z_txt: jax.Array, exists: jax.Array) -> Metrics:
    b, e = z_img.shape
    margins = jnp.sum(z_img[:, None] * (z_txt[:b, None] - z_txt[b:].reshape(b, -1, e)), axis=2)
    n = jnp.sum(exists[b:], dtype=jnp.float32)
    above = jnp.sum(exists[b:] & (margins.reshape(-1) > 0), dtype=jnp.float32)
    return {"negatives": n / b, "acc_negatives": above / jnp.maximum(n, 1)}


def _metrics(logits: jax.Array) -> Metrics:
    index = jnp.arange(len(logits))
    return {
        "ln_b": jnp.log(jnp.float32(len(logits))),
        "acc_img": jnp.mean(argmax(logits, 1) == index, dtype=jnp.float32),
        "acc_txt": jnp.mean(argmax(logits[:, : len(logits)], 0) == index, dtype=jnp.float32),
    }


class _Logits(NamedTuple):
    """Logits (b, n) of all images and a chunk of n texts."""

    all: jax.Array
    own: jax.Array  # whether image and text are a pair, bool (b, n)
    matching_img: jax.Array  # the logit of each image's pair, (b,)
    matching_txt: jax.Array  # and of each text's, (n,)


def _log_sums(logits: _Logits) -> dict[str, jax.Array]:
    """Return the log-sum-exp of the logits of other pairs, minus the matching one, per image (b,) and per text (n,).

    Its softplus is the cross-entropy, with all digits of a small loss however the matching logit is rounded.
    """
    of_imgs = jnp.where(logits.own, _LOG_ZERO, logits.all - logits.matching_img[:, None])
    of_txts = jnp.where(logits.own, _LOG_ZERO, logits.all - logits.matching_txt[None, :])
    return {"img": jax.nn.logsumexp(of_imgs, axis=1), "txt": jax.nn.logsumexp(of_txts, axis=0)}


def _sigmoid_sum(logits: _Logits) -> jax.Array:
    return jnp.sum(jax.nn.softplus(jnp.where(logits.own, -logits.all, logits.all)))


def _compare_in_chunks(
    reduce: Callable[[_Logits], Any], chunk: int, exists: jax.Array | None, *arguments: ArrayLike
) -> tuple[Any, Metrics]:
    """Return the stacked results of `reduce` for the chunks of z_img, z_txt, scale and bias, and most metrics."""
    z_img, z_txt, scale, bias = (jnp.asarray(x, jnp.float32) for x in arguments)
    b = len(z_img)
    chex.assert_is_divisible(b, chunk)
    index = jnp.arange(b)
    matching = scale * jnp.sum(z_img * z_txt[:b], axis=1) + bias
    texts = [z_txt, matching, index]
    if exists is not None:
        texts = [z_txt, *(jnp.pad(x, (0, len(z_txt) - b), constant_values=b) for x in (matching, index)), exists]

    def compare(texts: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        z_txt, matching_txt, column, *exist = texts
        logits = constrain(scale * dot(z_img, z_txt) + bias, "batch", None)
        logits = jnp.where(exist[0], logits, _LOG_ZERO) if exist else logits
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        best = (highest, column[0] + argmax(logits, 1), argmax(logits, 0) == column)
        return reduce(_Logits(logits, index[:, None] == column, matching, matching_txt)), best

    # Each device holds all texts: slices of a split array would be sent one by one.
    texts = [constrain(x, *[None] * x.ndim).reshape(-1, chunk, *x.shape[1:]) for x in texts]
    result, (highest, first, right) = jax.lax.map(jax.checkpoint(compare), tuple(texts))
    chosen = jnp.min(jnp.where(highest == jnp.max(highest, axis=0), first, b), axis=0)  # the first of equal logits
    return result, {
        "ln_b": jnp.log(jnp.float32(b)),
        "acc_img": jnp.mean(chosen == index, dtype=jnp.float32),
        "acc_txt": jnp.mean(right[: b // chunk], dtype=jnp.float32),
    }
