"""Steps whose values are not finite leave the state as it was, inside the compiled step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.train.state import TrainState

# Of the running mean of the gradient norm: its decay in a step, and the accepted steps before it is relied on.
DECAY = 0.99
WARMUP = 100


def all_finite(*trees: Any) -> jax.Array:
    """Whether all floating-point values of `trees` are finite, bool ()."""
    floats = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


@dataclasses.dataclass(frozen=True)
class SpikeFilter:
    """Refuses steps whose gradient norm is far above its running geometric mean over the steps that were accepted.

    Attributes:
      ratio: of the norm and its mean above which a step is refused, once the mean is of `WARMUP` steps.
    """

    ratio: float

    def initial_state(self) -> dict[str, jax.Array]:
        """Sum of log norms and sum of weights, of an exponential moving average."""
        return {"grad_norm_log_sum": jnp.zeros(()), "grad_norm_weight": jnp.zeros(())}

    def __call__(
        self, state: Mapping[str, jax.Array], grad_norm: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return whether to accept a step, bool (), the mean before it, and the state after a step that is accepted."""
        total, weight = state["grad_norm_log_sum"], state["grad_norm_weight"]
        tiny = float(np.finfo(np.float32).tiny)
        mean = jnp.exp(total / jnp.maximum(weight, tiny))
        # Half a step below the weight of `WARMUP` steps, for rounding.
        accept = (weight < 1 - DECAY ** (WARMUP - 0.5)) | (grad_norm <= self.ratio * mean)
        log_norm = jnp.log(jnp.maximum(grad_norm, tiny))
        new = {
            "grad_norm_log_sum": DECAY * total + (1 - DECAY) * log_norm,
            "grad_norm_weight": DECAY * weight + (1 - DECAY),
        }
        return accept, mean, new


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def at_step(state: TrainState, step: int | jax.Array) -> TrainState:
    """Return `state` as of another step of the run: its own counter and that of the learning-rate schedule."""

    def move(node: Any) -> Any:
        return node._replace(count=jnp.full_like(node.count, step)) if _is_schedule(node) else node

    return dataclasses.replace(
        state,
        step=jnp.full_like(state.step, step),
        opt_state=jax.tree.map(move, state.opt_state, is_leaf=_is_schedule),
    )
