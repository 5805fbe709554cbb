"""The text tower: CLIP's causal transformer, pooled at an explicit end-of-text token, with SigLIP's options."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import at_least, choice, key
from xclip_jax.models.layers import LayerNorm, Transformer, TransformerConfig, token_at
from xclip_jax.models.linear import named
from xclip_jax.models.tower import Params, TextTower

Array = jax.Array
POOLS = ("eot", "last")


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TransformerConfig, TextTower):
    """Config group `model.txt`; see `TextTransformer`. The vocabulary is the tokenizer's."""

    meaning_keys: ClassVar[tuple[str, ...]] = ("act", "eps", "causal", "pool")
    before: ClassVar[tuple[str, ...]] = ("tokens", "positions")

    context_length: int = key(77, "tokens of a text, with its start and end", at_least(2))
    causal: bool = key(True, "a token attends to itself and those before it alone; padding counts as tokens")
    pool: str = key("eot", "first end-of-text token, or the last token, padding included", choice(POOLS))

    def module(self, vocab: int, eot_id: int, dtype: DTypeLike) -> nn.Module:
        """Make the `TextTransformer`."""
        return TextTransformer(self, vocab, eot_id, dtype)

    def flops(self, train: bool) -> float:
        """FLOPs of the blocks on a whole context."""
        return self.block_flops(self.context_length, one=True)

    @property
    def cuttable(self) -> bool:
        """Whether attention is causal and the feature is that of the end of the text."""
        return self.causal and self.pool == "eot"

    def cut_flops(self, tokens: int) -> float:
        """FLOPs of the blocks on `tokens` tokens."""
        return self.block_flops(tokens, one=True)

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Stack blocks or take them apart, and cut positions to the context length."""
        params, notes = super().convert(params)
        n = len(params["positions"])
        if n < self.context_length:
            raise UserError(
                f"positions are those of {n} tokens and context_length is {self.context_length}; set it to {n} or less"
            )
        if n > self.context_length:
            notes = [*notes, f"text positions cut from {n} to {self.context_length}"]
        return {**params, "positions": params["positions"][: self.context_length]}, notes

    def describe(self) -> str:
        """Sizes of the tower in one phrase."""
        return f"transformer of width {self.width}, depth {self.depth}, {self.context_length} tokens"


class TextTransformer(nn.Module):
    """int32 tokens (b, n) -> h_txt (b, d), the final state at the first `eot_id` of each row.

    CLIP's attention is causal, so what follows the end-of-text token (padding) cannot reach the feature. OpenAI's first
    release found the end as the argmax of the ids, which holds only for its own vocabulary. SigLIP's is not causal and
    the feature is the state of the last token: texts are padded to one length, and padding is a part of them.
    """

    config: TextTowerConfig
    vocab: int
    eot_id: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, text: Array) -> Array:
        width, length = self.config.width, self.config.context_length
        if text.shape[1] > length:
            raise ValueError(f"expected at most {length} tokens, got {text.shape[1]}")
        tokens = self.param("tokens", named(nn.initializers.normal(0.02), "vocab", "table"), (self.vocab, width))
        positions = self.param("positions", named(nn.initializers.normal(0.01), None, "table"), (length, width))
        x = (tokens[text] + positions[: text.shape[1]]).astype(self.dtype)  # (b, n, d)
        if self.config.pool == "last":
            at = jnp.full(len(text), text.shape[1] - 1)
        else:
            at = jnp.argmax(text == self.eot_id, axis=1)  # (b,)
        x = Transformer(self.config, causal=self.config.causal, dtype=self.dtype, name="transformer")(x, at=at)
        x = token_at(x, at) if self.config.scan else x  # (b, 1, d)
        return LayerNorm(self.config.eps, self.dtype, name="norm_post")(x[:, 0])
