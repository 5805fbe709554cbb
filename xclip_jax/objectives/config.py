"""Config group `objective`: which terms a run minimises, with which weights, and the options of each."""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from xclip_jax.config.fields import Check, key, nearest, not_empty, read_group
from xclip_jax.errors import UserError
from xclip_jax.objectives.base import LossConfig, Objective, Term
from xclip_jax.objectives.classify import Classify
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.siglip import Siglip

TERMS: dict[str, type[Term]] = {"clip": Clip, "siglip": Siglip, "nclip": Nclip, "classify": Classify}

# Objectives that have a name, as terms and weights.
RECIPES: dict[str, dict[str, float]] = {
    "clip": {"clip": 1.0},
    "siglip": {"siglip": 1.0},
    "nclip": {"nclip": 1.0},
    "xclip": {"clip": 0.3, "nclip": 0.7},
    "classify": {"classify": 1.0},
}
OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # of pre-training

_WEIGHTS = Check("weights of at least 0", lambda weights: all(weight >= 0 for weight in weights.values()))


def find_term(name: str) -> type[Term]:
    """Return the class of a term: an entry of `TERMS`, or "package.module:Class", which is imported.

    Raises:
      UserError: no such entry, module or class, or a class that is not a term.
    """
    if ":" not in name:
        if name not in TERMS:
            raise UserError(
                f"unknown objective term {name!r}; did you mean {nearest(name, TERMS)!r}? A term of another package is "
                "named 'package.module:Class'."
            )
        return TERMS[name]
    module, _, attribute = name.partition(":")
    try:
        term = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective term {name!r} cannot be imported ({error}); install its package.") from error
    if not (isinstance(term, type) and issubclass(term, Term) and dataclasses.is_dataclass(term)):
        raise UserError(f"objective term {name!r} is not a dataclass derived from xclip_jax.objectives.Term.")
    return term


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Config group `objective`: what is minimised.

    A term has its options in the group of its name, or in `plugins`:

        config.objective.name = "superclip"
        config.objective.terms = {"clip": 1.0, "tokens": 0.4}
        config.objective.plugins = {"tokens": {"type": "my_lab.losses:TokenClassification", "smoothing": 0.1}}
    """

    name: str = key("clip", "what the objective is called", not_empty())
    terms: Mapping[str, float] = key(RECIPES["clip"], "weight of each term of the loss", _WEIGHTS)
    clip: Clip = dataclasses.field(default_factory=Clip)
    nclip: Nclip = dataclasses.field(default_factory=Nclip)
    classify: Classify = dataclasses.field(default_factory=Classify)
    plugins: Mapping[str, Mapping[str, Any]] = key(
        {}, "terms of other packages: for each name its 'type', 'package.module:Class', and its options"
    )

    def term(self, name: str) -> Term:
        """The term `name` with its options.

        Raises:
          UserError: names what is wrong with a term or an option of a plug-in.
        """
        if name not in self.plugins:
            term = find_term(name)
            return getattr(self, name, None) or term()
        options = dict(self.plugins[name])
        faults: list[str] = []
        term = read_group(find_term(options.pop("type", name)), options, f"objective.plugins.{name}", faults)
        if faults:
            raise UserError("; ".join(faults))
        return term

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if not any(self.terms.values()):
            yield f"terms is {dict(self.terms)}; give one of them a weight above 0"
            return
        recipe = RECIPES.get(self.name, self.terms)
        if recipe.keys() != self.terms.keys():
            yield (
                f"name is {self.name!r}, whose terms are {', '.join(recipe)}, and terms has {', '.join(self.terms)}; "
                "set both, or use a recipe's argument objective="
            )
        if idle := self.plugins.keys() - self.terms.keys():
            yield f"plugins.{min(idle)} has no weight; set objective.terms.{min(idle)}"
        made = []
        for name in self.terms:
            try:
                made.append(self.term(name))
            except UserError as error:
                yield f"terms.{name}: {str(error).rstrip('.')}"
        if len({term.labelled for term in made}) > 1:
            yield f"terms has {', '.join(self.terms)}, some of labelled items and some of pairs; take those of one kind"


def make_objective(config: ObjectiveConfig, loss: LossConfig | None = None, mesh: Mesh | None = None) -> Objective:
    """The objective of config groups `objective` and `loss`, on `mesh`. Terms are in the order of their names."""
    terms = {name: config.term(name) for name in sorted(config.terms)}
    return Objective(config.name, terms, dict(config.terms), loss or LossConfig(), mesh)


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Config group `objective` of an earlier version, which had names and two weights instead of terms, as of now."""
    values = dict(values)
    weights = {"clip": values.pop("w_clip", None), "nclip": values.pop("w_nclip", None)}
    if "terms" not in values and (recipe := RECIPES.get(values.get("name", "clip"))):
        given = {name: weight for name, weight in weights.items() if weight is not None and len(recipe) > 1}
        values["terms"] = recipe | given
    return values
