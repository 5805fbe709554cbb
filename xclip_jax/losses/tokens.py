"""SuperCLIP's token classification: the tokens of a caption are classes of its image, and rare ones weigh most.

Source: Zhao et al., "SuperCLIP: CLIP with Simple Classification Supervision", arXiv 2512.14480, and its code.
"""

import chex
import jax
import jax.numpy as jnp

from xclip_jax.parallel.sharding import argmax

Array = jax.Array
Metrics = dict[str, Array]
State = dict[str, Array]


def initial_state(vocab: int) -> State:
    """Return the mean fraction of captions with each token, (vocab,), and the number of batches so far, ()."""
    return {"token_frequency": jnp.zeros(vocab), "token_batches": jnp.zeros(())}


def classify(logits: Array, text: Array, end: Array, state: State) -> tuple[Array, Metrics, State]:
    """Return the cross-entropy of a softmax over the vocabulary with the weighted tokens of captions, in nats.

    The target of image i is w_c / sum_c w_c for the different tokens c of its caption, and 0 for all others, with the
    inverse document frequency w_c = ln((n + 1) / (n_c + 1)): n counts the captions of all batches so far, with
    this one, and n_c those with the token. A token of every caption, such as the start, has weight 0. The paper's code
    counts ends and padding, which nearly every caption has, as tokens; here they do not count [ours]. A caption whose
    tokens all have weight 0 has loss 0.

    Args:
      logits: fp32 (b, vocab), rows of the global batch.
      text: int32 tokens (b, n).
      end: int32 (b,), the position of each row's end token; padding follows it.
      state: result of `initial_state`, or the state after the last batch.

    Returns:
      The loss (fp32 scalar); fp32 scalar metrics "loss" and "top1", the fraction of images whose most probable token is
      in their caption and has a weight; the next state.
    """
    chex.assert_rank([logits, text], 2)
    b, vocab = logits.shape
    counts = first_uses(text, end)
    # Gathers and scatters along the vocabulary stay within a device's rows; K-hot targets would be as large as logits.
    share = jnp.zeros(vocab).at[text].add(counts.astype(jnp.float32)) / b
    batches = state["token_batches"] + 1
    frequency = state["token_frequency"] + (share - state["token_frequency"]) / batches
    one = 1 / (batches * b)  # caption, as a fraction of all
    weights = jnp.where(counts, jnp.log((1 + one) / (frequency + one))[text], 0.0)
    target = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-12)
    log_p = jnp.take_along_axis(logits, text, axis=1) - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    loss = -jnp.mean(jnp.sum(target * log_p, axis=1))
    hits = jnp.any((text == argmax(logits, 1)[:, None]) & (weights > 0), axis=1)
    metrics = {"loss": loss, "top1": jnp.mean(hits, dtype=jnp.float32)}
    return loss, metrics, {"token_frequency": frequency, "token_batches": batches}


def first_uses(text: Array, end: Array) -> Array:
    """Return a mask of each token's first occurrence before its row's `end` (b,), bool (b, n)."""
    n = text.shape[1]
    repeated = jnp.any((text[:, :, None] == text[:, None, :]) & jnp.tri(n, k=-1, dtype=bool), axis=2)
    return ~repeated & (jnp.arange(n) < end[:, None])
