"""Config group `objective`: which terms a run minimises, with which weights, and the options of each."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, find_class, key, not_empty, read_plugin
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.base import LossConfig, Objective, Term
from xclip_jax.objectives.classify import Classify
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.siglip import Siglip

TERMS: dict[str, type[Term]] = {"clip": Clip, "siglip": Siglip, "nclip": Nclip, "classify": Classify}

# Named objectives, as terms and weights.
RECIPES: dict[str, dict[str, float]] = {
    "clip": {"clip": 1.0},
    "siglip": {"siglip": 1.0},
    "nclip": {"nclip": 1.0},
    "xclip": {"clip": 0.5, "nclip": 0.5},  # of three weights the best on validation, docs/study.md
    "classify": {"classify": 1.0},
}
_TITLES = {"xclip": "xCLIP"}  # of those with several terms
OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # of pre-training

_WEIGHTS = Check("weights of at least 0", lambda weights: all(weight >= 0 for weight in weights.values()))


def find_term(name: str) -> type[Term]:
    """Return the class of a term: an entry of `TERMS`, or "package.module:Class", which is imported.

    Raises:
      UserError: no such entry, module or class, or a class that is not a term.
    """
    return find_class(name, TERMS, Term, "objective term")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Config group `objective`: what is minimised.

    A term has its options in the group of its name, or in `plugins`:

        config.objective.name = "superclip"
        config.objective.terms = {"clip": 1.0, "tokens": 0.4}
        config.objective.plugins = {"tokens": {"type": "my_lab.losses:TokenClassification", "smoothing": 0.1}}
    """

    name: str = key("clip", "name of the objective", not_empty())
    terms: Mapping[str, float] = key(RECIPES["clip"], "weight of each term of the loss", _WEIGHTS)
    clip: Clip = dataclasses.field(default_factory=Clip)
    nclip: Nclip = dataclasses.field(default_factory=Nclip)
    classify: Classify = dataclasses.field(default_factory=Classify)
    plugins: Mapping[str, Mapping[str, Any]] = key(
        {}, "terms of other packages: for each name its 'type', 'package.module:Class', and its options"
    )

    def term(self, name: str) -> Term:
        """Return the term `name` with its options.

        Raises:
          UserError: an unknown term, or a wrong option of a plug-in.
        """
        if name not in self.plugins:
            term = find_term(name)
            return getattr(self, name, None) or term()
        path = f"objective.plugins.{name}"
        return read_plugin(self.plugins[name], path, TERMS, Term, "objective term", type_name=name)

    def _misspelling(self) -> Iterator[str]:
        """Yield what is wrong with a name like one of this package, whose terms are all of this package too.

        With a digit or a sign, as in "xclip_2", it is a name of its own.
        """
        near = fields.nearest(self.name, RECIPES, cutoff=0.8)
        own = not self.name.isalpha() or self.plugins or not self.terms.keys() <= TERMS.keys()
        if near and self.name != near and not own:
            yield f"name is {self.name!r}; did you mean {near!r}?"

    def conflicts(self) -> Iterator[str]:
        """Yield what is wrong with values that contradict each other."""
        yield from self._misspelling()
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
                yield f"terms.{name}: {str(error).removesuffix('.')}"
        if len({term.labelled for term in made}) > 1:
            yield f"terms has {', '.join(self.terms)}, some of labelled items and some of pairs; use one sort alone"


def make_objective(config: ObjectiveConfig, loss: LossConfig | None = None, mesh: Mesh | None = None) -> Objective:
    """Make the objective of config groups `objective` and `loss`, on `mesh`. Terms are in the order of their names."""
    terms = {name: config.term(name) for name in sorted(config.terms)}
    single = terms[config.name].title if terms.keys() == {config.name} else ""
    title = single or _TITLES.get(config.name, config.name)
    return Objective(config.name, terms, dict(config.terms), loss or LossConfig(), mesh, title, tuple(config.plugins))


def read_objective(values: Mapping[str, Any]) -> Objective:
    """Make the objective of a config's group `objective`, complete or in part, as a dict.

    Raises:
      UserError: names what is wrong with it.
    """
    faults: list[str] = []
    config = fields.read_group(ObjectiveConfig, with_terms(values), "objective", faults)
    if faults:
        raise UserError(f"{'; '.join(faults)}.")
    return make_objective(config)


def objective_of_heads(heads: Collection[str]) -> dict[str, str]:
    """Return the config group `objective` with one term of this package whose model has just these heads.

    Raises:
      UserError: no term has them.
    """
    for name, terms in RECIPES.items():
        if len(terms) == 1 and find_term(name)().heads(ModelConfig(), vocab=1).keys() == set(heads):
            return {"name": name}
    raise UserError(f"no objective has just the heads {', '.join(sorted(heads))}.")


def with_terms(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config group `objective` with the terms of the objective that it names, where it has none."""
    recipe = RECIPES.get(values.get("name", "clip"))
    return ({"terms": dict(recipe)} if recipe else {}) | dict(values)
