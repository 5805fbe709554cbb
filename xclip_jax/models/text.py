"""The text tower: CLIP's causal transformer, pooled at an explicit end-of-text token."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.config.fields import above, at_least, choice, key
from xclip_jax.errors import UserError
from xclip_jax.models.layers import ACTIVATIONS, REMAT_POLICIES, LayerNorm, Transformer, named, tower_conflicts

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Config group `model.txt`; see `TextTransformer`. The vocabulary is the tokenizer's."""

    context_length: int = key(77, "tokens of a text, with its start and end", at_least(2))
    width: int = key(512, "channels of a token", at_least(1))
    depth: int = key(12, "blocks", at_least(1))
    heads: int = key(8, "attention heads; they divide width", at_least(1))
    mlp_ratio: float = key(4.0, "hidden width of the MLP over width", above(0))
    act: str = key("gelu", "activation of the MLP", choice(ACTIVATIONS))
    eps: float = key(1e-5, "added to the variance in LayerNorm", above(0))
    scan: bool = key(True, "one compiled block for all of them, with stacked parameters")
    remat: str = key("none", "what the backward pass computes again in place of keeping it", choice(REMAT_POLICIES))

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        yield from tower_conflicts(self.width, self.heads, self.mlp_ratio)


class TextTransformer(nn.Module):
    """int32 tokens (b, n) -> h_txt (b, d), the final state at the first `eot_id` of each row.

    Attention is causal, so what follows the end-of-text token (padding) cannot reach the feature. OpenAI's first
    release found the end as the argmax of the ids, which holds only for its own vocabulary.
    """

    vocab: int = 49408
    eot_id: int = 49407
    context_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    act: str = "gelu"
    eps: float = 1e-5
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text: Array) -> Array:
        if text.shape[1] > self.context_length:
            raise UserError(
                f"expected at most {self.context_length} tokens, got {text.shape[1]}; set model.txt.context_length."
            )
        tokens = self.param("tokens", named(nn.initializers.normal(0.02), "vocab", "table"), (self.vocab, self.width))
        shape = (self.context_length, self.width)
        positions = self.param("positions", named(nn.initializers.normal(0.01), None, "table"), shape)
        x = (tokens[text] + positions[: text.shape[1]]).astype(self.dtype)  # (b, n, d)
        x = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            True,
            self.act,
            self.eps,
            self.scan,
            self.remat,
            self.dtype,
            name="transformer",
        )(x)
        eot = jnp.argmax(text == self.eot_id, axis=1)  # (b,)
        x = jnp.take_along_axis(x, eot[:, None, None], axis=1)[:, 0]
        return LayerNorm(self.eps, self.dtype, name="norm_post")(x)
