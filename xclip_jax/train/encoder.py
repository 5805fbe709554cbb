"""The encoder that the evaluators of a run or a model share."""

from collections.abc import Sequence

from xclip_jax.config.schema import Config
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import PROFILES, Profile
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


def own_profile(config: Config, name: str = "openai") -> Profile:
    """Return the profile `name` with the templates and class names that a run has for labelled images of its own."""
    return prompts.with_own(PROFILES[name], config.eval.templates, config.eval.class_names)
