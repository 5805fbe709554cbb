"""The encoder that the evaluators of a run or a model share."""

from collections.abc import Sequence

from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.train.build import Experiment


def make_encoder(experiment: Experiment, classes: Sequence[str] | None = None) -> Encoder:
    """Return an encoder of the model in `experiment`: one compiled function for each modality.

    Args:
      experiment: of the run; `eval.batch` of its config is the number of items that are encoded at once.
      classes: those of a fine-tuned model.
    """
    return Encoder(
        experiment.model,
        experiment.tokenizer,
        text_length=experiment.context_length,
        preprocessing=experiment.preprocessing,
        mesh=experiment.mesh,
        batch=experiment.config.eval.batch,
        similarities=experiment.objective.similarities,
        classes=classes,
    )
