"""The train state: everything that a step changes and a checkpoint stores."""

import os
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from xclip_jax.models import lora
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.parallel import sharding

__all__ = ["TrainState"]


@flax.struct.dataclass
class TrainState:
    """The train state; `step` is its only counter and `seed` its only randomness.

    Attributes:
      step: int32 (), number of updates.
      params: fp32 parameters of `TwoTowers`.
      batch_stats: running means and variances of BatchNorm; empty without cluster heads.
      opt_state: state of the optimizer.
      ema_params: exponential moving average of `params`, or None.
      ema_batch_stats: BatchNorm statistics of the averaged model, or None.
      loss_state: running values of the objective's terms, mostly empty.
      seed: uint32 (), folded with `step` into the key of each step.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    ema_batch_stats: Any
    loss_state: Any
    seed: jax.Array

    def variables(self, *, ema: bool = False) -> dict[str, Any]:
        """Return variables for `TwoTowers.apply`, with adapters merged into their kernels."""
        if ema and self.ema_params is not None:
            return {"params": lora.merged(self.ema_params), "batch_stats": self.ema_batch_stats}
        return {"params": lora.merged(self.params), "batch_stats": self.batch_stats}


def init_fn(
    model: TwoTowers,
    tx: optax.GradientTransformation,
    *,
    loss_state: dict[str, Any],
    ema: bool,
    seed: int,
    adapters: lora.LoraConfig,
) -> Any:
    """Return a function that makes a boxed `TrainState`, by default from `seed`, traced by `create` and `abstract`."""

    def init(seed: int = seed) -> TrainState:
        size = model.img.image_size
        image = jnp.zeros((2, size, size, 3))
        text = jnp.zeros((2, model.txt.context_length), jnp.int32)
        variables = model.init(jax.random.key(seed), image, text)
        params = variables["params"]
        batch_stats = variables.get("batch_stats", {})
        if adapters.rank:
            random_key = jax.random.fold_in(jax.random.key(seed), 1)
            params = params | {lora.ADAPTERS: lora.initial(nn.unbox(params), adapters, random_key)}
        # Copied, since a buffer cannot be donated twice.
        average = jax.tree.map(jnp.copy, (params, batch_stats)) if ema else (None, None)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(nn.unbox(params)),
            ema_params=average[0],
            ema_batch_stats=average[1],
            loss_state=jax.tree.map(jnp.asarray, loss_state),
            seed=jnp.asarray(seed, jnp.uint32),
        )

    return init


def abstract(boxed: Any, layout: sharding.MeshLayout) -> TrainState:
    """Return shapes, dtypes and shardings in `layout` of a state; `boxed` is the `jax.eval_shape` of `init_fn`."""
    shapes = nn.unbox(boxed)
    specs = sharding.shardings(boxed, layout)
    specs = specs.replace(opt_state=_as_parameters(shapes, specs))
    if layout.strategy == "zero1":
        specs = specs.replace(
            opt_state=sharding.zero1_shardings(shapes.opt_state, specs.opt_state, layout.mesh),
            ema_params=sharding.zero1_shardings(shapes.ema_params, specs.ema_params, layout.mesh),
        )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, specs)


def _as_parameters(shapes: TrainState, specs: TrainState) -> Any:
    """Return shardings of the optimizer's state: moments like their parameters, factored sums and counters whole.

    An array belongs to the parameter whose path ends the array's path, however the optimizer nests it.
    """
    parameters = flatten_dict(shapes.params)
    of_parameters = flatten_dict(specs.params)

    def spec(path: tuple[Any, ...], x: Any, whole: Any) -> Any:
        name = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        while name and name not in parameters:
            name = name[1:]
        return of_parameters[name] if name and parameters[name].shape == x.shape else whole

    return jax.tree_util.tree_map_with_path(spec, shapes.opt_state, specs.opt_state)


def create(init: Any, abstract: TrainState) -> TrainState:
    """Make the initial state in the layout of `abstract`; each device makes only its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # As it runs once, less optimised code is better on a CPU: it compiles in little more than half the time.
    on_cpu = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform == "cpu"
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    options = {"xla_backend_optimization_level": 1} if on_cpu and not chosen else None
    return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings, compiler_options=options)()
