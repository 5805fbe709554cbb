"""The contrastive losses on a ring of devices. Memory grows with the pairs per device, not with the batch.

Each device keeps its images, and the texts travel round the ring in as many hops as the batch has shards. In each hop a
device compares its images with one block of texts. The forward pass keeps sums of the rows and columns of logits; the
backward pass sends the texts round again and computes each block a second time (Inf-CL, arXiv 2410.17243). Values and
gradients equal those of `losses.contrastive`, which defines the losses.

The plain form holds several arrays of (b / devices, b) and of (b, e), a gigabyte or more from 130,000 pairs on. With
fewer than about 1,000 pairs per device the fixed costs of a hop outweigh its work. Pairs with equal keys
(`contrastive.sum_over_equal`) are summed over the whole batch: each device then holds the embeddings of all texts once.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from xclip_jax.losses import contrastive
from xclip_jax.losses.contrastive import Metrics
from xclip_jax.parallel.mesh import BATCH_AXES, ring_order

Array = jax.Array
Pair = tuple[Array, Array]
Home = TypeVar("Home")

_WHOLE = PartitionSpec()
_ROWS = PartitionSpec(BATCH_AXES)
_COLUMNS = PartitionSpec(None, BATCH_AXES)


def softmax(
    z_img: Array,
    z_txt: Array,
    scale: ArrayLike,
    *,
    mesh: Mesh,
    label_smoothing: float = 0.0,
    keys: Array | None = None,
    q: float = 0.0,
) -> tuple[Array, Metrics]:
    """Return `contrastive.softmax` of a batch split over `mesh`'s batch axes.

    Arguments, results and errors are the same.
    """
    contrastive.check(z_img, z_txt, scale)
    loss, metrics = _compare(_softmax(q), mesh, z_img, z_txt, scale, 0.0)
    metrics = contrastive.with_blind_guess(metrics, q)
    if label_smoothing or keys is not None:
        loss = loss + contrastive.target_margin(z_img, z_txt, scale, label_smoothing, keys)
        metrics = metrics | {"loss": loss}
    return loss, metrics


def sigmoid(
    z_img: Array, z_txt: Array, scale: ArrayLike, bias: ArrayLike, *, mesh: Mesh, keys: Array | None = None
) -> tuple[Array, Metrics]:
    """Return `contrastive.sigmoid` of a batch split over `mesh`'s batch axes.

    Arguments, results and errors are the same.
    """
    contrastive.check(z_img, z_txt, scale, bias)
    loss, metrics = _compare(_SIGMOID, mesh, z_img, z_txt, scale, bias)
    if keys is not None:
        others, count = contrastive.other_positives(z_img, z_txt, scale, bias, keys)
        loss = loss - others
        metrics = metrics | {"loss": loss, "positives": count}
    return loss, metrics


class Sums(NamedTuple):
    """Reductions of the rows of logits, or of their columns, to one fp32 number per row or column."""

    best: Array  # highest logit
    shard: Array  # first shard of the batch with this logit
    total: Array  # sum of the loss's terms


class Form(NamedTuple):
    """A loss of all pairs."""

    # For rows and for columns, (sums before a block, highest logit after it, logits, matching) -> total.
    totals: tuple[Callable[[Sums, Array, Array, Array], Array], Callable[[Sums, Array, Array, Array], Array]]
    # (sums of rows, sums of columns, logits of matching pairs) -> loss, its derivative by the matching pair's logit,
    # and log-sum-exp of row and column relative to that logit, one number of each per pair.
    end: Callable[[Sums, Sums, Array], tuple[Array, Array, Array, Array]]
    # (logits, matching pair's logit and relative log-sum-exp of rows, of columns) -> derivative by other pairs' logits.
    derivative: Callable[[Array, Pair, Pair], Array]


def _compare(
    form: Form, mesh: Mesh, z_img: Array, z_txt: Array, scale: ArrayLike, bias: ArrayLike
) -> tuple[Array, Metrics]:
    z_img, z_txt, scale, bias = (jnp.asarray(x, jnp.float32) for x in (z_img, z_txt, scale, bias))
    # The scale multiplies images: a scaled logit might be rounded in one pass and fused with a sum in the other.
    loss, acc_img, acc_txt = _loss(form, mesh, scale * z_img, z_txt, bias)
    return loss, {"loss": loss, "ln_b": jnp.log(jnp.float32(len(z_img))), "acc_img": acc_img, "acc_txt": acc_txt}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(form: Form, mesh: Mesh, z_img: Array, z_txt: Array, bias: Array) -> Array:
    """Return the loss and both accuracies, (3,)."""
    return _forward(form, mesh, z_img, z_txt, bias)[0]


def _forward(form: Form, mesh: Mesh, *args: Array) -> tuple[Array, tuple[Array, ...]]:
    local = partial(_sums, form, ring_order(mesh))
    specs = (_ROWS, _ROWS, _WHOLE)
    sums, saved = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(_WHOLE, _COLUMNS))(*args)
    return sums / len(args[0]), (*args, saved)


def _backward(form: Form, mesh: Mesh, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    local = partial(_gradients, form, ring_order(mesh))
    specs = (_ROWS, _ROWS, _WHOLE)
    gradients = jax.shard_map(local, mesh=mesh, in_specs=(*specs, _COLUMNS), out_specs=specs)(*residuals)
    factor = cotangent[0] / len(residuals[0])  # accuracies have no gradient
    return tuple(factor * gradient for gradient in gradients)


_loss.defvjp(_forward, _backward)


def _sums(form: Form, order: list[int], z_img: Array, z_txt: Array, bias: Array) -> tuple[Array, Array]:
    """Return summed loss and correct matches of both directions, (3,), and the residuals of each pair, (4, b)."""
    mine = jax.lax.axis_index(BATCH_AXES)
    zeros = jnp.zeros_like(z_img[:, 0])
    fresh = Sums(best=zeros - jnp.inf, shard=zeros, total=zeros)

    def block(source: Array, texts: Array, home: tuple[Array, Sums], away: Array) -> tuple[tuple[Array, Sums], Array]:
        pairs, rows = home
        logits = contrastive.dot(z_img, texts.T) + bias
        pairs = jax.lax.cond(source == mine, lambda: _pairs(logits), lambda: pairs)
        matching = (source == mine) & jnp.eye(len(logits), dtype=bool)
        rows = _add(form.totals[0], rows, logits, matching, source)
        columns = _add(form.totals[1], Sums(*away), logits.T, matching, mine)
        return (pairs, rows), jnp.stack(columns)

    (pairs, rows), away = _send_round(order, block, z_txt.T, (jnp.stack([zeros] * 3), fresh), jnp.stack(fresh))
    own, best_of_row, best_of_column = pairs
    columns = Sums(*away)
    loss, by_match, *log_sums = form.end(rows, columns, own)
    right = best_of_row * (rows.shard == mine), best_of_column * (columns.shard == mine)
    return jax.lax.psum(jnp.sum(jnp.stack([loss, *right]), axis=1), BATCH_AXES), jnp.stack([by_match, own, *log_sums])


def _gradients(
    form: Form, order: list[int], z_img: Array, z_txt: Array, bias: Array, kept: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of the summed loss by embeddings and bias; `kept` is the second result of `_sums`."""
    mine = jax.lax.axis_index(BATCH_AXES)
    rows, e = z_img.shape
    by_match, own, of_rows, of_columns = kept

    def block(source: Array, texts: Array, home: tuple[Array, Array], away: Array) -> tuple[tuple[Array, Array], Array]:
        d_img, d_bias = home
        logits = contrastive.dot(z_img, texts[:e].T) + bias
        matching = (source == mine) & jnp.eye(rows, dtype=bool)
        derivative = form.derivative(logits, (own[:, None], of_rows[:, None]), (texts[e], texts[e + 1]))
        d_logits = jnp.where(matching, by_match, derivative)
        d_img = d_img + contrastive.dot(d_logits, texts[:e])
        d_bias = d_bias + jnp.sum(d_logits)
        return (d_img, d_bias), away + contrastive.dot(z_img.T, d_logits.T)

    texts = jnp.concatenate([z_txt.T, jnp.stack([own, of_columns])])
    home = (jnp.zeros_like(z_img), jnp.zeros_like(by_match[0]))
    (d_img, d_bias), d_txt = _send_round(order, block, texts, home, jnp.zeros_like(z_txt.T))
    return d_img, d_txt.T, jax.lax.psum(d_bias, BATCH_AXES)


