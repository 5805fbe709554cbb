"""Naming by the similarity, or mixture of similarities, that validation chooses for each arm."""

from studies import tables
from studies.declaration import Measure
from studies.matrix import Snapshot

BEST = "_best"  # ends the name of a measure by the chosen similarity


class Chosen(Snapshot):
    """A snapshot whose measures NAME_best are those of `Study.named` by the similarity chosen on validation."""

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """As `Snapshot.values`."""
        for validation, name in self.study.named.items():
            if measure.name == f"{name}{BEST}":
                best = tables.best_similarity(self, arm, validation, name)[1]
                return super().values(arm, best) if best else {}
        return super().values(arm, measure)
