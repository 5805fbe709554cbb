"""The optimizer, AdamW or another one from optax, with masked weight decay and layer decay, and its schedules."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, above, at_least, at_most, between, choice, fraction_below_one, key
from xclip_jax.models.lora import ADAPTERS
from xclip_jax.models.tower import Tower

Schedule = Callable[[Any], Any]
NAMES = ("adamw", "lion", "adafactor", "muon", "lamb")
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
    b1: float = key(0.9, "decay of the first moment; 0: adafactor keeps none", fraction_below_one(), card="optimizer")
    b2: float = key(
        0.98,
        "decay of the second moment (lion: of the momentum; adafactor: unused)",
        fraction_below_one(),
        card="optimizer",
    )
    eps: float = key(1e-8, "added to the second moment's root, except in adafactor", at_least(1e-15))
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

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embedding", "tokens", "positions", "probe")

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: dict[str, Any], decay: float, towers: Mapping[str, Tower]) -> dict[str, Any]:
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


def _scale_updates(scales: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Multiply updates by `scales` of their tree."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda x, scale: x if scale is True else x * scale, updates, scales(updates))
    )


def trained(params: Any, frozen: Collection[str], towers: Mapping[str, Tower]) -> Any:
    """Return whether each parameter is trained, see `frozen_layers`; stacked layers have broadcastable arrays."""
    layers = frozen_layers(frozen, towers)

    def trains(path: tuple[Any, ...], x: Any) -> Any:
        name, *rest = (key.key for key in path)
        if name not in layers:
            return True
        at = np.asarray(towers[name].layer_of(tuple(rest)))
        free = ~np.isin(at, list(layers[name]))
        if free.all() or not free.any():
            return bool(free.all())
        return free.reshape(-1, *[1] * (x.ndim - 1))

    return jax.tree_util.tree_map_with_path(trains, params)


def frozen_layers(frozen: Collection[str], towers: Mapping[str, Tower]) -> dict[str, set[int]]:
    """Return the numbers of the frozen layers by tower, see `Tower.layer_of`; the first and last are not blocks.

    Args:
      frozen: towers, their inputs ("img.embed") or ranges of blocks ("img.blocks.0-8", both ends included).
      towers: the model's towers, "img" and "txt".

    Raises:
      UserError: the tower does not have a block.
    """
    layers: dict[str, set[int]] = {}
    for part in frozen:
        name, _, place = part.partition(".")
        last = towers[name].num_layers - 1
        numbers = range(last + 1) if not place else range(1)
        if place.startswith("blocks."):
            first, _, end = place.removeprefix("blocks.").partition("-")
            numbers = range(int(first) + 1, int(end or first) + 2)
            if numbers.stop > last or not numbers:
                have = f"blocks of {name} are 0 to {last - 2}" if last > 1 else f"{name} has no blocks"
                raise UserError(f"init.freeze has {part!r}; {have}.")
        if place and last < 1:  # a custom tower with a single layer
            raise UserError(f"init.freeze has {part!r}; {name} has no blocks, name the whole tower: {name!r}.")
        layers.setdefault(name, set()).update(numbers)
    return layers


def stop_frozen(params: Any, frozen: Collection[str], towers: Mapping[str, Tower]) -> Any:
    """Return `params` without gradients of the frozen ones, see `trained`."""

    def stop(x: jax.Array, free: Any) -> jax.Array:
        if isinstance(free, np.ndarray):
            return jnp.where(free, x, jax.lax.stop_gradient(x))
        return x if free else jax.lax.stop_gradient(x)

    return jax.tree.map(stop, params, trained(params, frozen, towers))


Make = Callable[[OptimConfig, Schedule, Mapping[str, Tower]], optax.GradientTransformation]


def _decoupled(config: OptimConfig, rate: Schedule, towers: Mapping[str, Tower]) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101, the default), Lion (arXiv 2302.06675) or LAMB (arXiv 1904.00962).

    LAMB's trust ratio is one number for stacked blocks.
    """
    options: dict[str, Any] = {
        "b1": config.b1,
        "b2": config.b2,
        "weight_decay": config.weight_decay,
        "mask": decay_mask,
    }
    if config.name == "lion":
        return optax.lion(rate, **options)
    return (optax.lamb if config.name == "lamb" else optax.adamw)(rate, eps=config.eps, **options)


