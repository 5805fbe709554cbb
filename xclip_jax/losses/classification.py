"""Losses of labelled examples, for fine-tuning: cross-entropy with soft targets, squared error."""

import jax
import jax.numpy as jnp

Array = jax.Array


def targets(labels: Array, classes: int, smoothing: float = 0.0) -> Array:
    """Return smoothed labels (arXiv 1512.00567): class ids (b,) -> distributions fp32 (b, classes).

    The label has 1 - smoothing + smoothing / classes, every other class smoothing / classes.
    """
    return (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes


def cross_entropy(logits: Array, target: Array) -> Array:
    """Return the mean over the batch of -sum_k target_k log softmax(logits)_k, in nats; both (b, classes), in fp32."""
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1).mean()


def squared_error(predicted: Array, labels: Array) -> Array:
    """Return the mean of (predicted - label)^2; both (b,), in fp32."""
    return jnp.square(predicted.astype(jnp.float32) - labels).mean()
