"""What an evaluator is."""

from typing import Any, Protocol

from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.statistics import Items


class Evaluator(Protocol):
    """A protocol on one set, built once with its data and run as often as the trainer likes.

    `run(variables) -> {metric: value}` gives flat names such as "zeroshot/emoji/test_concepts/top1", Python floats,
    shares in percent; `measure` gives these and, for those that can be resampled, the items that they are made of.
    `variables` is what `TwoTowers.apply` takes. With several processes every process calls it, and every process gets
    the same numbers.
    """

    name: str
    encoder: Encoder
    data: Any

    def run(self, variables: Any) -> dict[str, float]: ...

    def measure(self, variables: Any) -> tuple[dict[str, float], dict[str, Items]]: ...
