"""The optimizer: AdamW with masked weight decay and layer decay, its schedules, and the bound on the logit scale."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.errors import UserError, one_of

Schedule = Callable[[Any], Any]
MAX_SCALE = 100.0
SCHEDULES = ("cosine", "linear", "constant")
_BEFORE = ("patches", "tokens", "positions", "cls", "norm_pre")  # a tower's parameters ahead of its blocks


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Group `optim` of a config.

    Attributes:
      lr: peak learning rate.
      schedule: "cosine", "linear" or "constant" after the warm-up.
      warmup: steps of linear warm-up from `lr_start`.
      lr_end: learning rate of the last step.
      weight_decay: decoupled, on tensors of two dimensions and more (never biases, norms, scale).
      layer_decay: each layer's updates are so many times those of the layer above, see `layer_scales`; 1 for none.
      clip: bound on the global gradient norm; 0 for none.
      mu_dtype: dtype of the first moment; the second stays fp32.
      microbatches: parts of the batch that are encoded one after the other; exact, see `gradcache`.
    """

    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    lr_start: float = 0.0
    lr_end: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    layer_decay: float = 1.0
    clip: float = 0.0
    mu_dtype: str = "float32"
    microbatches: int = 1


def schedule(config: OptimConfig, steps: int) -> Schedule:
    """Learning rate as a function of the step, for a run of `steps` steps."""
    one_of("optim.schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup < max(steps, 1):
        raise UserError(f"optim.warmup={config.warmup} must be below the {steps} steps of the run; shorten it.")
    warmup = optax.linear_schedule(config.lr_start, config.lr, max(config.warmup, 1))
    rest = max(steps - config.warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.lr, rest, alpha=config.lr_end / config.lr)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.lr, config.lr_end, rest)
    else:
        decay = optax.constant_schedule(config.lr)
    return optax.join_schedules([warmup, decay], [config.warmup]) if config.warmup else decay


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: kernels and embeddings, not biases, norms, scale or class token.

    A stack of scanned blocks has one dimension more, so the test is by name, not by the number of dimensions.
    """
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = [key.key for key in path if hasattr(key, "key")][-1]  # a boxed parameter has an attribute behind it
        return name in ("kernel", "tokens", "positions", "probe")

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: dict[str, Any], decay: float) -> dict[str, Any]:
    """By what each parameter's updates are multiplied: BEiT's layer decay (arXiv 2106.08254).

    In a tower of n blocks it is decay^(n + 1) for what comes before them (patches, tokens, positions, cls, norm_pre),
    decay^(n - i) for block i from 0 on, and 1 for what comes after them.

    Returns:
      A tree of scalars; of scanned blocks an array with their leading axis.
    """

    def scale(path: tuple[Any, ...], x: Any) -> Any:
        tower, *rest = (key.key for key in path)
        if tower not in ("img", "txt"):
            return 1.0
        blocks = params[tower]["transformer"]
        n = len(jax.tree.leaves(blocks)[0]) if "blocks" in blocks else len(blocks)
        if rest[0] != "transformer":
            return decay ** (n + 1) if rest[0] in _BEFORE else 1.0
        if "blocks" in blocks:
            return (decay ** np.arange(n, 0, -1, np.float32)).reshape(n, *[1] * (x.ndim - 1))
        return decay ** (n - int(rest[1].removeprefix("block_")))

    return jax.tree_util.tree_map_with_path(scale, params)


def _decay_layers(decay: float) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda x, scale: x * scale, updates, layer_scales(updates, decay)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimConfig, steps: int, frozen: Collection[str] = ()) -> optax.GradientTransformation:
    """AdamW under `schedule`, after clipping and with layer decay where `config` asks for them.

    Parameters under the top-level names in `frozen` get no update, no weight decay, and have no moments.
    """
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=jnp.dtype(config.mu_dtype),
    )
    if config.layer_decay != 1:
        # AdamW's weight decay is part of the update, and falls with the layer's learning rate, as in PyTorch.
        adamw = optax.chain(adamw, _decay_layers(config.layer_decay))
    tx = optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw
    if not frozen:
        return tx
    return optax.partition(
        {"train": tx, "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in frozen else "train" for name in params},
    )


def project_scale(params: dict[str, Any]) -> dict[str, Any]:
    """Holds the logit scale exp(log_scale) at `MAX_SCALE` or below, after an update.

    Clipping in the forward pass instead would leave no gradient to come back from the bound.
    """
    if "log_scale" not in params:
        return params
    return params | {"log_scale": jnp.minimum(params["log_scale"], math.log(MAX_SCALE))}


def ema_momentum(step: Any, steps: int, start: float, kind: str) -> Any:
    """Momentum of the exponential moving average at `step`: constant, or from `start` to 1 on a cosine."""
    one_of("ema.schedule", kind, ("constant", "cosine"))
    if kind == "constant":
        return start
    return 1 - (1 - start) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
