"""SLIP's linear probe (main_linear.py, after MoCo v3): SGD on a linear classifier over frozen features.

90 epochs at batch 1024, momentum 0.9, no weight decay, weights from N(0, 0.01), a cosine schedule with a value for each
epoch. The learning rate is not what the flags suggest: SLIP's code divides `--batch-size 128`, the batch of each GPU,
by the number of GPUs once more, so that 8 GPUs train batches of 1024 with 0.1 * 16 / 256 = 0.00625 and not with 0.4.
SLIP's numbers need that.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax import heartbeat

EPOCHS, BATCH, MOMENTUM = 90, 1024, 0.9
LR = 0.1 * (128 // 8) / 256
STD = 0.01

Head = tuple[Any, Any]  # weights (d, classes), bias (classes,)
State = tuple[Head, Head]  # the head and its velocity


def initial(d: int, classes: int, seed: int = 0) -> Head:
    """Return the head before training, fp32."""
    weights = STD * np.random.default_rng(seed).normal(size=(d, classes))
    return weights.astype(np.float32), np.zeros(classes, np.float32)


def order(n: int, batch: int, epoch: int, seed: int = 0) -> np.ndarray:
    """Return the items of each batch of an epoch, int (batches, batch); the last batch is padded with -1."""
    items = np.full(-(-n // batch) * batch, -1)
    items[:n] = np.random.default_rng((seed, epoch)).permutation(n)
    return items.reshape(-1, batch)


def fit(
    features: Callable[[int], np.ndarray],
    y: np.ndarray,
    classes: int,
    *,
    lr: float = LR,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    seed: int = 0,
) -> Head:
    """Train the head.

    Args:
      features: epoch -> fp32 (n, d), of that epoch's views of the items.
      y: classes int (n,).
      classes: number of them.
      lr: of the first epoch.
      epochs, batch: see the module.
      seed: of the head and of the order.
    """
    labels, rows = jnp.asarray(y, jnp.int32), min(batch, len(y))
    current = features(0)
    x = jnp.asarray(current, jnp.float32)
    head = jax.tree.map(jnp.asarray, initial(x.shape[1], classes, seed))
    state = (head, jax.tree.map(jnp.zeros_like, head))
    for epoch in range(epochs):
        heartbeat.beat()
        # Features of one view are the same array in each epoch, and are copied to the device once.
        if epoch and (following := features(epoch)) is not current:
            current, x = following, jnp.asarray(following, jnp.float32)
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        state = _epoch(x, labels, order(len(y), rows, epoch, seed), state, rate)
    weights, bias = state[0]
    return np.asarray(weights), np.asarray(bias)


@functools.partial(jax.jit, donate_argnums=3)
def _epoch(x: jax.Array, y: jax.Array, batches: jax.Array, state: State, lr: float) -> State:
    """Return head and velocity after an update for each of `batches`."""

    def loss(head: Head, items: jax.Array) -> jax.Array:
        weights, bias = head
        logits = jnp.matmul(x[items], weights, precision=jax.lax.Precision.HIGHEST) + bias
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), y[items][:, None], axis=1)[:, 0]
        valid = items >= 0
        return -(own * valid).sum() / valid.sum()

    def step(state: State, items: jax.Array) -> tuple[State, None]:
        head, velocity = state
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, jax.grad(loss)(head, items))
        return (jax.tree.map(lambda p, v: p - lr * v, head, velocity), velocity), None

    return jax.lax.scan(step, state, batches)[0]
