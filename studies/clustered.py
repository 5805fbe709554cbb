"""Zero-shot classification with the geometric mean rank, for sets whose images are right or wrong together."""

import dataclasses
from typing import ClassVar

import numpy as np

from xclip_jax.evaluators.base import Column
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet

_HERE = "studies.clustered"
_WITH_RANK = dataclasses.replace(
    ZeroShot.layouts[0],
    title="zero-shot classification of concepts, %",
    columns=(*ZeroShot.layouts[0].columns, Column("rank", "rank_gmean", "geometric mean rank", chance=True)),
)


@dataclasses.dataclass(frozen=True, eq=False)
class ClusteredZeroShotSet(ZeroShotSet):
    """A `ZeroShotSet` whose results have the geometric mean rank."""

    evaluator: ClassVar[str] = f"{_HERE}:ClusteredZeroShot"


class ClusteredZeroShot(ZeroShot):
    """`ZeroShot`, and "rank_gmean": the geometric mean over images of the right class's rank, from 1; less is better.

    It moves before top-1 does. An image without a valid ranking has the last rank.
    """

    layouts = (_WITH_RANK,)

    def results_of_ranks(self, score: str, rank: np.ndarray) -> list[Result]:
        """Return "rank_gmean"."""
        ways = len(self.data.prompts)
        items = PerExample((np.minimum(rank, ways - 1) + 1).astype(float), statistic="gmean")
        chance = float(np.exp(np.log(np.arange(1, ways + 1)).mean()))
        fields = {"unit": "rank", "n": len(rank), "chance": chance, "items": items, "score": score}
        return [self.result("rank_gmean", items.value(), **fields)]
