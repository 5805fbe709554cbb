"""What a run calls while it trains, such as a logger, an experiment tracker or the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from xclip_jax.evaluators.result import Result
from xclip_jax.train.job import Job


class Callback:
    """Base class of what `trainer.run` is handed; every method does nothing unless it is overridden.

    With several processes each calls every method at the same steps, so that a method may compute on all devices.
    """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of a training step, those of a line of metrics.jsonl."""

    def on_evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Receive the results of an evaluation, on the way or at the end."""

    def on_end(self, job: Job, variables: Mapping[str, Any], results: Sequence[Result]) -> None:
        """Receive the trained model, once results.json is written.

        Args:
          job: the run; `job.folder` has its files.
          variables: the parameters that were evaluated, as `TwoTowers.apply` takes them.
          results: of the last evaluation.
        """
