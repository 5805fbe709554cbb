"""SuperCLIP: CLIP with classification of the caption's tokens, as a term in a file outside the package.

config.objective.name = "superclip"
config.objective.terms = {"clip": 1.0, "tokens": 1.0}  # the weights of the paper's code
config.objective.plugins = {"tokens": {"type": "examples.superclip:Tokens"}}

Source: Zhao et al., "SuperCLIP: CLIP with Simple Classification Supervision", arXiv 2512.14480, and its code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from xclip_jax.core.fields import above, key
from xclip_jax.models.heads import Classifier, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import Check, Curve, Health, Term
from xclip_jax.objectives.term import Arrays, Result
from xclip_jax.parallel.sharding import argmax


@dataclasses.dataclass(frozen=True)
class Tokens(Term):
    """Classification of the caption's tokens by the image's pooled features, see `classify`.

    The paper's code uses the mean of the patches and a LayerNorm instead.
    """

    title: ClassVar[str] = "tokens"

    spread: float = key(1.0, "initial standard deviation of the head's weights, times the root of the width", above(0))

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Return a linear classifier of images with one class per token."""
        width = model.widths["img"]
        classifier = Classifier(vocab, self.spread * width**-0.5)
        return {"tokens": Head(classifier, input="img", output="tokens", flops=2 * vocab * width)}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, jax.Array]:
        """Return the document frequencies of the tokens."""
        return initial_state(vocab)

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        return classify(out["tokens"], batch["text"], batch["text_end"], state)

    def curves(self) -> tuple[Curve, ...]:
        """Return charts of the loss and the fraction of images whose most probable token is in their caption."""
        return (
            Curve("Token loss", (("loss", "tokens"),), "nats"),
            Curve("Most probable token in the caption", (("top1", "images"),), "%"),
        )

    def health(self, metrics: Mapping[str, float]) -> Health:
        """Judge whether the head names any tokens."""
        if "top1" not in metrics:
            return Health()
        meaning = "Share of images whose most probable token is in their caption; fails when the head learns nothing."
        remedy = "the most probable token is hardly ever in the caption. Lower optim.lr."
        check = Check("tokens", metrics["top1"], 0.01, meaning, remedy)
        return Health("A head that learns nothing names tokens at random.", (check,))


def initial_state(vocab: int) -> dict[str, jax.Array]:
    """Return the mean fraction of captions with each token, (vocab,), and the number of batches so far, ()."""
    return {"token_frequency": jnp.zeros(vocab), "token_batches": jnp.zeros(())}


def classify(logits: jax.Array, text: jax.Array, end: jax.Array, state: Arrays) -> Result:
    """Return the cross-entropy of a softmax over the vocabulary with the weighted tokens of captions, in nats.

    The target of image i is w_c / sum_c w_c for the different tokens c of its caption, and 0 for all others, with the
    inverse document frequency w_c = ln((n + 1) / (n_c + 1)): n counts the captions of all batches so far, with this
    one, and n_c those with the token. The end of a text and its padding do not count, as they do in the paper's code.

    Args:
      logits: fp32 (b, vocab), rows of the global batch.
      text: int32 tokens (b, n).
      end: int32 (b,), the position of each row's end token; padding follows it.
      state: result of `initial_state`, or the state after the last batch.

    Returns:
      The loss; metrics "loss" and "top1", the fraction of images whose most probable token is in their caption and has
      a weight; the next state.
    """
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


def first_uses(text: jax.Array, end: jax.Array) -> jax.Array:
    """Return a mask of each token's first occurrence before its row's `end` (b,), bool (b, n)."""
    n = text.shape[1]
    repeated = jnp.any((text[:, :, None] == text[:, None, :]) & jnp.tri(n, k=-1, dtype=bool), axis=2)
    return ~repeated & (jnp.arange(n) < end[:, None])
