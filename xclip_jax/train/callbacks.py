"""What a run calls while it trains, such as a logger, an experiment tracker or the report."""

from collections.abc import Mapping, Sequence

from xclip_jax.config.schema import Config
from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.imports import import_class
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.train.job import Job


class Callback:
    """Base class of what `trainer.run` is handed; every method does nothing unless it is overridden.

    With several processes each calls every method at the same steps, so that a method may compute on all devices.
    """

    def on_start(self, job: Job, step: int) -> None:
        """Receive the run before its first step; `step` is the one that it starts or resumes from.

        `job.folder` has its files, and may be written to.
        """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of a training step, those of a line of metrics.jsonl."""

    def on_evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Receive the results of an evaluation, during training or at the end."""

    def on_end(self, job: Job, variables: Variables, results: Sequence[Result]) -> None:
        """Receive the trained model, once results.json is written.

        Args:
          job: the run; `job.folder` has its files.
          variables: the parameters that were evaluated, as `TwoTowers.apply` takes them.
          results: of the last evaluation.
        """


def classes(config: Config) -> list[type[Callback]]:
    """Import the callbacks that `log.callbacks` names; none is made.

    Raises:
      UserError: a class that cannot be imported, or is not a callback.
    """
    return [import_class(name, Callback, "log.callbacks:") for name in config.log.callbacks]


def make_callbacks(config: Config) -> list[Callback]:
    """Make the callbacks that `log.callbacks` names.

    Raises:
      UserError: as `classes`, or a class whose constructor fails.
    """
    made = []
    for name, callback in zip(config.log.callbacks, classes(config), strict=True):
        try:
            made.append(callback())
        except Exception as error:  # of another package
            raise UserError(
                f"log.callbacks: {name!r} cannot be made without arguments ({first_line(error)}); correct its "
                "__init__, or leave it out."
            ) from error
    return made
