"""The contrastive losses on a ring of devices: the (b, b) logits are never whole in memory.

Each device keeps its images, and the texts travel round the ring: in each of as many hops as there are batch shards a
device has one block of texts and adds it to its images' sums and to the texts' own, which travel with them. A hop is
rematerialised in the backward pass. Values and gradients are those of `losses.contrastive`, which defines the losses;
this form pays where (b, b) / devices logits outweigh the towers' activations, at hundreds of thousands of pairs or on
few devices.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from xclip_jax.losses import contrastive
from xclip_jax.losses.contrastive import Metrics
from xclip_jax.parallel.mesh import BATCH_AXES

Array = jax.Array
State = dict[str, Array]
Hop = Callable[[State, Array, Array], State]


def softmax(
    z_img: Array, z_txt: Array, scale: ArrayLike, *, mesh: Mesh, label_smoothing: float = 0.0
) -> tuple[Array, Metrics]:
    """`contrastive.softmax`, the batch split over `mesh`'s batch axes; arguments, results and errors are the same."""
    contrastive.check(z_img, z_txt, scale)
    hops = (_softmax_hop, _softmax_hop)
    loss, metrics = _ring(hops, _softmax_end, z_img, z_txt, jnp.asarray(scale, jnp.float32), jnp.float32(0), mesh)
    if label_smoothing:
        loss = loss + label_smoothing * contrastive.mean_margin(z_img, z_txt, scale)
        metrics = metrics | {"loss": loss}
    return loss, metrics


def sigmoid(z_img: Array, z_txt: Array, scale: ArrayLike, bias: ArrayLike, *, mesh: Mesh) -> tuple[Array, Metrics]:
    """`contrastive.sigmoid`, the batch split over `mesh`'s batch axes; arguments, results and errors are the same."""
    contrastive.check(z_img, z_txt, scale, bias)
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    hops = (_sigmoid_hop, lambda state, *_: state)  # every pair is counted once, by its image
    return _ring(hops, _sigmoid_end, z_img, z_txt, scale, bias, mesh)


def _ring(
    hops: tuple[Hop, Hop],
    end: Callable[[State, State], Array],
    z_img: Array,
    z_txt: Array,
    scale: Array,
    bias: Array,
    mesh: Mesh,
) -> tuple[Array, Metrics]:
    """Send the texts once round the mesh.

    `hops` add a block of logits to the state of its images and of its texts; `end` makes one number a row of both.
    """
    b = z_img.shape[0]
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    following = [(i, (i + 1) % shards) for i in range(shards)]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(BATCH_AXES),) * 2 + (PartitionSpec(),) * 2,
        out_specs=PartitionSpec(),
    )
    def local(z_img: Array, z_txt: Array, scale: Array, bias: Array) -> Array:
        index = jax.lax.axis_index(BATCH_AXES)
        rows = z_img.shape[0]
        # The diagonal of the first block, as the first hop computes it: relative to it a perfect pair's logit is 0.
        own = jnp.sum(jnp.eye(rows) * (scale * contrastive.dot(z_img, z_txt) + bias), axis=1)
        zeros = jnp.zeros_like(own)  # of `own`, so that it varies over the mesh as the states do
        # log-sum-exp as (maximum, sum), and the best match as (value, index)
        fresh = {"own": own, "max": zeros, "sum": zeros, "best": zeros - jnp.inf, "index": zeros.astype(jnp.int32)}
        home, away = fresh, fresh | {"z": z_txt}

        def hop(carry: tuple[State, State], shift: Array) -> tuple[tuple[State, State], None]:
            home, away = carry
            source = (index - shift) % shards  # the shard that the texts came from
            logits = scale * contrastive.dot(z_img, away["z"]) + bias
            home = hops[0](_best(home, logits, source * rows), logits, shift == 0)
            away = hops[1](_best(away, logits.T, index * rows), logits.T, shift == 0)
            away = jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, following), away)
            return (home, away), None

        (home, away), _ = jax.lax.scan(jax.checkpoint(hop), (home, away), jnp.arange(shards))
        # After a whole round the texts are home again.
        mine = index * rows + jnp.arange(rows)
        hits = [jnp.sum(state["index"] == mine, dtype=jnp.float32) for state in (home, away)]
        return jax.lax.psum(jnp.stack([jnp.sum(end(home, away)), *hits]), BATCH_AXES) / b

    loss, acc_img, acc_txt = local(z_img.astype(jnp.float32), z_txt.astype(jnp.float32), scale, bias)
    metrics = {"loss": loss, "ln_b": jnp.log(jnp.float32(b)), "acc_img": acc_img, "acc_txt": acc_txt}
    return loss, metrics


def _best(state: State, logits: Array, offset: Array) -> State:
    """Return `state` with the best match among columns `offset` and up; the lowest index wins ties, in any order."""
    logits = jax.lax.stop_gradient(logits)
    value, index = jnp.max(logits, axis=1), offset + jnp.argmax(logits, axis=1).astype(jnp.int32)
    better = (value > state["best"]) | ((value == state["best"]) & (index < state["index"]))
    return state | {"best": jnp.where(better, value, state["best"]), "index": jnp.where(better, index, state["index"])}


def _softmax_hop(state: State, logits: Array, first: Array) -> State:
    """Add a block's exponentials, relative to the row's own pair as in `contrastive.softmax`."""
    relative = logits - state["own"][:, None]
    # Nothing is below the own pair's 0, so the running maximum may start there.
    highest = jax.lax.stop_gradient(jnp.maximum(state["max"], jnp.max(relative, axis=1)))
    total = state["sum"] * jnp.exp(state["max"] - highest) + jnp.sum(jnp.exp(relative - highest[:, None]), axis=1)
    return state | {"max": highest, "sum": total}


def _softmax_end(home: State, away: State) -> Array:
    img_to_txt, txt_to_img = (state["max"] + jnp.log(state["sum"]) for state in (home, away))
    return 0.5 * (img_to_txt + txt_to_img)


def _sigmoid_hop(state: State, logits: Array, first: Array) -> State:
    """Add a block's terms; the matching pairs are on the diagonal of the first."""
    sign = jnp.where(first, 2 * jnp.eye(logits.shape[0], dtype=jnp.float32) - 1, -1.0)
    return state | {"sum": state["sum"] - jnp.sum(jax.nn.log_sigmoid(sign * logits), axis=1)}


def _sigmoid_end(home: State, away: State) -> Array:
    return home["sum"]
