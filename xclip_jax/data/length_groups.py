"""Groups of texts by length: which share of a batch's texts is computed at how many tokens.

Captions fill a fraction of the context, and the longest of a large batch nearly always fills all of it. So the rows of
each device are ordered by length and encoded in a few groups, each cut to a length of its own. All shapes are fixed: a
batch whose texts do not fit the groups is computed whole.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Self

import numpy as np
import scipy

from xclip_jax.core.errors import UserError

AUTO, FULL = "auto", "full"
# The last group has the whole context; each more is a pass of its own over the tower's weights.
MAX_GROUPS = 4
# Accelerators compute lengths in between no faster.
_MULTIPLE = 8
# Share of steps that may be computed whole.
_MISFITS = 0.005
# Groups double what is compiled: auto leaves them where they would save less of a step's FLOPs, or in a shorter run.
_LEAST_SAVING, _LEAST_STEPS = 0.05, 1000


@dataclasses.dataclass(frozen=True)
class LengthGroups:
    """Cuts ((tokens, share), ...), both rising: up to `share` of the texts, the shortest ones, have `tokens` positions.

    What is left has the whole context. Without cuts all texts do.
    """

    cuts: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Parse config key `data.length_groups`, such as "24:0.6,40:0.9"; "auto" and "full" have no cuts.

        Raises:
          UserError: anything else.
        """
        if spec in (AUTO, FULL):
            return cls()
        try:
            cuts = tuple((int(tokens), float(share)) for tokens, share in (cut.split(":") for cut in spec.split(",")))
        except ValueError:
            cuts = ()
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(cuts))
        if not (cuts and rising and cuts[0][0] >= 1 and cuts[0][1] > 0 and cuts[-1][1] <= 1):
            raise UserError(f"{spec!r} is not {AUTO!r}, {FULL!r} or rising TOKENS:SHARE pairs, such as 24:0.6,40:0.9.")
        return cls(cuts)

    def __str__(self) -> str:
        return ",".join(f"{tokens}:{share:g}" for tokens, share in self.cuts) or FULL

    def sizes(self, rows: int, context: int) -> tuple[tuple[int, int], ...]:
        """((rows, tokens), ...) of the groups of `rows` texts, without empty ones; () where nothing is cut."""
        ends = [(int(share * rows + 1e-6), min(tokens, context)) for tokens, share in self.cuts]
        sizes, start = [], 0
        for end, tokens in [*ends, (rows, context)]:
            if end > start:
                sizes.append((end - start, tokens))
                start = end
        return tuple(sizes) if sizes[0][1] < context else ()

    def mean(self, of_length: Callable[[int], float], context: int) -> float:
        """The mean of `of_length` over texts, each as long as its group is."""
        total, start = 0.0, 0.0
        for tokens, share in self.cuts:
            total, start = total + (share - start) * of_length(min(tokens, context)), share
        return total + (1 - start) * of_length(context)


WHOLE = LengthGroups()


def choose(
    counts: np.ndarray, *, rows: int, draws: int, flops_of: Callable[[int], float], groups: int = MAX_GROUPS
) -> LengthGroups:
    """The groups with the fewest FLOPs that all but a few batches fit.

    Args:
      counts: (context + 1,) how many of some texts have a length, in tokens.
      rows: texts that are ordered together, those of a device.
      draws: how often a step does so, on all devices.
      flops_of: tokens -> FLOPs of a text of that length.
      groups: at most this number, the one of the whole context included.
    """
    context = len(counts) - 1
    ends: dict[int, int] = {}
    for tokens in range(_MULTIPLE, context, _MULTIPLE):
        # Longer ones among those counted, and as many more as chance may have kept out of them.
        longer = counts[tokens + 1 :].sum()
        p = min((longer + 2 * longer**0.5 + 1) / counts.sum(), 1)
        most = scipy.stats.binom.isf(_MISFITS / draws / groups, rows, p)
        if (fitting := rows - int(most)) > 0:
            ends[tokens] = fitting
    best = WHOLE
    for n in range(1, groups):
        for lengths in itertools.combinations(ends, n):
            # Shares in millionths, which a config can hold, rounded up: rounded down, `sizes` would lose a row.
            cuts = tuple((tokens, -(-ends[tokens] * 10**6 // rows) / 10**6) for tokens in lengths)
            if all(a[1] < b[1] for a, b in itertools.pairwise(cuts)):
                best = min(best, LengthGroups(cuts), key=lambda groups: groups.mean(flops_of, context))
    return best


def worthwhile(saved: float, steps: int) -> bool:
    """Whether "auto" has groups that would save this share of a step's FLOPs, in a run of `steps`."""
    return saved >= _LEAST_SAVING and steps >= _LEAST_STEPS
