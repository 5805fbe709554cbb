"""Objectives as weighted terms, each with its options, heads, state, charts, alarms and costs in one class.

A term is a frozen dataclass whose fields are config keys, its group of the config. To add one from another package:

    @dataclasses.dataclass(frozen=True)
    class SuperClip(Term):
        title: ClassVar[str] = "SuperCLIP"
        smoothing: float = key(0.0, "label smoothing", fraction_below_one())

        def heads(self, model, vocab):
            return {"tokens": Head(nn.Dense(vocab), reads="img", writes="tokens")}

        def __call__(self, out, teacher, state, batch):
            loss = ...  # of out["tokens"] (b, vocab) and batch["text"] (b, n)
            return loss, {"loss": loss}, {}
"""

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import at_least, choice, key
from xclip_jax.models.heads import Head, Heads, Scalar
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.display import Curve, Health
from xclip_jax.objectives.similarity import Similarity

Array = jax.Array
Result = tuple[Array, dict[str, Array], dict[str, Array]]
_FIELDS = {"img": "image", "txt": "text"}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Config group `loss`: how a loss is computed, which does not change its value."""

    impl: str = key("plain", "contrastive loss by gathered embeddings, or around a ring", choice(("plain", "ring")))
    chunk_size: int = key(0, "pairs that the non-contrastive loss takes at a time; 0 for all", at_least(0))


class Term(abc.ABC):
    """One loss with everything that belongs to it; subclasses are frozen dataclasses of config keys.

    Attributes:
      title: the term's name in sentences, tables and charts.
      labelled: whether it is computed from labelled items instead of image-text pairs.
      source_remedies: what to change where labelled items of a source differ from what it expects, by
        `labelled.MismatchError.fault`.
    """

    title: ClassVar[str] = ""
    labelled: ClassVar[bool] = False
    source_remedies: ClassVar[Mapping[str, str]] = {}

    @property
    def classes(self) -> int:
        """Classes of labelled items; 1 where the label is a number, 0 where items have no labels."""
        return 0

    @property
    def similarity(self) -> Similarity | None:
        """How images are compared with texts by the outputs that the term trains; None where they are not."""
        return None

    @property
    def towers(self) -> tuple[str, ...]:
        """Towers that the term trains, of "img" and "txt"."""
        return ("img", "txt")

    @property
    def fields(self) -> tuple[str, ...]:
        """Inputs that the term reads from a batch, of "image", "text" and "label"."""
        return (*(_FIELDS[tower] for tower in self.towers), *["label"] * self.labelled)

    @property
    def teacher(self) -> bool:
        """Whether the term needs the outputs of an exponential moving average of the parameters."""
        return False

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """{name: `Head` or `Scalar`} that the term needs on towers of `model`, with `vocab` tokens in the tokenizer.

        Terms of one objective share heads of the same name, which must then be equal.
        """
        return {}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Arrays that the term carries from step to step; their names are its own, in a checkpoint too."""
        return {}

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add the term's own random inputs to those of a step; called for batches with images.

        Args:
          random_key: of the step; fold a number above 15 into it, which no other term uses.
          inputs: the batch, and the random numbers of its augmentation: arrays with a row for each sample.
          size: side of an image, pixels.
        """
        return inputs

    def in_form(self, loss: LossConfig, mesh: Mesh | None) -> Callable[..., Result]:
        """Return `__call__` in the form that the config group `loss` asks for, on `mesh`; the value is the same."""
        return self

    @abc.abstractmethod
    def __call__(
        self,
        out: Mapping[str, Array],
        teacher: Mapping[str, Array] | None,
        state: Mapping[str, Array],
        batch: Mapping[str, Any],
    ) -> Result:
        """Compute the loss of one global batch; pure.

        Args:
          out: outputs of the heads, see `TwoTowers.project`, and h_img, h_txt (b, d); rows of the global batch.
          teacher: the same of the teacher, where the objective has one.
          state: from `initial_state` of all terms, or from the last step.
          batch: inputs of the step: of "image", "text" (b, n) and "label" (b,) those of `fields`, and what `draw` adds.

        Returns:
          fp32 scalar loss; metrics, which the objective prefixes with the term's name; its entries of the next state.
        """

    def constrain(self, params: Any) -> Any:
        """Return the model's parameters after an update, those of the term's heads held in their bounds; pure."""
        return params

    def problems(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """Yield what is wrong with the options of a term in use; each sentence begins with the full name of a key."""
        return iter(())

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """Return warnings "NAME: what is wrong and what to change" from the term's metrics, without their prefix."""
        return []

    def progress(self, metrics: Mapping[str, float]) -> str:
        """Return the term's part of the progress line, from its metrics without their prefix; "" for none."""
        return f"{metrics['loss']:.3f}" if "loss" in metrics else ""

    def flops(self, model: ModelConfig, batch: int) -> float:
        """FLOPs of the loss itself for one sample of a global batch of `batch`; those of heads are the heads' own."""
        return 0.0

    def curves(self) -> tuple[Curve, ...]:
        """Charts of the term's metrics for a report."""
        return (Curve(f"{self.title} loss".lstrip(), (("loss", "loss"),)),)

    def health(self, metrics: Mapping[str, float]) -> Health | None:
        """Indicators of whether the term trains well, from its last metrics without their prefix; None for none.

        A report also shows warnings of `alarms` that have no `Light`.
        """
        return None

    def recipe(self, model: ModelConfig) -> dict[str, Any]:
        """{full config key: value} that a model card lists, besides the term's weight and options."""
        return {}

    def describe(self, model: ModelConfig) -> str:
        """Phrase for a model card on the outputs of the term's heads; "" for none of use."""
        return ""

    def export_note(self, missing: Collection[str]) -> str:
        """Sentence on what a model loses with the heads `missing`, which an export leaves out; "" for nothing."""
        return ""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms: maps what `TwoTowers.project` returns to a scalar loss and metrics; pure.

    Attributes:
      name: config key `objective.name`.
      terms: {name: term}; a term's name is the prefix of its metrics.
      weights: {name: weight} of the same names. A weight of 0 keeps the term's heads, which then are not trained by
        it: a control of equal parameter count.
      loss: forms of the losses.
      mesh: where they are computed.
      title: its name in sentences, tables and charts.
      plugins: names of the terms whose options are in config group `objective.plugins`.
    """

    name: str
    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    loss: LossConfig = LossConfig()
    mesh: Mesh | None = None
    title: str = ""
    plugins: Collection[str] = ()

    @property
    def formula(self) -> str:
        """Weights and terms, such as "0.3 CLIP + 0.7 nCLIP"."""
        return " + ".join(f"{self.weights[name]:g} {term.title or name}" for name, term in self.terms.items())

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that are trained, of "img" and "txt"."""
        return self._union(("img", "txt"), "towers")

    @property
    def fields(self) -> tuple[str, ...]:
        """Inputs of a batch, of "image", "text" and "label"."""
        return self._union(("image", "text", "label"), "fields")

    def _union(self, order: tuple[str, ...], attribute: str) -> tuple[str, ...]:
        return tuple(x for x in order if any(x in getattr(term, attribute) for term in self.terms.values()))

    @property
    def teacher(self) -> bool:
        """Whether a term needs an exponential moving average of the parameters."""
        return any(term.teacher for term in self.terms.values())

    @property
    def labelled(self) -> bool:
        """Whether a batch is made of labelled items instead of image-text pairs."""
        return any(term.labelled for term in self.terms.values())

    @property
    def source_remedies(self) -> dict[str, str]:
        """What to change where labelled items of a source differ from what a term expects."""
        return {fault: remedy for term in self.terms.values() for fault, remedy in term.source_remedies.items()}

    @property
    def classes(self) -> int:
        """Classes of labelled items; 1 where the label is a number, 0 where items have no labels."""
        return max(term.classes for term in self.terms.values())

    @property
    def similarities(self) -> tuple[Similarity, ...]:
        """How images are compared with texts: of each name the first term's, in the order of their priorities.

        The first is the model's own, whose embeddings it gives; those of terms with weight 0, whose heads learn
        nothing, come last.
        """
        by_name: dict[str, tuple[bool, int, Similarity]] = {}
        for name, term in self.terms.items():
            if (similarity := term.similarity) is not None:
                entry = (not self.weights[name], similarity.priority, similarity)
                if similarity.name not in by_name or entry[0] < by_name[similarity.name][0]:
                    by_name[similarity.name] = entry
        return tuple(similarity for *_, similarity in sorted(by_name.values(), key=lambda entry: entry[:2]))

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """{name: `Head` or `Scalar`} of all terms.

        Raises:
          UserError: two terms need different heads under one name.
        """
        heads: dict[str, Head | Scalar] = {}
        for name, term in self.terms.items():
            for head_name, head in term.heads(model, vocab).items():
                if heads.setdefault(head_name, head) != head:
                    raise UserError(
                        f"objective term {name!r} needs another head {head_name!r} than a term before it; rename it."
                    )
        return heads

    def outputs(self, model: ModelConfig) -> frozenset[str]:
        """Keys that its heads write, such as "z_img"."""
        return frozenset(head.writes for head in self.heads(model, vocab=1).values())  # a vocabulary changes no name

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Arrays of all terms that are carried from step to step."""
        state: dict[str, Array] = {}
        for name, term in self.terms.items():
            own = term.initial_state(model, vocab)
            if both := state.keys() & own.keys():
                raise UserError(
                    f"objective term {name!r} has the same state {min(both)!r} as one before it; rename it."
                )
            state |= own
        return state

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add the random inputs of all terms, see `Term.draw`."""
        for term in self.terms.values():
            inputs = term.draw(random_key, inputs, size)
        return inputs

    def __call__(
        self,
        out: Mapping[str, Array],
        teacher: Mapping[str, Array] | None,
        state: Mapping[str, Array],
        batch: Mapping[str, Any],
    ) -> Result:
        """The loss of one global batch; arguments as `Term.__call__`.

        Returns:
          fp32 scalar loss; metrics named "<term>/<metric>" and "loss"; the next state.
        """
        losses, metrics, new_state = [], {}, dict(state)
        for name, term in self.terms.items():
            loss, own, moved = term.in_form(self.loss, self.mesh)(out, teacher, state, batch)
            losses.append(self.weights[name] * loss)
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
            new_state |= moved
        total = sum(losses)
        return total, metrics | {"loss": total}, new_state

    def constrain(self, params: Any) -> Any:
        """The model's parameters after an update, held in the bounds of all terms with a weight."""
        for name, term in self.terms.items():
            params = term.constrain(params) if self.weights[name] else params
        return params

    def metrics_of(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the term `name` among those of a step, without their prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """Warnings "NAME: what is wrong and what to change" from a step's metrics, of terms with a weight."""
        terms = {name: term for name, term in self.terms.items() if self.weights[name]}
        return [text for name, term in terms.items() for text in term.alarms(self.metrics_of(name, metrics))]

    def progress(self, metrics: Mapping[str, float]) -> list[str]:
        """Parts of the progress line, one for each term that has one."""
        parts = {name: term.progress(self.metrics_of(name, metrics)) for name, term in self.terms.items()}
        return [f"{name} {part}" for name, part in parts.items() if part]

    def flops(self, model: ModelConfig, vocab: int, batch: int) -> dict[str, float]:
        """FLOPs of one sample's forward pass: {"heads", "loss"}."""
        heads = sum(head.flops for head in self.heads(model, vocab).values() if isinstance(head, Head))
        return {"heads": float(heads), "loss": sum((t.flops(model, batch) for t in self.terms.values()), 0.0)}

    def curves(self) -> dict[str, tuple[Curve, ...]]:
        """{term: charts of its metrics}."""
        return {name: term.curves() for name, term in self.terms.items()}

    def recipe(self, model: ModelConfig) -> dict[str, Any]:
        """{full config key: value} that a model card lists: weights, options of the terms, and what they add."""
        rows: dict[str, Any] = {f"objective.terms.{name}": weight for name, weight in self.weights.items()}
        for name, term in self.terms.items():
            group = f"objective.{'plugins.' if name in self.plugins else ''}{name}"
            rows |= {f"{group}.{field.name}": getattr(term, field.name) for field in _fields(term)}
            rows |= term.recipe(model)
        return rows

    def describe(self, model: ModelConfig) -> list[str]:
        """Phrases on the outputs of a model, one for each term that has some; for a model card."""
        return [phrase for term in self.terms.values() if (phrase := term.describe(model))]

    def export_notes(self, missing: Collection[str]) -> list[str]:
        """Sentences on what a model loses without the heads `missing`, which an export leaves out."""
        return [note for term in self.terms.values() if missing and (note := term.export_note(missing))]


def _fields(term: Term) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(term) if dataclasses.is_dataclass(term) else ()
