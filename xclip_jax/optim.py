"""The optimizer: AdamW with masked weight decay and layer decay, and its schedules."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.core.fields import Check, above, at_least, at_most, between, choice, fraction_below_one, key
from xclip_jax.models.tower import Tower

Schedule = Callable[[Any], Any]
SCHEDULES = ("cosine", "linear", "constant")
EMA_SCHEDULES = ("constant", "cosine")

_SHARE = Check("above 0 and at most 1", lambda value: 0 < value <= 1)
_RATIO = Check("0 or a value above 1", lambda value: value == 0 or value > 1)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Config group `optim`: AdamW.

    Within these bounds an update is finite if the norms of parameters and gradients were finite at each step: they, and
    the first moment, are then below 2e19, and 1000 * 2e19 / 1e-15 is below the largest float32.
    """

    lr: float = key(5e-4, "peak learning rate", above(0), at_most(1000))
    schedule: str = key("cosine", "learning rate after the warm-up", choice(SCHEDULES))
    warmup: int = key(0, "steps of linear warm-up from lr_start", at_least(0))
    lr_start: float = key(1e-6, "learning rate of the first step, if there is a warm-up", between(0, 1000))
    lr_end: float = key(1e-5, "learning rate that the schedule reaches after its last step", between(0, 1000))
    weight_decay: float = key(
        0.5, "decoupled weight decay of kernels and embeddings; none for biases, norms and scale", between(0, 1000)
    )
    b1: float = key(0.9, "decay of the first moment", fraction_below_one())
    b2: float = key(0.98, "decay of the second moment", fraction_below_one())
    eps: float = key(1e-8, "added to the root of the second moment", at_least(1e-15))
    layer_decay: float = key(1.0, "updates of a layer over updates of the layer above; 1 for none", _SHARE)
    grad_clip_norm: float = key(0.0, "bound on the global norm of the gradient; 0 for none", at_least(0))
    mu_dtype: str = key("float32", "dtype of the first moment; the second is float32", choice(("float32", "bfloat16")))
    microbatches: int = key(1, "parts of the batch that are encoded one after another; exact", at_least(1))
    max_skipped_steps: int = key(
        10, "consecutive steps with non-finite values that may be skipped before the run stops", at_least(0)
    )
    max_grad_norm_ratio: float = key(
        0.0, "skip steps whose gradient norm is above this multiple of its running mean; 0 for none", _RATIO
    )
    rewind: bool = key(
        False,
        "instead of stopping, restore the parameters of the previous checkpoint and continue with the next samples",
    )

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        if self.rewind and not self.max_skipped_steps:
            yield "rewind is True and max_skipped_steps is 0; set it to 1 or more"


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Config group `ema`: a moving average of the parameters, kept if `on` is set or targets need it."""

    on: bool = key(False, "keep the average although the objective does not need it")
    momentum: float = key(0.996, "momentum of the average at the start", fraction_below_one())
    schedule: str = key("cosine", "momentum over the run: constant, or rising to 1", choice(EMA_SCHEDULES))


def schedule(config: OptimConfig, steps: int) -> Schedule:
    """Return the learning rate as a function of the step, from 0, for a run of `steps` steps.

    As in SLIP and open_clip the decay spans the steps after the warm-up, and reaches `lr_end` at `steps`, one after the
    last step: with `lr_end` 0 the last step still learns.
    """
    warmup = optax.linear_schedule(config.lr_start, config.lr, max(config.warmup, 1))
    remaining = max(steps - config.warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.lr, remaining, alpha=config.lr_end / config.lr)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.lr, config.lr_end, remaining)
    else:
        decay = optax.constant_schedule(config.lr)
    return optax.join_schedules([warmup, decay], [config.warmup]) if config.warmup else decay


def decay_mask(params: Any) -> Any:
    """Return True for parameters with weight decay: kernels and embeddings, not biases, norms, scale or class token.

    The test is by name, since a stack of scanned blocks has one more dimension.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        *_, name = (key.key for key in path if hasattr(key, "key"))  # a boxed parameter's path ends with an attribute
        return name in ("kernel", "embedding", "tokens", "positions", "probe")

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: dict[str, Any], decay: float, towers: Mapping[str, Tower]) -> dict[str, Any]:
    """Return factors of each parameter's updates: BEiT's layer decay (arXiv 2106.08254).

    Layer i of the n layers of a tower (`Tower.num_layers`) has decay^(n - 1 - i), stacked layers an array with their
    leading axis; parameters outside of towers have 1.
    """

    def scale(path: tuple[Any, ...], x: Any) -> Any:
        name, *rest = (key.key for key in path)
        if name not in towers:
            return 1.0
        layers = towers[name].num_layers - 1 - towers[name].layer_of(tuple(rest))
        if isinstance(layers, int):
            return decay**layers
        return (decay ** layers.astype(np.float32)).reshape(-1, *[1] * (x.ndim - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(
    config: OptimConfig, steps: int, towers: Mapping[str, Tower], frozen: Collection[str] = ()
) -> optax.GradientTransformation:
    """Make AdamW with `schedule`, and with gradient clipping and layer decay if `config` sets them.

    `steps` are of the whole run, and the parameters of `frozen` towers have no updates, weight decay and moments.
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
        # AdamW's weight decay is a part of the update and scales with the layer's learning rate, as in PyTorch.

        def scaled(updates: Any, _: Any) -> Any:
            return jax.tree.map(lambda x, scale: x * scale, updates, layer_scales(updates, config.layer_decay, towers))

        adamw = optax.chain(adamw, optax.stateless(scaled))
    tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), adamw) if config.grad_clip_norm else adamw
    if not frozen:
        return tx
    return optax.partition(
        {"train": tx, "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in frozen else "train" for name in params},
    )


def ema_momentum(step: Any, steps: int, start: float, kind: str) -> Any:
    """Return the momentum of the moving average at `step`: constant, or from `start` to 1 on a cosine."""
    if kind == "constant":
        return start
    return 1 - (1 - start) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
