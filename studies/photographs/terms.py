"""SuperCLIP's tokens with a head over the tokens that occur: a control whose cost is that of a cluster head."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.losses import tokens
from xclip_jax.models.heads import Classifier, Head, Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.superclip import Tokens
from xclip_jax.objectives.term import Arrays, Result

FILE = pathlib.Path(__file__).with_name("tokens.txt")
MOST = 4096


@functools.cache
def common_tokens() -> np.ndarray:
    """Return the tokens with a class of their own, int (n,), the start of a text first.

    They are the commonest of the tokenizer "clip" in the titles of the training file.
    """
    return np.array(FILE.read_text().split(), int)


@dataclasses.dataclass(frozen=True)
class CommonTokens(Tokens):
    """`Tokens` over `common_tokens`.

    All other tokens share the class of the start of a text, which is in every caption and so has the weight 0.
    """

    title: ClassVar[str] = "common tokens"

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """A linear classifier of images with a class for each common token."""
        width, classes = model.widths["img"], len(common_tokens())
        return {"tokens": Head(Classifier(classes, width**-0.5), "img", "tokens", flops=2 * classes * width)}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, jax.Array]:
        """Document frequencies of the common tokens."""
        return tokens.initial_state(len(common_tokens()))

    def __call__(self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any]) -> Result:
        """Compute the loss, see `Term.__call__`."""
        known = common_tokens()
        classes = np.zeros(int(known.max()) + 1, np.int32)
        classes[known] = np.arange(len(known))
        text = jnp.asarray(classes)[jnp.minimum(batch["text"], len(classes) - 1)]
        text = jnp.where(batch["text"] < len(classes), text, 0)
        return tokens.classify(out["tokens"], text, batch["text_end"], dict(state))
