"""The random inputs of a training step, and the augmented images that follow from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from xclip_jax.data import transforms
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.models.tower import Tower
from xclip_jax.objectives import Objective

NOISE = "noise"  # key of {tower: its random inputs} among the inputs of a step


@dataclasses.dataclass(frozen=True)
class Augment:
    """Samples all that is random in a batch, so that it can be applied to any part of the batch.

    Attributes:
      data: strengths of the augmentations.
      preprocessing: how pixels are normalised, and the size of an image.
      objective: adds inputs of its own, such as those of mixup.
      towers: {"img", "txt"}, which have random inputs of their own, such as those of patch dropout.
    """

    data: DataConfig
    preprocessing: Preprocessing
    objective: Objective
    towers: Mapping[str, Tower]

    def sample(self, random_key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """The batch with its random inputs: arrays with a row for each sample.

        Each use folds a number of its own into the step's key: 0 flips and colours, 1 mixup, 2 stochastic depth,
        3 the text tower, 4 patch dropout, above 15 terms of other packages and shuffled targets.

        Args:
          random_key: of the step.
          batch: of "image" (b, h, w, 3), "text" (b, n) and "label" (b,) what the objective reads.
        """
        b, inputs = len(next(iter(batch.values()))), dict(batch)
        if "image" in batch:
            key_image = jax.random.fold_in(random_key, 0)
            inputs |= transforms.sample_augmentations(
                key_image, b, flip=self.data.flip_prob, color=self.data.color_jitter
            )
            inputs = self.objective.draw(random_key, inputs, self.preprocessing.size)
        keys = {"img": random_key, "txt": jax.random.fold_in(random_key, 3)}
        noise = {name: self.towers[name].sample_noise(keys[name], b) for name in self.objective.towers}
        return inputs | {NOISE: noise}

    def apply(self, inputs: dict[str, Any]) -> jax.Array:
        """Inputs, or some of their rows -> normalised, augmented images (b, h, w, 3)."""
        images = transforms.augment(inputs["image"], inputs)
        images = transforms.normalize(images, self.preprocessing.mean, self.preprocessing.std)
        return transforms.mix(images, self.apply(inputs["other"]), inputs) if "other" in inputs else images
