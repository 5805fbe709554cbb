"""The encoder that the evaluators of a run or a model share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from xclip_jax.config.schema import Config
from xclip_jax.core.console import log0
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


def profile_of_run(config: Config, name: str = "openai", changes: Mapping[str, Any] | None = None) -> Profile:
    """Return `own_profile` of a run that may have been moved without its file of class names, which a line says then.

    Args:
      config: of the run.
      name: of the profile.
      changes: fields of `Profile` to change; where these are the class names the run's file is not read.
    """
    changes, file = changes or {}, config.eval.class_names
    missing = bool(file) and not epath.Path(file).expanduser().exists()
    if missing and "names" not in changes:
        log0(
            f"WARNING: eval.class_names={file!r} does not exist; own classes go by their labels. Restore the file, or "
            "name one to evaluate, --class-names."
        )
    if missing or "names" in changes:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, class_names=""))
    return dataclasses.replace(own_profile(config, name), **changes)
