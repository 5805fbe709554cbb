"""Base classes of towers: a frozen dataclass of config keys that makes the module and describes it.

A config can name a tower of another package, see docs/extend.md:
`model.plugins = {"img": {"type": "my_lab.towers:ConvNet", "width": 512}}`.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError

__all__ = ["ImageTower", "TextTower", "Tower"]

Array = jax.Array
Params = Mapping[str, Any]


class Tower(abc.ABC):
    """Base of image and text towers; subclasses are frozen dataclasses of config keys.

    The module has no state except its parameters: all random numbers of a training pass are inputs from `sample_noise`,
    and statistics over the batch, such as BatchNorm's, are undefined for a part of the batch.
    """

    # Keys that change the meaning of weights but not their shapes; a run that starts from weights warns if they differ.
    meaning_keys: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Number of features, d; usually a config key."""

    def flops(self, train: bool) -> float | None:
        """Return the FLOPs of one item's forward pass; a multiplication and an addition count as two.

        None if they are unknown: runs then have no MFU, and `xclip-jax plan` no time.
        """
        return None

    def sample_noise(self, random_key: Array, b: int) -> dict[str, Array]:
        """Return the random inputs of a training pass: keyword arguments of the module, one row for each of `b` items.

        Fold a number from 8 to 15 into `random_key`, the key of the step.
        """
        return {}

    @property
    def num_layers(self) -> int:
        """Number of layers for layer decay; 1 for a tower without layers."""
        return 1

    def layer_of(self, path: tuple[str, ...]) -> int | np.ndarray:
        """Return the layer of the parameter at `path` in the tower, 0 for the input; an array for stacked layers."""
        return self.num_layers - 1

    def unrolled(self) -> Self:
        """Return the same tower computed layer by layer: faster on a CPU, and each layer can be inspected."""
        return self

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Convert parameters of another tower of this type to this tower's layout, and return sentences on changes.

        A `UserError` about parameters that cannot be converted begins with the path of one inside the tower.
        """
        return params, []

    def describe(self) -> str:
        """Describe the tower in one phrase."""
        return f"{type(self).__name__} of width {self.width}"


class ImageTower(Tower):
    """Base of image towers."""

    @property
    @abc.abstractmethod
    def image_size(self) -> int:
        """Side of the square image in pixels; usually a config key."""

    @abc.abstractmethod
    def module(self, dtype: DTypeLike) -> nn.Module:
        """Make a module from normalised pixels (b, h, w, 3), and `sample_noise`, to features (b, width)."""

    @property
    def grid(self) -> int:
        """Patches along each side of `patch_features`; 0 for a tower without patches."""
        return 0

    def patch_features(self, params: Params, image: Array, dtype: DTypeLike) -> Array:
        """Return features of each patch before pooling: normalised pixels (b, h, w, 3) -> (b, grid, grid, d)."""
        raise UserError(f"{type(self).__name__} has no patch features; give it `grid` and `patch_features`.")


class TextTower(Tower):
    """Base of text towers."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Number of tokens of a text, with its start and end; usually a config key."""

    @abc.abstractmethod
    def module(self, vocab: int, eot_id: int, dtype: DTypeLike) -> nn.Module:
        """Make a module from int32 tokens (b, n), and `sample_noise`, to features (b, width).

        The tokenizer has `vocab` tokens, and `eot_id` ends each text.
        """

    @property
    def cuttable(self) -> bool:
        """Whether padding after the end of a text does not influence its features and may be cut off."""
        return False

    def cut_flops(self, tokens: int) -> float | None:
        """Return the FLOPs of the forward pass of a text cut to `tokens`, if `cuttable`; None if unknown."""
        return None
