"""SLIP's linear probe (main_linear.py, after MoCo v3): SGD on a linear classifier over frozen features.

90 epochs at batch 1024, momentum 0.9, no weight decay, weights from N(0, 0.01), a cosine that falls once an epoch. The
trap is the learning rate: its code divides `--batch-size 128`, which is meant for each GPU, by the number of GPUs once
more, so that 8 GPUs train batches of 1024 with 0.1 * 16 / 256 = 0.00625 and not with 0.4. SLIP's numbers need that.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EPOCHS, BATCH, MOMENTUM = 90, 1024, 0.9
LR = 0.1 * (128 // 8) / 256
STD = 0.01

Head = tuple[Any, Any]  # weights (d, classes), bias (classes,)
State = tuple[Head, Head]  # the head and its velocity


def initial(d: int, classes: int, seed: int = 0) -> Head:
    """The head before training, fp32."""
    weights = STD * np.random.default_rng(seed).normal(size=(d, classes))
    return weights.astype(np.float32), np.zeros(classes, np.float32)


def order(n: int, batch: int, epoch: int, seed: int = 0) -> np.ndarray:
    """Items of each batch of an epoch, int (batches, batch); the last one is filled up with -1."""
    places = np.full(-(-n // batch) * batch, -1)
    places[:n] = np.random.default_rng((seed, epoch)).permutation(n)
    return places.reshape(-1, batch)


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
    """Trains the head.

    Args:
      features: epoch -> fp32 (n, d), those of that epoch's views of the items.
      y: classes int (n,).
      classes: number of them.
      lr: of the first epoch.
      epochs, batch: see the module.
      seed: of the head and of the order.
    """
    labels, state, rows = jnp.asarray(y, jnp.int32), None, min(batch, len(y))
    previous, x = None, None
    for epoch in range(epochs):
        current = features(epoch)
        if current is not previous:  # frozen features of one view need not travel again
            previous, x = current, jnp.asarray(current, jnp.float32)
        if state is None:
            head = jax.tree.map(jnp.asarray, initial(x.shape[1], classes, seed))
            state = (head, jax.tree.map(jnp.zeros_like, head))
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        state = _epoch(x, labels, order(len(y), rows, epoch, seed), state, rate)
    weights, bias = state[0]
    return np.asarray(weights), np.asarray(bias)


@functools.partial(jax.jit, donate_argnums=3)
def _epoch(x: jax.Array, y: jax.Array, batches: jax.Array, state: State, lr: float) -> State:
    def loss(head: Head, items: jax.Array) -> jax.Array:
        weights, bias = head
        logits = jnp.matmul(x[items], weights, precision=jax.lax.Precision.HIGHEST) + bias
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), y[items][:, None], axis=1)[:, 0]
        there = items >= 0
        return -(own * there).sum() / there.sum()

    def step(state: State, items: jax.Array) -> tuple[State, None]:
        head, velocity = state
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, jax.grad(loss)(head, items))
        return (jax.tree.map(lambda p, v: p - lr * v, head, velocity), velocity), None

    return jax.lax.scan(step, state, batches)[0]
