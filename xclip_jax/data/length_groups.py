"""Groups texts by length, so that a step does not encode padding.

Most captions fill a fraction of the context, and the longest caption of a large batch fills all of it. So each device
sorts its texts by length, and encodes a few groups, each cut to one length. All shapes are fixed: a batch whose texts
do not fit the groups is computed whole.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from xclip_jax.parallel import sharding

Sizes = tuple[tuple[int, int], ...]

AUTO, FULL = "auto", "full"
MAX_GROUPS = 4  # including the whole context; each is another pass over the tower's weights
_MULTIPLE = 8  # other lengths are not faster on accelerators
_MISFITS = 0.005  # largest share of steps computed whole
# Groups double the compiled program, so "auto" avoids them below this saving of a step's FLOPs, or in shorter runs.
_LEAST_SAVING, _LEAST_STEPS = 0.05, 1000


@dataclasses.dataclass(frozen=True)
class LengthGroups:
    """Cuts ((tokens, share), ...), both rising: up to `share` of the texts, the shortest ones, have `tokens` positions.

    All other texts have the whole context.
    """

    cuts: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Parse a result of `str`, such as "24:0.6,40:0.9" or "full"."""
        pairs = [] if spec == FULL else [cut.split(":") for cut in spec.split(",")]
        return cls(tuple((int(tokens), float(share)) for tokens, share in pairs))

    def __str__(self) -> str:
        return ",".join(f"{tokens}:{share:g}" for tokens, share in self.cuts) or FULL

    def sizes(self, rows: int, context: int) -> Sizes:
        """Return ((rows, tokens), ...) of the non-empty groups of `rows` texts; () if nothing is cut."""
        ends = [(int(share * rows + 1e-6), min(tokens, context)) for tokens, share in self.cuts]
        sizes, start = [], 0
        for end, tokens in [*ends, (rows, context)]:
            if end > start:
                sizes.append((end - start, tokens))
                start = end
        return tuple(sizes) if sizes[0][1] < context else ()


WHOLE = LengthGroups()


def choose(counts: np.ndarray, *, rows: int, draws: int, flops_of: Callable[[int], float]) -> LengthGroups:
    """Return at most `MAX_GROUPS` groups with the fewest FLOPs, which nearly all batches fit.

    Args:
      counts: number of sampled texts by length in tokens, (context + 1,).
      rows: texts that a device sorts together.
      draws: number of sorts per step on all devices.
      flops_of: function from a text's length in tokens to FLOPs.
    """
    context = len(counts) - 1
    ends: dict[int, int] = {}
    for tokens in range(_MULTIPLE, context, _MULTIPLE):
        # Longer texts in the sample, and a margin for chance.
        longer = counts[tokens + 1 :].sum()
        p = min((longer + 2 * longer**0.5 + 1) / counts.sum(), 1)
        most = scipy.stats.binom.isf(_MISFITS / draws / MAX_GROUPS, rows, p)
        fitting = rows - int(most)
        if fitting > 0:
            ends[tokens] = fitting

    def flops(groups: LengthGroups) -> float:
        return sum(n * flops_of(tokens) for n, tokens in groups.sizes(rows, context) or [(rows, context)])

    best = WHOLE
    for n in range(1, MAX_GROUPS):
        for lengths in itertools.combinations(ends, n):
            # In millionths, like in a config, and rounded up, since otherwise `sizes` would lose a row.
            cuts = tuple((tokens, -(-ends[tokens] * 10**6 // rows) / 10**6) for tokens in lengths)
            if all(a[1] < b[1] for a, b in itertools.pairwise(cuts)):
                best = min(best, LengthGroups(cuts), key=flops)
    return best


def worthwhile(saved: float, steps: int) -> bool:
    """Whether "auto" uses groups with this saving of a step's FLOPs, as a share, in a run of `steps`."""
    return saved >= _LEAST_SAVING and steps >= _LEAST_STEPS


@dataclasses.dataclass(frozen=True)
class LengthOrder:
    """Sorts the rows of each device and microbatch by text length, and cuts them into groups.

    Rows of a microbatch are `microbatches` apart, see `sharding.map_microbatches`; each device has a part.
    """

    lengths: jax.Array  # tokens of each text, int (parts, rows, microbatches)
    order: jax.Array  # row at each place, of the same shape
    inverse: jax.Array  # place of each row
    sizes: Sizes  # ((rows, tokens), ...) of the groups

    @classmethod
    def from_tokens(cls, text: jax.Array, eot_id: int, sizes: Sizes, microbatches: int = 1) -> Self:
        """Sort tokens (b, n) or (b, k, n) by the length of their longest text, including its first `eot_id`."""
        rows = sum(n for n, _ in sizes)
        lengths = jnp.argmax(text == eot_id, axis=-1) + 1
        lengths = _split(lengths if text.ndim == 2 else jnp.max(lengths, axis=1), rows, microbatches)
        order = jnp.argsort(lengths, axis=1)
        return cls(lengths, order, jnp.argsort(order, axis=1), sizes)

    @property
    def fits(self) -> jax.Array:
        """Whether all texts fit their groups on all devices, bool."""
        last = np.cumsum([n for n, _ in self.sizes]) - 1
        longest = jnp.sort(self.lengths, axis=1)[:, last]
        return jnp.all(longest <= jnp.array([tokens for _, tokens in self.sizes])[:, None])

    def split(self, x: jax.Array, *, cut: bool = False) -> tuple[jax.Array, ...]:
        """Split rows (b, ...) into (rows, ...) for each group; `cut` shortens the last axis to the group's tokens."""
        _, rows, microbatches = self.lengths.shape
        ordered = _reorder(_split(x, rows, microbatches), self.order, self.inverse)
        groups, start = [], 0
        for n, tokens in self.sizes:
            group = _join(ordered[:, start : start + n])
            groups.append(group[..., :tokens] if cut else group)
            start += n
        return tuple(groups)

    def join(self, groups: Sequence[jax.Array]) -> jax.Array:
        """Join the groups' results, (rows, ...), to (b, ...) in the order of the batch."""
        microbatches = self.lengths.shape[2]
        parts = [_split(x, n, microbatches) for x, (n, _) in zip(groups, self.sizes, strict=True)]
        return _join(_reorder(jnp.concatenate(parts, axis=1), self.inverse, self.order))


def _split(x: jax.Array, rows: int, microbatches: int) -> jax.Array:
    """(b, ...) -> (parts, rows, microbatches, ...)."""
    x = x.reshape(-1, rows, microbatches, *x.shape[1:])
    return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))


def _join(x: jax.Array) -> jax.Array:
    """Return rows of all parts in the order of the batch, (parts, rows, microbatches, ...) -> (b, ...)."""
    x = x.reshape(-1, *x.shape[3:])
    return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorder rows of (parts, rows, microbatches, ...); the derivative gathers by `inverse` instead of scattering."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=1)


def _reorder_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _reorder(x, order, inverse), (order, inverse)


def _reorder_backward(orders: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = orders
    return _reorder(g, inverse, order), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
