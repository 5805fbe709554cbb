"""The optimizer, AdamW or Muon from optax, with masked weight decay and layer decay, and its schedules."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.core.fields import Check, above, at_least, at_most, between, choice, fraction_below_one, key
from xclip_jax.models.lora import ADAPTERS
from xclip_jax.models.tower import Tower

Schedule = Callable[[Any], Any]
NAMES = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")
ON_BAD_STEPS = ("stop", "rewind")

_SHARE = Check("above 0 and at most 1", lambda value: 0 < value <= 1)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Config group `optim`.

    Within these bounds AdamW's update is finite if parameters and gradients always had finite norms: they and the first
    moment are then below 2e19, and 1000 * 2e19 / 1e-15 is below the largest float32.
    """

    name: str = key("adamw", "the optimizer", choice(NAMES), card="optimizer")
    lr: float = key(5e-4, "peak learning rate", above(0), at_most(1000), card="optimizer")
    schedule: str = key("cosine", "learning rate after the warm-up", choice(SCHEDULES), card="optimizer")
    warmup: int = key(0, "steps of linear warm-up from 0", at_least(0), card="optimizer")
    lr_end: float = key(1e-5, "learning rate at the end of the schedule, after its last step", between(0, 1000))
    weight_decay: float = key(
        0.5, "decoupled weight decay of kernels and embeddings", between(0, 1000), card="optimizer"
    )
    b1: float = key(0.9, "decay of the first moment", fraction_below_one(), card="optimizer")
    b2: float = key(0.98, "decay of the second moment", fraction_below_one(), card="optimizer")
    eps: float = key(1e-8, "added to the second moment's root", at_least(1e-15))
    layer_decay: float = key(1.0, "updates of a layer over updates of the layer above; 1 for none", _SHARE)
    grad_clip_norm: float = key(0.0, "bound on the gradient's norm; 0 for none", at_least(0), card="optimizer")
    microbatches: int = key(1, "parts of the batch, encoded one after another", at_least(1), resume="free")
    on_bad_steps: str = key(
        "stop",
        "after more than 10 consecutive steps with non-finite values: stop the run, or rewind it to the parameters of "
        "the previous checkpoint and continue with the next samples",
        choice(ON_BAD_STEPS),
        resume="free",
    )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Config group `ema`: a moving average of the parameters, computed if it has a momentum or targets need it."""

    momentum: float = key(
        0.0, "initial momentum, rising to 1; 0: no average, or 0.996 if targets need one", fraction_below_one()
    )

    @property
    def start(self) -> float:
        return self.momentum or 0.996


def schedule(config: OptimConfig, steps: int) -> Schedule:
    """Return the learning rate as a function of the step, from 0, for a run of `steps` steps.

    After SLIP and open_clip, the decay starts after the warm-up and reaches `lr_end` at `steps`, one step after the
    last, so the last step still learns if `lr_end` is 0.
    """
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup, 1))
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

    Names decide instead of ranks, since stacked blocks have one more dimension.
    """
    names = ("kernel", "embedding", "tokens", "positions", "probe")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def layer_scales(params: Any, decay: float, towers: Mapping[str, Tower]) -> dict[str, Any]:
    """Return factors of each parameter's updates: BEiT's layer decay (arXiv 2106.08254).

    Layer i of a tower with n layers (`Tower.num_layers`) has the factor decay^(n - 1 - i); stacked layers have an array
    of factors. An adapter has its kernel's factor, and parameters outside the towers have 1.
    """

    def scale(path: tuple[Any, ...], x: Any) -> Any:
        name, *rest = (key.key for key in (path[1:] if path[0].key == ADAPTERS else path))
        if name not in towers:
            return 1.0
        layers = towers[name].num_layers - 1 - towers[name].layer_of(tuple(rest))
        if isinstance(layers, int):
            return decay**layers
        return (decay ** layers.astype(np.float32)).reshape(-1, *[1] * (x.ndim - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def stop_frozen(params: Mapping[str, Any], frozen: Collection[str]) -> dict[str, Any]:
    """Return `params` without gradients of the towers `frozen`."""
    return {name: jax.lax.stop_gradient(tree) if name in frozen else tree for name, tree in params.items()}


def _adamw(config: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask)


def _muon(config: OptimConfig, rate: Schedule, towers: Mapping[str, Tower]) -> optax.GradientTransformation:
    """Muon for kernels of blocks, with updates of AdamW's RMS (arXiv 2502.16982), and AdamW for other parameters."""
    muon = optax.contrib.muon(
        rate,
        beta=config.b1,
        eps=config.eps,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=0.2,
    )

    def label(path: tuple[Any, ...], _: Any) -> str:
        names = [key.key for key in path]
        return "muon" if names[-1] == "kernel" and names[0] in towers and "transformer" in names else "adamw"

    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition({"muon": muon, "adamw": _adamw(config, rate)}, labels)


def _muon_dimensions(kernels: Any) -> Any:
    """Return each kernel's input and output axes; queries, keys, values and stacked blocks are separate matrices."""

    def dimensions(path: tuple[Any, ...], x: Any) -> Any:
        names = [key.key for key in path]
        axes = tuple(range("blocks" in names, x.ndim))
        inputs, outputs = (axes[:1], axes[2:]) if "qkv" in names else (axes[:-1], axes[-1:])
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(dimensions, kernels)


def make_optimizer(config: OptimConfig, steps: int, towers: Mapping[str, Tower]) -> optax.GradientTransformation:
    """Make the optimizer `config.name` with `schedule` over the run's `steps`, gradient clipping and layer decay.

    Weight decay is decoupled: the learning rate times `weight_decay` times the parameter.
    """
    rate = schedule(config, steps)
    tx = _muon(config, rate, towers) if config.name == "muon" else _adamw(config, rate)
    if config.layer_decay != 1:
        # Weight decay is part of the update and scales with the layer's learning rate, like PyTorch's.
        scales = functools.partial(layer_scales, decay=config.layer_decay, towers=towers)
        tx = optax.chain(tx, optax.stateless(lambda x, _: jax.tree.map(operator.mul, x, scales(x))))
    if config.grad_clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
    return tx


def freeze(tx: optax.GradientTransformation, frozen: Collection[str]) -> optax.GradientTransformation:
    """Return `tx` without updates, weight decay and moments of the towers `frozen`."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        return "frozen" if path[0].key in frozen else "train"

    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels)


def ema_momentum(step: Any, steps: int, start: float) -> Any:
    """Return the momentum of the moving average at `step`, rising from `start` to 1 on a cosine of `steps`."""
    return 1 - (1 - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step, steps) / steps))
