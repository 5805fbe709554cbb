"""Steps whose values are not finite leave the state as it was, inside the compiled step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.train.state import TrainState


def all_finite(*trees: Any) -> jax.Array:
    """Whether all floating-point values of `trees` are finite, bool ()."""
    floats = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def select(accept: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` where `accept`, bool (), is true and else `old`, trees of the same structure.

    The count of a learning-rate schedule is the new one either way: the schedule follows the run's step, which goes
    on. A value of `old` is returned bit for bit, whatever `new` is.
    """

    def choose(x: Any, y: Any) -> Any:
        return x if _is_schedule(x) else jnp.where(accept, x, y)

    return jax.tree.map(choose, new, old, is_leaf=_is_schedule)


def at_step(state: TrainState, step: int) -> TrainState:
    """Return `state` as of another step of the run: its own counter and that of the learning-rate schedule."""

    def count(x: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(step, x.dtype), x.sharding)

    def move(node: Any) -> Any:
        return node._replace(count=count(node.count)) if _is_schedule(node) else node

    return dataclasses.replace(
        state, step=count(state.step), opt_state=jax.tree.map(move, state.opt_state, is_leaf=_is_schedule)
    )
