"""SuperCLIP: CLIP with classification of the caption's tokens; a term and a recipe outside the package.

    PYTHONPATH=. xclip-jax train --config examples/superclip.py:pairs=/my/pairs

The recipe is `small` with the term. Any other recipe takes it by

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
import ml_collections

from configs import small
from xclip_jax.config import recipes
from xclip_jax.core.fields import above, at_least, key
from xclip_jax.models.heads import Classifier, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import Check, Curve, Health, Term
from xclip_jax.objectives.term import Arrays, Result
from xclip_jax.parallel.sharding import argmax

SMALL_HEAD = 4096  # of small towers, whose steps a head over all of CLIP's tokens would lengthen by 0.6


@dataclasses.dataclass(frozen=True)
class Tokens(Term):
    """Classification of the caption's tokens by the image's pooled features, see `classify`.

    The paper's code uses the mean of the patches and a LayerNorm instead.
    """

    title: ClassVar[str] = "tokens"

    spread: float = key(1.0, "initial standard deviation of the head's weights, times the root of the width", above(0))
    outputs: int = key(0, "size of the head, for the tokens that appear first in training; 0 for all", at_least(0))

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Return a linear classifier of images with one class per token, or `outputs` classes."""
        width, outputs = model.widths["img"], self.outputs or vocab
        classifier = Classifier(outputs, self.spread * width**-0.5)
        return {"tokens": Head(classifier, input="img", output="tokens", flops=2 * outputs * width)}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, jax.Array]:
        """Return the document frequencies of the tokens and, for `outputs`, the class of each token."""
        numbers = {"token_classes": jnp.zeros(vocab, jnp.int32)} if self.outputs else {}
        return initial_state(self.outputs or vocab) | numbers

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        text, numbers = batch["text"], {}
        counts = first_uses(text, batch["text_end"])
        if self.outputs:
            numbers["token_classes"] = number(state["token_classes"], text, counts, self.outputs)
            text = numbers["token_classes"][text]
            counts &= text > 0
        loss, metrics, state = classify(out["tokens"], text, counts, state)
        return loss, metrics, state | numbers

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


def number(classes: jax.Array, text: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """Return the class of each token, int32 (vocab,), after new tokens of a batch got the next free ones below `most`.

    Args:
      classes: int32 (vocab,), the classes so far; 0 for none.
      text: int32 tokens (b, n).
      counts: bool (b, n), the positions of tokens to classify.
      most: number of classes.
    """
    new = jnp.zeros(classes.shape, bool).at[text].max(counts) & (classes == 0)
    numbers = jnp.max(classes) + jnp.cumsum(new, dtype=jnp.int32)
    return jnp.where(new & (numbers < most), numbers, classes)


def classify(logits: jax.Array, text: jax.Array, counts: jax.Array, state: Arrays) -> Result:
    """Return the cross-entropy of a softmax over the vocabulary with the weighted tokens of captions, in nats.

    The target of image i is w_c / sum_c w_c for the different tokens c of its caption, and 0 for all others, with the
    inverse document frequency w_c = ln((n + 1) / (n_c + 1)): n counts the captions of all batches so far, with this
    one, and n_c those with the token.

    Args:
      logits: fp32 (b, vocab), rows of the global batch.
      text: int32 tokens (b, n).
      counts: bool (b, n), see `first_uses`.
      state: result of `initial_state`, or the state after the last batch.

    Returns:
      The loss; metrics "loss" and "top1", the fraction of images whose most probable token is in their caption and has
      a weight; the next state.
    """
    b, vocab = logits.shape
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
    """Return a mask of each token's first occurrence before its row's `end` (b,), bool (b, n).

    The end of a text and its padding do not count, as they do in the paper's code.
    """
    n = text.shape[1]
    repeated = jnp.any((text[:, :, None] == text[:, None, :]) & jnp.tri(n, k=-1, dtype=bool), axis=2)
    return ~repeated & (jnp.arange(n) < end[:, None])


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Return the config of the recipe `small`."""
    return small.get_config(arg)


def fill_in(config: ml_collections.ConfigDict, arg: str | None = None) -> recipes.Describe:
    """Fill in the recipe `small`, and add the term."""
    describe = small.fill_in(config, arg)
    outputs = SMALL_HEAD if config.model.img.width <= small.SMALL_WIDTH else 0
    config.objective.name = "superclip"
    config.objective.terms = {**config.objective.terms, "tokens": 1.0}
    config.objective.plugins = {"tokens": {"type": "examples.superclip:Tokens", "outputs": outputs}}
    return describe
