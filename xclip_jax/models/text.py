"""The text tower: CLIP's causal transformer, pooled at an explicit end-of-text token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.errors import UserError
from xclip_jax.models.layers import LayerNorm, Transformer, named

Array = jax.Array


class TextTransformer(nn.Module):
    """int32 tokens (b, n) -> h_txt (b, d), the final state at the first `eot_id` of each row.

    Attention is causal, so what follows the end-of-text token (padding) cannot reach the feature. OpenAI's first
    release found the end as the argmax of the ids, which holds only for its own vocabulary.
    """

    vocab: int = 49408
    eot_id: int = 49407
    length: int = 77
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
        if self.width % self.heads:
            raise UserError(f"model.txt: width {self.width} must be a multiple of heads {self.heads}.")
        if text.shape[1] > self.length:
            raise UserError(f"{text.shape[1]} tokens met a tower of length {self.length}; set model.txt.length.")
        tokens = self.param("tokens", named(nn.initializers.normal(0.02), "vocab", "table"), (self.vocab, self.width))
        shape = (self.length, self.width)
        positions = self.param("positions", named(nn.initializers.normal(0.01), None, "table"), shape)
        x = (tokens[text] + positions[: text.shape[1]]).astype(self.dtype)  # (b, n, d)
        x = Transformer(
            self.depth, self.heads, self.mlp_ratio, True, self.act, self.eps, self.scan, self.remat, self.dtype,
            name="transformer",
        )(x)
        eot = jnp.argmax(text == self.eot_id, axis=1)  # (b,)
        x = jnp.take_along_axis(x, eot[:, None, None], axis=1)[:, 0]
        return LayerNorm(self.eps, self.dtype, name="norm_post")(x)
