"""Naming by the similarity, or mixture of similarities, that validation chooses for each arm."""

import dataclasses

from studies import tables
from studies.declaration import Measure
from studies.matrix import Snapshot

BEST = "_best"  # ends the name of a measure by the chosen similarity


class Chosen(Snapshot):
    """A snapshot whose measures NAME_best are by the similarity that validation chooses, see `Study.named`."""

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """As `Snapshot.values`."""
        for validation, name in self.study.named.items():
            if measure.name.endswith(BEST) and measure.set == self.study.measure(name).set:
                best = tables.best_similarity(self, arm, validation, name)[1]
                if not best:
                    return {}
                similarity = best.metric.rpartition("/")[0]
                metric = "/".join(filter(None, (similarity, measure.metric))) if measure.metric else best.metric
                return super().values(arm, dataclasses.replace(measure, metric=metric))
        return super().values(arm, measure)
