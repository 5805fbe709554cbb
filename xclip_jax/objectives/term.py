"""Terms of an objective: one loss with its options, heads, state, costs and charts in one class.

A term is a frozen dataclass whose fields are the keys of its config group; docs/extend.md shows custom terms.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from xclip_jax.core.fields import at_least, key
from xclip_jax.models.heads import Heads
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.similarity import Similarity

Array = jax.Array
Arrays = Mapping[str, Array]
Result = tuple[Array, dict[str, Array], dict[str, Array]]
_FIELDS = {"img": "image", "txt": "text"}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Config group `loss`: ways to compute a loss, with the same value."""

    chunk_size: int = key(0, "pairs that a loss takes at a time, to need less memory; 0 for all", at_least(0))


class Term(abc.ABC):
    """One loss with its heads, state and charts; subclasses are frozen dataclasses of config keys.

    Attributes:
      title: name of the term in sentences, tables and charts.
      labelled: whether the loss takes labelled items instead of image-text pairs.
      uses_negatives: whether the loss reads `data.negatives`, "negatives" (b, k, n), with outputs "negative_z_txt", ...
      classes: number of classes of labelled items; 1 if the label is a number, 0 without labels.
      towers: towers that the term trains.
      similarity: comparison of images with texts by the trained outputs, or None.
      teacher: whether the term needs the outputs of an exponential moving average of the parameters.
    """

    title: ClassVar[str] = ""
    labelled: ClassVar[bool] = False
    uses_negatives: ClassVar[bool] = False

    @property
    def classes(self) -> int:
        return 0

    @property
    def towers(self) -> tuple[str, ...]:
        return ("img", "txt")

    @property
    def similarity(self) -> Similarity | None:
        return None

    @property
    def teacher(self) -> bool:
        return False

    @property
    def fields(self) -> tuple[str, ...]:
        """Batch inputs that the term reads: "image", "text", "label"."""
        return (*(_FIELDS[tower] for tower in self.towers), *["label"] * self.labelled)

    @property
    def columns(self) -> Mapping[str, int]:
        """Sizes of vectors that the term reads from records of the source, by name; inputs of a batch, fp32 (b, size).

        A record has the vector, or a function from its drawn caption, before `data.caption_transform`, to the vector.
        """
        return {}

    def heads(self, model: ModelConfig, vocab: int) -> Heads:
        """Return the term's {name: `Head` or `Scalar`} for the towers of `model` and a tokenizer of `vocab` tokens.

        Terms of one objective share heads of the same name, which must then be equal.
        """
        return {}

    def initial_state(self, model: ModelConfig, vocab: int) -> dict[str, Array]:
        """Return the initial arrays to carry from step to step, by their names in a checkpoint."""
        return {}

    def draw(self, random_key: Array, inputs: dict[str, Any], size: int) -> dict[str, Any]:
        """Add the term's random inputs, one row per example, to the inputs of a step with images of `size` pixels.

        Fold a number above 15, used by no other term, into `random_key`, the key of the step.
        """
        return inputs

    @abc.abstractmethod
    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss of one global batch; pure.

        Args:
          out: outputs of the heads, see `TwoTowers.project`, and h_img, h_txt (b, d), with rows of the global batch.
          teacher: the teacher's outputs, if the objective has a teacher.
          state: results of `initial_state` of all terms, or the state after the last step.
          batch: the step's inputs named by `fields`, such as "text" (b, n), and by `columns`; results of `draw`; the
            position "text_end" (b,) of the end token in each text; "progress" (), the completed fraction of the run.
          chunk: number of pairs to take at a time, 0 for all; the value is the same, and a term may ignore it.

        Returns:
          The loss, an fp32 scalar; metrics, to which the objective adds the term's name as a prefix; the next state.
        """

    def constrain(self, params: Any) -> Any:
        """Return the model's parameters after an update, with the term's heads limited to their bounds; pure."""
        return params

    def conflicts_with(self, model: ModelConfig, loss: LossConfig) -> Iterator[str]:
        """Yield faults of the term's options as sentences that begin with the full name of a key."""
        return iter(())

    def flops(self, model: ModelConfig, batch: int) -> float:
        """Return the FLOPs of the loss without its heads, for one example of a global batch of `batch`."""
        return 0.0

    # --- logs, reports and model cards; `metrics` are floats of one step, without the term's prefix

    def progress(self, metrics: Mapping[str, float]) -> str:
        """Return the term's part of the progress line, or ""."""
        return f"{metrics['loss']:.3f}" if "loss" in metrics else ""

    def curves(self) -> tuple["Curve", ...]:
        """Return charts of the term's metrics."""
        return (Curve(f"{self.title} loss".lstrip(), (("loss", "loss"),)),)

    def health(self, metrics: Mapping[str, float]) -> "Health":
        """Judge whether the term trains well; without checks if `metrics` lack their values."""
        return Health()

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings of failed checks, each "NAME: FAULT AND REMEDY"."""
        return [check.warning for check in self.health(metrics).checks if check.failed]


@dataclasses.dataclass(frozen=True)
class Check:
    """One possible failure of a term, detected from the metrics of one step."""

    name: str  # of the failure
    value: float  # measured
    threshold: float  # the check fails if `value` is below it
    meaning: str  # a sentence about the failure, for reports
    remedy: str  # the warning: the fault, and the config keys to change
    applies: bool = True  # whether all other conditions of the failure hold

    @property
    def failed(self) -> bool:
        """Whether the failure is present; False for NaN."""
        return self.applies and self.value < self.threshold

    @property
    def measurement(self) -> str:
        return f"The value is {self.value:.3g}; the alarm is below {self.threshold:.3g}."

    @property
    def warning(self) -> str:
        return f"{self.name}: {self.remedy}"


class Curve(NamedTuple):
    """A chart of a term's metrics over steps, with horizontal lines for comparison and a sentence below."""

    title: str
    lines: tuple[tuple[str, str], ...]  # (metric without the term's prefix, label) of each line
    unit: str = ""  # "%" draws fractions, and their levels, as percentages
    levels: tuple[tuple[str, float | str], ...] = ()  # (label, constant or metric whose last value is drawn)
    note: str = ""
    check: Check | None = None  # whose threshold is drawn


class Health(NamedTuple):
    """Checks whether a term trains well, with an introduction, and charts of the values they measure."""

    summary: str = ""
    checks: tuple[Check, ...] = ()
    curves: tuple[Curve, ...] = ()
