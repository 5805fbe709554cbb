"""The encoder that the evaluators of a run or a model share."""

from collections.abc import Sequence
from typing import Any, Protocol

from jax.sharding import Mesh

from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.evaluators import Encoder
from xclip_jax.models.two_towers import TwoTowers


class Built(Protocol):
    """What of `train.build.Parts` an encoder needs."""

    @property
    def model(self) -> TwoTowers: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def length(self) -> int: ...
    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def objective(self) -> Any: ...


def make_encoder(config: Any, parts: Built, classes: Sequence[str] | None = None) -> Encoder:
    """Return an encoder of the model in `parts`: one compiled function for each modality.

    Args:
      config: of the run; `eval.batch` items are encoded at once.
      parts: what is built from it.
      classes: those of a fine-tuned model.
    """
    return Encoder(
        parts.model,
        parts.tokenizer,
        text_length=parts.length,
        preprocessing=parts.preprocessing,
        mesh=parts.mesh,
        batch=config.eval.batch,
        tau=parts.objective.nclip.tau,
        classes=classes,
    )
