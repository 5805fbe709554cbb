"""SuperCLIP's token classification (arXiv 2512.14480): image features say which tokens their caption has."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.core.fields import fraction_below_one, key
from xclip_jax.models.heads import Head
from xclip_jax.objectives import Check, Curve, Health, Report, Term


@dataclasses.dataclass(frozen=True)
class TokenClassification(Term):
    """Cross-entropy of a linear head on image features with the tokens of the text, weighted by their rarity."""

    title: ClassVar[str] = "token classification"

    momentum: float = key(0.9, "of the running document frequencies", fraction_below_one())

    def heads(self, model, vocab):
        """A linear head of the vocabulary's size."""
        head = Head(nn.Dense(vocab), reads="img", writes="tokens", flops=2 * vocab * model.widths["img"])
        return {"token_classifier": head}

    def initial_state(self, model, vocab):
        """Document frequencies: the share of texts that have a token."""
        return {"token_frequency": jnp.zeros(vocab)}

    def __call__(self, out, teacher, state, batch):
        """See `Term.__call__`."""
        logits, text = out["tokens"], batch["text"]  # (b, vocab), (b, n)
        present = jnp.zeros_like(logits).at[jnp.arange(len(text))[:, None], text].set(1.0).at[:, 0].set(0.0)
        frequency = self.momentum * state["token_frequency"] + (1 - self.momentum) * present.mean(axis=0)
        weighted = present * -jnp.log(frequency + 1e-3)
        target = weighted / jnp.maximum(weighted.sum(axis=1, keepdims=True), 1e-6)
        loss = -(target * jax.nn.log_softmax(logits)).sum(axis=1).mean()
        best = jnp.take_along_axis(present, logits.argmax(axis=1)[:, None], axis=1)
        return loss, {"loss": loss, "top1": best.mean()}, {"token_frequency": frequency}

    @property
    def report(self):
        """Its charts, and a check."""
        return TokenReport(self)


class TokenReport(Report):
    """What reports show."""

    def curves(self):
        """The loss, and the share of images whose most probable token is in their caption."""
        return (*super().curves(), Curve("Tokens in the caption", (("top1", "images"),), "%"))

    def health(self, metrics):
        """A head that learns nothing stays at the loss of a blind guess."""
        meaning, measured = "Fails when the head learns nothing.", f"The loss is {metrics['loss']:.2f} nats."
        remedy = "the loss is above 20 nats; lower optim.lr."
        check = Check("tokens", metrics["loss"], 20.0, meaning, remedy, measured, above=True)
        curve = Curve("Token loss", (("loss", "loss"),), "nats", (check.level,))
        return Health("It starts at ln v, v being the size of the vocabulary.", (check,), (curve,))
