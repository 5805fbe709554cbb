"""Image preprocessing of a model in use, which belongs to the model like its tokenizer."""

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from xclip_jax.core.errors import UserError
from xclip_jax.data import images
from xclip_jax.data.transforms import STATISTICS, fit

Triple = tuple[float, float, float]


def mean_std(statistics: Any) -> tuple[Triple, Triple]:
    """Return channel means and standard deviations of `data.normalization`, for pixels between 0 and 1.

    `statistics` is a key of `STATISTICS`, or ((r, g, b), (r, g, b)), also as text; `UserError` for anything else.
    """
    if isinstance(statistics, str) and statistics in STATISTICS:
        return STATISTICS[statistics]
    try:
        pair = ast.literal_eval(statistics) if isinstance(statistics, str) else statistics
        values = np.array(pair, np.float64)
        if values.shape == (2, 3) and np.isfinite(values).all() and (values[1] > 0).all():
            mean, std = (tuple(row) for row in values.tolist())
            return mean, std
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two for deep nesting
        pass
    names = ", ".join(map(repr, STATISTICS))
    raise UserError(
        f"data.normalization is {statistics!r}; expected {names}, or mean and deviation by channel, "
        "((r, g, b), (r, g, b)), deviations above 0."
    )


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resizes an image to a square on the host, and stores the arguments of `transforms.normalize` for the device.

    The defaults are OpenAI CLIP's, also in open_clip. `UserError` for a wrong size.

    Attributes:
      size: side of the result in pixels.
      mean, std: for each channel, for pixels between 0 and 1.
      resize_mode, resize_size, interpolation: see `transforms.fit`; config keys `eval.resize`, `.resize_size`,
        `.interpolation`.
      background, exif_rotation: see `images.decode`; config key `data.decoding`.
    """

    size: int
    mean: Triple = STATISTICS["clip"][0]
    std: Triple = STATISTICS["clip"][1]
    resize_mode: str = "shortest"
    resize_size: int = 0
    interpolation: str = "bicubic"
    background: str = images.DROPPED
    exif_rotation: bool = False

    def __post_init__(self) -> None:
        if 0 < self.resize_size < self.size:
            raise UserError(f"eval.resize_size is {self.resize_size}; set it to 0, or to at least {self.size} pixels.")

    @classmethod
    def from_config(cls, config: Any) -> "Preprocessing":
        """Return the preprocessing of a run's model by its `Config`."""
        groups = {"data": vars(config.data), "eval": vars(config.eval)}
        return cls.from_dict(groups, config.model.tower("img").image_size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], size: int) -> "Preprocessing":
        """Return the preprocessing for groups "data" and "eval" of a nested dict; missing keys have their defaults."""
        mean, std = mean_std(config["data"]["normalization"])
        group = config.get("eval", {})
        fields = {"resize": "resize_mode", "resize_size": "resize_size", "interpolation": "interpolation"}
        resizing = {field: group[key] for key, field in fields.items() if key in group}
        decoding = images.DECODINGS[config["data"].get("decoding", "open_clip")]
        return cls(size, mean, std, background=decoding["background"], exif_rotation=decoding["rotate"], **resizing)

    def to_config(self) -> dict[str, dict[str, Any]]:
        """Return the groups `data` and `eval` for `from_dict`, with known statistics by name."""
        pair = (self.mean, self.std)
        decoding = {"background": self.background, "rotate": self.exif_rotation}
        return {
            "data": {
                "normalization": next((name for name, known in STATISTICS.items() if known == pair), pair),
                "decoding": next((name for name, known in images.DECODINGS.items() if known == decoding), "open_clip"),
            },
            "eval": {
                "resize": self.resize_mode, "resize_size": self.resize_size, "interpolation": self.interpolation,
            },
        }  # fmt: skip

    def with_size(self, size: int) -> "Preprocessing":
        """Return the preprocessing for the same view of an image at another size."""
        return dataclasses.replace(self, size=size, resize_size=math.ceil(self.resize_size * size / self.size))

    @property
    def resizing(self) -> str:
        """Resizing in words, including sizes other than the result's and ignored EXIF tags."""
        side = "each side" if self.resize_mode == "squash" else "shorter side"
        to = f" to {self.resize_size}" if self.resize_size not in (0, self.size) else ""
        crop = ", central crop" if to or self.resize_mode == "shortest" else ""
        exif = "" if self.exif_rotation else ", not rotated by EXIF"
        return f"{side}{to} {self.interpolation}{crop}{exif}"

    @property
    def normalization(self) -> str:
        """Mean, deviation and any background of transparent images, in words."""
        normalization = self.to_config()["data"]["normalization"]
        white = ", transparent images on white" if self.background == images.WHITE else ""
        if isinstance(normalization, str):
            return f"mean and deviation of {normalization!r}{white}"
        return f"mean {self.mean}, deviation {self.std}{white}"

    def describe(self) -> str:
        """Return resizing, size and normalization in words."""
        return f"{self.resizing}, {self.size} px, {self.normalization}"

    def __call__(self, data: bytes | np.ndarray | Image.Image) -> np.ndarray:
        """Convert an encoded image, an RGB array (h, w, 3) or a Pillow image to uint8 (size, size, 3).

        A white background is laid before resizing. With dropped transparency and without rotation, the pixels equal
        open_clip's evaluation transform, which resizes before converting to RGB, but for 16 bits. See `images.decode`
        for errors.
        """
        if isinstance(data, np.ndarray) or images.is_jpeg(data) or self.background == images.WHITE:
            image = Image.fromarray(images.decode(data, background=self.background, rotate=self.exif_rotation))
        elif (image := images.open_image(data, rotate=self.exif_rotation)).mode.startswith("I"):
            image = images.to_rgb(image, self.background)
        return np.asarray(images.to_rgb(self._fit(image, self.interpolation), self.background))

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Convert class numbers uint8 (h, w) of an image's pixels to uint8 (size, size); 255 for no class."""
        return np.asarray(self._fit(Image.fromarray(mask), "nearest"))

    def _fit(self, image: Image.Image, resample: str) -> Image.Image:
        return fit(image, self.size, resample, self.resize_mode, self.resize_size)
