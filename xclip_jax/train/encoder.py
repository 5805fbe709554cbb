"""The encoder that the evaluators of a run or a model share."""

from collections.abc import Sequence

from xclip_jax.config.schema import Config
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.train.build import Parts


def make_encoder(config: Config, parts: Parts, classes: Sequence[str] | None = None) -> Encoder:
    """Return an encoder of the model in `parts`: one compiled function for each modality.

    Args:
      config: of the run; `eval.batch` items are encoded at once.
      parts: what is built from it.
      classes: those of a fine-tuned model.
    """
    return Encoder(
        parts.model,
        parts.tokenizer,
        text_length=parts.context_length,
        preprocessing=parts.preprocessing,
        mesh=parts.mesh,
        batch=config.eval.batch,
        similarities=parts.objective.similarities,
        classes=classes,
    )
