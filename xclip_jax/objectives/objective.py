"""Objectives, weighted sums of terms, and their config group."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from xclip_jax.core import fields
from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, group, key, not_empty, read_plugin
from xclip_jax.models.heads import Head, Heads, Scalar
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.classify import Classify
from xclip_jax.objectives.clip import Clip, Siglip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.similarity import Similarity
from xclip_jax.objectives.term import Arrays, LossConfig, Result, Term

Array = jax.Array
TERMS: dict[str, type[Term]] = {"clip": Clip, "siglip": Siglip, "nclip": Nclip, "classify": Classify}

RECIPES: dict[str, dict[str, float]] = {
    "clip": {"clip": 1.0},
    "siglip": {"siglip": 1.0},
    "nclip": {"nclip": 1.0},
    "xclip": {"clip": 0.5, "nclip": 0.5},  # the best of three weights on validation, docs/study.md
    "classify": {"classify": 1.0},
}
_TITLES = {"xclip": "xCLIP"}  # of sums; a single term has its own title
OBJECTIVES = ("clip", "siglip", "nclip", "xclip")  # for pre-training

_WEIGHTS = Check("weights of at least 0", lambda weights: all(weight >= 0 for weight in weights.values()))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, a pure function from outputs of `TwoTowers.project` to a scalar loss and metrics.

    A term's name is the prefix of its metrics. A term with weight 0 keeps untrained heads, as a control with equal
    parameter count; weight decay still shrinks them.
    """

    name: str
    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    title: str = ""

    @property
    def formula(self) -> str:
        """Weights and terms, such as "0.3 CLIP + 0.7 nCLIP"."""
        return " + ".join(f"{self.weights[name]:g} {term.title or name}" for name, term in self.terms.items())

    @property
    def towers(self) -> tuple[str, ...]:
        return self._union(("img", "txt"), "towers")

    @property
    def fields(self) -> tuple[str, ...]:
        return self._union(("image", "text", "label", "image_key", "text_key"), "fields")

    @property
    def columns(self) -> dict[str, int]:
        """Columns of all terms by name."""
        return {name: size for term in self.terms.values() for name, size in term.columns.items()}

    def _union(self, order: tuple[str, ...], attribute: str) -> tuple[str, ...]:
        return tuple(x for x in order if any(x in getattr(term, attribute) for term in self.terms.values()))

    @property
    def teacher(self) -> bool:
        return any(term.teacher for term in self.terms.values())

    @property
    def labelled(self) -> bool:
        return any(term.labelled for term in self.terms.values())

    @property
    def classes(self) -> int:
        return max(term.classes for term in self.terms.values())

    @property
    def similarities(self) -> tuple[Similarity, ...]:
        """Similarities by unique name; the first gives the model's embeddings.

        If terms share a name, the first counts. Distributions over clusters come after embeddings trained for
        comparison. A term with weight 0, whose heads learn nothing, counts only if no other term has a similarity.
        """
        known = {name: term.similarity for name, term in self.terms.items() if term.similarity}
        trained = [similarity for name, similarity in known.items() if self.weights[name]]
        by_name: dict[str, Similarity] = {}
        for similarity in sorted(trained or known.values(), key=lambda similarity: similarity.is_distribution):
            by_name.setdefault(similarity.name, similarity)
        return tuple(by_name.values())

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Return {name: `Head` or `Scalar`} of all terms; `UserError` if different heads share a name or an output."""
        heads: dict[str, Head | Scalar] = {}
        outputs_of: dict[str, str] = {}
        for name, term in self.terms.items():
            for head_name, head in term.heads(model, vocab).items():
                known = heads.setdefault(head_name, head)
                if isinstance(known, Scalar) and isinstance(head, Scalar):  # the first initial value counts
                    head = dataclasses.replace(head, initial=known.initial)
                owner = outputs_of.setdefault(head.output, head_name)
                if known != head or owner != head_name:
                    raise UserError(
                        f"objective term {name!r}: its head {head_name!r} with output {head.output!r} differs from the "
                        f"head {owner!r} of an earlier term; rename one."
                    )
        return heads

    def outputs(self, model: ModelConfig) -> frozenset[str]:
        """Return the keys of the heads' outputs, such as "z_img"."""
        return frozenset(head.output for head in self.heads(model, vocab=1).values())  # names do not depend on it

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Merge the initial arrays of all terms; `UserError` if two share a name."""
        state: dict[str, Array] = {}
        for name, term in self.terms.items():
            arrays = term.initial_state(model, vocab)
            shared = sorted(state.keys() & arrays)
            if shared:
                raise UserError(f"objective term {name!r} carries {shared[0]!r}, like an earlier term; leave one out.")
            state |= arrays
        return state

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add the random inputs of all terms, see `Term.draw`."""
        for term in self.terms.values():
            inputs = term.draw(random_key, inputs, size)
        return inputs

    def __call__(self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any]) -> Result:
        """Compute the loss of one global batch, see `Term.__call__`; metrics are "<term>/<metric>" and "loss"."""
        losses = []
        metrics = {}
        new_state = dict(state)
        for name, term in self.terms.items():
            loss, term_metrics, term_state = term(out, teacher, state, batch, chunk=self.loss.chunk_size)
            losses.append(self.weights[name] * loss)
            metrics |= {f"{name}/{key}": value for key, value in term_metrics.items()}
            new_state |= term_state
        total: Any = sum(losses)
        return total, metrics | {"loss": total}, new_state

    def constrain(self, params: Any) -> Any:
        """Return the model's parameters after an update, limited to the bounds of all terms with a weight."""
        for name, term in self.terms.items():
            params = term.constrain(params) if self.weights[name] else params
        return params

    def flops(self, model: ModelConfig, vocab: int, batch: int) -> dict[str, float]:
        """Return the FLOPs of one example's forward pass, {"heads", "loss"}."""
        heads = sum(head.flops for head in self.heads(model, vocab).values() if isinstance(head, Head))
        return {"heads": float(heads), "loss": sum((t.flops(model, batch) for t in self.terms.values()), 0.0)}

    def metrics_of(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Select the metrics of the term `name` from a step's metrics, without their prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings of terms with a weight, see `Term.alarms`, from a step's metrics."""
        terms = {name: term for name, term in self.terms.items() if self.weights[name]}
        return [text for name, term in terms.items() for text in term.alarms(self.metrics_of(name, metrics))]

    def progress(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the terms' parts of the progress line."""
        parts = {name: term.progress(self.metrics_of(name, metrics)) for name, term in self.terms.items()}
        return [f"{name} {part}" for name, part in parts.items() if part]

    def recipe(self, model: ModelConfig) -> dict[str, Any]:
        """Return {full config key: value} for a model card: weights and options of terms and cluster heads."""
        rows: dict[str, Any] = {f"objective.terms.{name}": weight for name, weight in self.weights.items()}
        for name, term in self.terms.items():
            group = f"objective.{name}" if type(term) is TERMS.get(name) else f"objective.plugins.{name}"
            options = dataclasses.fields(term) if dataclasses.is_dataclass(term) else ()
            rows |= {f"{group}.{field.name}": getattr(term, field.name) for field in options}
        clusters = dataclasses.asdict(model.cluster_head) if "s_img" in self.outputs(model) else {}
        return rows | {f"model.cluster_head.{key}": value for key, value in clusters.items()}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Config group `objective`: the loss to minimise.

    The options of a term are in the group with its name, or in `plugins`:

        config.objective.name = "cyclip"
        config.objective.terms = {"clip": 1.0, "cyclic": 0.25}
        config.objective.plugins = {"cyclic": {"type": "my_lab.losses:Consistency", "margin": 0.1}}
    """

    name: str = key("clip", "name of the objective", not_empty())
    terms: Mapping[str, float] = key(RECIPES["clip"], "weight of each term of the loss", _WEIGHTS)
    clip: Clip = group(Clip)
    siglip: Siglip = group(Siglip)
    nclip: Nclip = group(Nclip)
    classify: Classify = group(Classify)
    plugins: Mapping[str, Mapping[str, Any]] = key(
        {}, "terms of other packages: for each name its 'type', 'package.module:Class', and its options"
    )

    def term(self, name: str) -> Term:
        """Return the term `name` with its options; `UserError` for an unknown term or a wrong option of a plug-in."""
        if name in TERMS and name not in self.plugins:
            return getattr(self, name)
        path = f"objective.plugins.{name}"
        return read_plugin(self.plugins.get(name, {}), path, TERMS, Term, "objective term", type_name=name)

    def conflicts(self) -> Iterator[str]:
        """Yield contradictory values."""
        if not any(self.terms.values()):
            yield f"terms is {dict(self.terms)}; give one of them a weight above 0"
            return
        recipe = RECIPES.get(self.name, self.terms)
        if recipe.keys() != self.terms.keys():
            yield (
                f"name is {self.name!r}, whose terms are {', '.join(recipe)}, and terms has {', '.join(self.terms)}; "
                "set both, or use a recipe's argument objective="
            )
        idle = self.plugins.keys() - self.terms.keys()
        if idle:
            yield f"plugins.{min(idle)} has no weight; set objective.terms.{min(idle)}"
        terms = []
        for name in self.terms:
            try:
                terms.append(self.term(name))
            except UserError as error:
                yield f"terms.{name}: {str(error).removesuffix('.')}"
        if len({term.labelled for term in terms}) > 1:
            yield f"terms has {', '.join(self.terms)}, which mix labelled items and pairs; use one kind"


def make_objective(config: ObjectiveConfig, loss: LossConfig | None = None) -> Objective:
    """Make the objective of the config groups `objective` and `loss`, with its terms in alphabetical order."""
    terms = {name: config.term(name) for name in sorted(config.terms)}
    single = terms[config.name].title if terms.keys() == {config.name} else ""
    title = single or _TITLES.get(config.name, config.name)
    return Objective(config.name, terms, dict(config.terms), loss or LossConfig(), title)


def read_objective(values: Mapping[str, Any]) -> Objective:
    """Make an objective from the config group `objective` as a dict; `UserError` lists wrong keys and values."""
    faults: list[str] = []
    config = fields.read_group(ObjectiveConfig, with_terms(values), "objective", faults)
    if faults:
        raise UserError(f"{'; '.join(faults)}.")
    return make_objective(config)


def with_terms(values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config group `objective` that lists no terms from `RECIPES`."""
    recipe = RECIPES.get(values.get("name", "clip"))
    return ({"terms": dict(recipe)} if recipe else {}) | dict(values)