def _adafactor(config: OptimConfig, rate: Schedule, towers: Mapping[str, Tower]) -> optax.GradientTransformation:
    """Adafactor, arXiv 1804.04235, after arXiv 2106.04560: second moments as sums of rows and columns.

    Steps are absolute. Unlike `optax.adafactor`, clipping treats stacked blocks separately.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(_clip_rms, updates)),
        optax.scale_by_learning_rate(rate, flip_sign=False),
        *([optax.ema(config.b1, debias=False)] if config.b1 else []),
        optax.add_decayed_weights(lambda step: rate(step) * config.weight_decay, mask=decay_mask),
        optax.scale(-1),
    )


def _clip_rms(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """Limit the root mean square of an update to 1; stacked blocks are limited separately."""
    axes = tuple(range(_is_stacked(path), x.ndim))
    return x / jnp.maximum(1, jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True)))


def _is_stacked(path: tuple[Any, ...]) -> bool:
    """Return whether the first axis of the parameter at `path` counts blocks."""
    return any(key.key == "blocks" for key in path)


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

    transforms: dict[Any, optax.GradientTransformation] = {"muon": muon, "adamw": _decoupled(config, rate, towers)}
    return optax.partition(transforms, functools.partial(jax.tree_util.tree_map_with_path, label))


def _muon_dimensions(kernels: Any) -> Any:
    """Return each kernel's input and output axes; queries, keys, values and stacked blocks are separate matrices."""

    def dimensions(path: tuple[Any, ...], x: Any) -> Any:
        names = [key.key for key in path]
        axes = tuple(range(_is_stacked(path), x.ndim))
        inputs, outputs = (axes[:1], axes[2:]) if "qkv" in names else (axes[:-1], axes[-1:])
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(dimensions, kernels)


_OPTIMIZERS: dict[str, Make] = {"adafactor": _adafactor, "muon": _muon}


def make_optimizer(
    config: OptimConfig, steps: int, towers: Mapping[str, Tower], frozen: Collection[str] = ()
) -> optax.GradientTransformation:
    """Make the optimizer `config.name` with `schedule`, gradient clipping and layer decay.

    Weight decay is decoupled: the learning rate times `weight_decay` times the parameter, and with lamb also times the
    update's trust ratio. The schedule covers `steps`, the whole run. Frozen parameters (see `trained`) have no updates,
    weight decay or moments.
    """
    tx = _OPTIMIZERS.get(config.name, _decoupled)(config, schedule(config, steps), towers)
    if config.layer_decay != 1:
        # Weight decay is part of the update and scales with the layer's learning rate, like PyTorch's.
        tx = optax.chain(tx, _scale_updates(lambda updates: layer_scales(updates, config.layer_decay, towers)))
    if config.grad_clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
    return freeze(tx, frozen, towers) if frozen else tx


def freeze(
    tx: optax.GradientTransformation, frozen: Collection[str], towers: Mapping[str, Tower]
) -> optax.GradientTransformation:
    """Return `tx` without updates, weight decay and moments of frozen parameters, see `trained`."""
    # Stacked layers share their moments, but the frozen ones get no update.
    tx = optax.chain(tx, _scale_updates(lambda updates: trained(updates, frozen, towers)))

    def label(params: Any) -> Any:
        return jax.tree.map(lambda free: "train" if np.any(free) else "frozen", trained(params, frozen, towers))

    return optax.partition({"train": tx, "frozen": optax.set_to_zero()}, label)


def ema_momentum(step: Any, steps: int, start: float) -> Any:
    """Return the momentum of the moving average at `step`, rising from `start` to 1 on a cosine."""
    return 1 - (1 - start) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
