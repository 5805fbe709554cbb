"""SuperCLIP's term: a linear head on image features predicts the tokens of the caption, without negatives."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from xclip_jax.losses import tokens
from xclip_jax.models.heads import Classifier, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.term import Arrays, Curve, Report, Result, Term

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tokens(Term):
    """Token classification, see `losses.tokens.classify`; SuperCLIP (arXiv 2512.14480) is the sum of clip and tokens.

    The head reads the same pooled features as CLIP's projection [ours]; the paper's code uses the mean of the patches
    and a LayerNorm.
    """

    title: ClassVar[str] = "tokens"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """A linear classifier of images with one class per token."""
        width = model.widths["img"]
        return {"tokens": Head(Classifier(vocab, width**-0.5), "img", "tokens", flops=2 * vocab * width)}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Document frequencies of the tokens."""
        return tokens.initial_state(vocab)

    def __call__(self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any]) -> Result:
        """Compute the loss, see `Term.__call__`."""
        return tokens.classify(out["tokens"], batch["text"], batch["text_end"], dict(state))

    @property
    def report(self) -> Report:
        return TokensReport(self)


@dataclasses.dataclass(frozen=True)
class TokensReport(Report[Tokens]):
    """Report of token classification."""

    def curves(self) -> tuple[Curve, ...]:
        """Loss, and the fraction of images whose most probable token is in their caption."""
        return (
            Curve("Token loss", (("loss", "tokens"),), "nats"),
            Curve("Most probable token in the caption", (("top1", "images"),), "%"),
        )