def _send_round(
    order: list[int],
    block: Callable[[Array, Array, Home, Array], tuple[Home, Array]],
    texts: Array,
    home: Home,
    away: Array,
) -> tuple[Home, Array]:
    """Send texts with their sums once round the ring, and return `home` and `away` after all blocks.

    Each hop sends one array before the block's product, to overlap with it: the texts of this hop and, below them, the
    sums of the previous hop's texts. The receiver already has these texts, and adds its block to the sums when they
    arrive. Texts are columns, since rows of slightly more than e numbers would be padded to whole registers.

    Args:
      order: shards of the batch in the order of the ring.
      block: (shard of the texts, texts, home, away) -> (home, away), the sums with the block added.
      texts, home, away: texts, sums of this device's images, and sums of the texts before any block.
    """
    shards = len(order)
    height = len(texts)
    following = [(shard, order[(i + 1) % shards]) for i, shard in enumerate(order)]
    position = jnp.asarray(sorted(range(shards), key=order.__getitem__))[jax.lax.axis_index(BATCH_AXES)]

    def hop(shift: Array, carry: tuple[Home, Array]) -> tuple[Home, Array]:
        home, held = carry
        arriving = jax.lax.ppermute(held, BATCH_AXES, following)
        source = jnp.asarray(order)[(position - shift) % shards]
        home, away = block(source, held[:height], home, arriving[height:])
        return home, arriving.at[height:].set(away)

    home, held = jax.lax.fori_loop(0, shards, hop, (home, jnp.concatenate([texts, away])))
    return home, jax.lax.ppermute(held[height:], BATCH_AXES, following)


