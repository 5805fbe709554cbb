"""Base classes of towers: a frozen dataclass of config keys that makes the module and describes it.

A config names one of another package: `model.plugins = {"img": {"type": "my_lab.towers:ConvNet", "width": 512}}`.
docs/extend.md has an example.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError

Array = jax.Array
Params = Mapping[str, Any]


class Tower(abc.ABC):
    """Base of image and text towers; subclasses are frozen dataclasses of config keys.

    The module has no state but its parameters: all randomness of a training pass is an input from `sample_noise`, and
    statistics over the batch, such as BatchNorm's, are not defined for a part of the batch.
    """

    # Keys that change the meaning of weights and not their shapes; a run that starts from weights warns if they differ.
    meaning_keys: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Features of an item, d; usually a key."""

    def flops(self, train: bool) -> float | None:
        """FLOPs of one item's forward pass, in training or not; a multiplication and an addition count as two.

        None if they are not counted: runs then have no MFU, and `xclip-jax plan --mfu` estimates no time.
        """
        return None

    def sample_noise(self, random_key: Array, b: int) -> dict[str, Array]:
        """Random inputs of a training pass on `b` items, keyword arguments of the module: arrays with a row per item.

        Fold a number from 8 to 15 into `random_key`, the key of the step.
        """
        return {}

    @property
    def kernel_sizes(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of a block's kernels that adapters may change, by name, if the config says them."""
        return {}

    @property
    def num_layers(self) -> int:
        """Number of layers that layer decay distinguishes; 1 for none."""
        return 1

    def layer_of(self, path: tuple[str, ...]) -> int | np.ndarray:
        """Layer of the parameter at `path` inside the tower, from 0 for the input; an array for stacked layers."""
        return self.num_layers - 1

    def unrolled(self) -> Self:
        """Return the same tower computed layer by layer: faster on a CPU, and each layer can be inspected."""
        return self

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Convert parameters of another tower of this type to this tower's layout, and say in sentences what changed.

        A `UserError` on parameters that cannot be converted begins with the path of one inside the tower.
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
        """Side of the square image, pixels; usually a key."""

    @abc.abstractmethod
    def module(self, dtype: DTypeLike) -> nn.Module:
        """Make a module of normalised pixels (b, h, w, 3), and `sample_noise`, to features (b, width)."""

    @property
    def grid(self) -> int:
        """Patches along each side of `patch_features`; 0 if the tower has none."""
        return 0

    def patch_features(self, params: Params, image: Array, dtype: DTypeLike) -> Array:
        """Return features of each patch before pooling: normalised pixels (b, h, w, 3) -> (b, grid, grid, d)."""
        raise UserError(f"{type(self).__name__} has no patch features; give it `grid` and `patch_features`.")

    @property
    def attention(self) -> str:
        """Description of the maps of `attention_maps`; "" if the tower has none."""
        return ""

    def attention_maps(self, params: Params, image: Array, dtype: DTypeLike) -> Array:
        """Return the last attention over patches, fp32 (b, rows, columns) that sum to 1, if `attention` is not ""."""
        raise NotImplementedError


class TextTower(Tower):
    """Base of text towers."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Tokens of a text, with its start and end; usually a key."""

    @abc.abstractmethod
    def module(self, vocab: int, eot_id: int, dtype: DTypeLike) -> nn.Module:
        """Make a module of int32 tokens (b, n), and `sample_noise`, to features (b, width).

        The tokenizer has `vocab` tokens, and `eot_id` ends each text.
        """

    @property
    def cuttable(self) -> bool:
        """Whether padding after the end of a text does not reach its feature and may be cut off."""
        return False

    def cut_flops(self, tokens: int) -> float | None:
        """FLOPs of the forward pass of a text cut to `tokens`, if `cuttable`; None as in `flops`."""
        return None
