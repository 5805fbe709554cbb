"""Images of evaluation sets, decoded and resized on access: data sets need not fit into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.data import transforms
from xclip_jax.data.labelled import item_name
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample
from xclip_jax.evaluators.probe import Joined


class Pictures(Sequence):
    """Encoded images, preprocessed for a model; `BadSample` of one that cannot be decoded has its name as a note."""

    def __init__(self, images: Sequence[Any], prepare: Preprocessing, border: int = 0) -> None:
        self._images, self._prepare, self._border = images, prepare, border

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        try:
            image = self._images[index]
            if self._border or not isinstance(image, bytes):
                image = transforms.decode(image, background=self._prepare.background)
            if self._border:
                image = image[self._border : -self._border, self._border : -self._border]
            return self._prepare(image)
        except BadSample as error:
            error.add_note(f"image {item_name(self._images, index)!r}")
            raise


class Augmented(Sequence):
    """Random crops of encoded images, half of them flipped: those of one epoch, sampled as torchvision does."""

    def __init__(self, images: Sequence[Sequence[Any]], prepare: Preprocessing, epoch: int) -> None:
        self._images, self._epoch = Joined(images), epoch
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        rng = np.random.default_rng((self._epoch, index))
        try:
            image = transforms.decode(self._images[index], background=self._prepare.background)
        except BadSample as error:
            error.add_note(f"training image {index}")
            raise
        size, resample = self._prepare.size, self._prepare.interpolation
        image = transforms.random_resized_crop(image, size, rng, (0.08, 1.0), resample=resample)
        return image[:, ::-1] if rng.random() < 0.5 else image
