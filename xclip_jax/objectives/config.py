"""Config group `objective`: which terms a run minimises, and their options."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from xclip_jax.config.fields import at_least, choice, key
from xclip_jax.objectives.base import LossConfig, Objective, Term
from xclip_jax.objectives.classify import Classify
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.siglip import Siglip

OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # of pre-training
TERMS: dict[str, type[Term]] = {"clip": Clip, "siglip": Siglip, "nclip": Nclip, "classify": Classify}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Config group `objective`: what is minimised."""

    name: str = key("clip", "contrastive, non-contrastive, both, or fine-tuning", choice((*OBJECTIVES, "classify")))
    w_clip: float = key(0.3, "weight of the contrastive loss in xclip", at_least(0))
    w_nclip: float = key(0.7, "weight of the non-contrastive loss in xclip", at_least(0))
    nclip: Nclip = dataclasses.field(default_factory=Nclip)
    classify: Classify = dataclasses.field(default_factory=Classify)

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.name == "xclip" and not (self.w_clip or self.w_nclip):
            yield "w_clip and w_nclip are both 0; set one of them above 0"

    @property
    def weights(self) -> dict[str, float]:
        """{term: weight}."""
        return {"clip": self.w_clip, "nclip": self.w_nclip} if self.name == "xclip" else {self.name: 1.0}


def make_objective(config: ObjectiveConfig, loss: LossConfig | None = None, mesh: Mesh | None = None) -> Objective:
    """The objective of config groups `objective` and `loss`, on `mesh`."""
    terms = {name: getattr(config, name, None) or TERMS[name]() for name in config.weights}
    return Objective(config.name, terms, config.weights, loss or LossConfig(), mesh)
