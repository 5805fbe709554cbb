"""Images of evaluation sets, decoded and resized when they are asked for: data sets need not fit into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.data import transforms
from xclip_jax.data.labelled import Paths
from xclip_jax.errors import BadSample
from xclip_jax.evaluators.probe import Joined


class Pictures(Sequence):
    """Encoded images as uint8 (size, size, 3); one that cannot be decoded raises `BadSample` with its name as a note.

    The shorter side is resized to `shorter` pixels, by default `size`, of which the middle is kept.
    """

    def __init__(
        self, images: Sequence[Any], size: int, resample: str = "bicubic", border: int = 0, shorter: int = 0
    ) -> None:
        self._images, self._size, self._resample, self._border = images, size, resample, border
        self._shorter = shorter or size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            image = self._decode(self._images[index])
        except BadSample as error:
            error.add_note(_where(self._images, index))
            raise
        margin = round((self._shorter - self._size) / 2)
        return image[margin : margin + self._size, margin : margin + self._size]

    def _decode(self, image: Any) -> np.ndarray:
        if not self._border and isinstance(image, bytes):
            return transforms.evaluation_image(image, self._shorter, self._resample)
        image = _colours(transforms.decode(image))
        if self._border:
            image = image[self._border : -self._border, self._border : -self._border]
        return transforms.resize_center_crop(image, self._shorter, self._resample)


def _where(images: Sequence[Any], index: int) -> str:
    """What names an image to a person."""
    return f"image {str(images.paths[index])!r}" if isinstance(images, Paths) else f"record {index}"


def _colours(image: np.ndarray) -> np.ndarray:
    """RGB of what may be grey (h, w, 1), as TFDS keeps MNIST."""
    return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


class Augmented(Sequence):
    """Random crops of encoded images, half of them flipped: those of one epoch, drawn as torchvision does."""

    def __init__(self, images: Sequence[Sequence[Any]], size: int, resample: str, epoch: int) -> None:
        self._images, self._size, self._resample, self._epoch = Joined(images), size, resample, epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self._epoch, index))
        try:
            image = _colours(transforms.decode(self._images[index]))
        except BadSample as error:
            error.add_note(f"training image {index}")
            raise
        image = transforms.random_resized_crop(image, self._size, rng, (0.08, 1.0), resample=self._resample)
        return image[:, ::-1] if rng.random() < 0.5 else image
