"""Texts encoded in groups of their lengths by the step, see `xclip_jax.data.length_groups`."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.parallel import sharding

Sizes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class LengthOrder:
    """The rows of each device and microbatch in the order of their texts' lengths, and cut into groups.

    No row changes its device or its microbatch. Rows of a microbatch are `microbatches` apart, as
    `sharding.map_microbatches` takes them.

    Attributes:
      lengths: int (parts, rows, microbatches) tokens of each text, the parts of the devices first.
      order, inverse: which row comes at each place, and the place of each row, of the same shape.
      sizes: ((rows, tokens), ...) of the groups.
    """

    lengths: jax.Array
    order: jax.Array
    inverse: jax.Array
    sizes: Sizes

    @classmethod
    def from_tokens(cls, text: jax.Array, eot_id: int, sizes: Sizes, microbatches: int = 1) -> Self:
        """The order of tokens (b, n), whose texts end with their first `eot_id`; the tower reads nothing after it."""
        rows = sum(n for n, _ in sizes)
        lengths = _split(jnp.argmax(text == eot_id, axis=-1) + 1, rows, microbatches)
        order = jnp.argsort(lengths, axis=1)
        return cls(lengths, order, jnp.argsort(order, axis=1), sizes)

    @property
    def fits(self) -> jax.Array:
        """Whether no text is longer than its group, on all devices, bool."""
        last = np.cumsum([n for n, _ in self.sizes]) - 1
        longest = jnp.sort(self.lengths, axis=1)[:, last]
        return jnp.all(longest <= jnp.array([tokens for _, tokens in self.sizes])[:, None])

    def split(self, x: jax.Array, *, cut: bool = False) -> tuple[jax.Array, ...]:
        """Rows (b, ...) -> those of each group, (rows, ...); with `cut` their second axis ends with the group."""
        _, rows, microbatches = self.lengths.shape
        ordered = _reorder(_split(x, rows, microbatches), self.order, self.inverse)
        groups, start = [], 0
        for n, tokens in self.sizes:
            group = _join(ordered[:, start : start + n])
            groups.append(group[:, :tokens] if cut else group)
            start += n
        return tuple(groups)

    def join(self, groups: Sequence[jax.Array]) -> jax.Array:
        """What was made of each group, (rows, ...) -> (b, ...) in the order of the batch."""
        microbatches = self.lengths.shape[2]
        parts = [_split(x, n, microbatches) for x, (n, _) in zip(groups, self.sizes, strict=True)]
        return _join(_reorder(jnp.concatenate(parts, axis=1), self.inverse, self.order))


def _split(x: jax.Array, rows: int, microbatches: int) -> jax.Array:
    """(b, ...) -> (parts, rows, microbatches, ...)."""
    x = x.reshape(-1, rows, microbatches, *x.shape[1:])
    return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))


def _join(x: jax.Array) -> jax.Array:
    """(parts, rows, microbatches, ...) -> (b, ...)."""
    x = x.reshape(-1, *x.shape[3:])
    return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of (parts, rows, microbatches, ...) by `order`. The derivative reads by `inverse`, where XLA's scatters."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=1)


def _reorder_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _reorder(x, order, inverse), (order, inverse)


def _reorder_backward(orders: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = orders
    return _reorder(g, inverse, order), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