def _pairs(logits: Array) -> Array:
    """Return the logits of a block's matching pairs, and whether each is first in its row and in its column, (3, b)."""
    own = jnp.arange(len(logits))
    diagonal = jnp.eye(len(logits), dtype=bool)
    best = [jnp.argmax(logits, axis=axis) == own for axis in (1, 0)]
    return jnp.stack([jnp.sum(jnp.where(diagonal, logits, 0), axis=1), *(x.astype(jnp.float32) for x in best)])


def _add(
    total: Callable[[Sums, Array, Array, Array], Array], sums: Sums, logits: Array, matching: Array, shard: Array
) -> Sums:
    """Return `sums` with a block of logits added; the lowest shard wins ties, in any order of blocks."""
    value = jnp.max(logits, axis=1)
    better = (value > sums.best) | ((value == sums.best) & (shard < sums.shard))
    best = jnp.where(better, value, sums.best)
    return Sums(best, jnp.where(better, shard, sums.shard), total(sums, best, logits, matching))


def _softmax_total(sums: Sums, best: Array, logits: Array, matching: Array) -> Array:
    """Return the sum of exponentials relative to the highest logit."""
    return sums.total * jnp.exp(sums.best - best) + jnp.sum(jnp.exp(logits - best[:, None]), axis=1)


@cache  # one object, and so one program, for equal arguments
def _softmax(q: float) -> Form:
    """Return the softmax loss with `contrastive.robust` of the cross-entropies, which is the identity for 0."""

    def slope(cross_entropy: Array) -> tuple[Array, Array]:
        """Return the robust loss and its derivative."""
        return jax.jvp(lambda x: contrastive.robust(x, q), (cross_entropy,), (jnp.ones_like(cross_entropy),))

    def end(rows: Sums, columns: Sums, own: Array) -> tuple[Array, Array, Array, Array]:
        # Relative to the matching pair, like `contrastive.softmax`: a small loss and its gradient keep their digits.
        to_txt, to_img = ((sums.best - own) + jnp.log(sums.total) for sums in (rows, columns))
        loss_txt, slope_txt = slope(to_txt)
        loss_img, slope_img = slope(to_img)
        by_match = slope_txt * jnp.expm1(-to_txt) + slope_img * jnp.expm1(-to_img)
        return 0.5 * (loss_txt + loss_img), 0.5 * by_match, to_txt, to_img

    def derivative(logits: Array, rows: Pair, columns: Pair) -> Array:
        to_txt, to_img = (slope(x)[1] * jnp.exp((logits - own) - x) for own, x in (rows, columns))
        return 0.5 * (to_txt + to_img)

    return Form((_softmax_total, _softmax_total), end, derivative)


def _sigmoid_total(sums: Sums, best: Array, logits: Array, matching: Array) -> Array:
    return sums.total + jnp.sum(jax.nn.softplus(jnp.where(matching, -logits, logits)), axis=1)


_SIGMOID = Form(
    (_sigmoid_total, lambda sums, *_: sums.total),  # every pair is counted once, by its image
    lambda rows, columns, own: (rows.total, -jax.nn.sigmoid(-own), own, own),
    lambda logits, rows, columns: jax.nn.sigmoid(logits),
)
