"""Images of evaluation sets, decoded and resized on access: data sets need not fit into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.core.errors import BadSample
from xclip_jax.data import images
from xclip_jax.data.labelled import item_name
from xclip_jax.data.preprocessing import Preprocessing


class Pictures(Sequence):
    """Encoded images, preprocessed for a model; a `BadSample` error has the image's name as a note."""

    def __init__(self, images: Sequence[Any], prepare: Preprocessing, border: int = 0) -> None:
        self._images, self._prepare, self._border = images, prepare, border

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        try:
            image = self._images[index]
            if self._border or not isinstance(image, bytes):
                image = images.decode(image, background=self._prepare.background)
            if self._border:
                image = image[self._border : -self._border, self._border : -self._border]
            return self._prepare(image)
        except BadSample as error:
            error.add_note(f"image {item_name(self._images, index)!r}")
            raise
