"""Images: decoding and cropping on the host in NumPy, normalisation and augmentation on the device.

uint8 travels to the device: a quarter of the bytes of floats, and the arithmetic costs nothing there.
"""

import io
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from xclip_jax.errors import UserError

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """Encoded image -> uint8 RGB (h, w, 3), turned as EXIF says; an array (h, w, 3) passes through.

    Raises:
      UserError: the bytes are no image that Pillow reads.
    """
    if isinstance(data, np.ndarray):
        return data
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{len(data)} bytes that begin with {data[:8]!r} are no readable image ({error}).") from error


RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _resize(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None, resample: str = "bicubic"
) -> np.ndarray:
    """The part `box` (left, upper, right, lower) of an image at `size` (width, height), antialiased."""
    return np.asarray(Image.fromarray(image).resize(size, RESAMPLE[resample], box=box))


def resize_center_crop(image: np.ndarray, size: int, resample: str = "bicubic") -> np.ndarray:
    """Shorter side to `size` (antialiased), then the central square: with "bicubic" OpenAI CLIP's evaluation transform.

    `resample` "bilinear" is torchvision's default, and SLIP's.

    uint8 (h, w, 3) -> uint8 (size, size, 3).
    """
    h, w = image.shape[:2]
    if (h, w) != (size, size):
        short = min(h, w)
        h, w = int(size * h / short), int(size * w / short)
        image = _resize(image, (w, h), None, resample)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of the image, resized to a square: Inception's training crop.

    Args:
      image: uint8 (h, w, 3).
      size: side of the result, pixels.
      rng: decides the part.
      scale: range of the part's share of the area.
      ratio: range of its width / height, log-uniform.

    Returns:
      uint8 (size, size, 3).
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_w, crop_h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_w <= w and crop_h <= h:
            left, top = rng.uniform(0, w - crop_w), rng.uniform(0, h - crop_h)
            return _resize(image, (size, size), (left, top, left + crop_w, top + crop_h))
    return resize_center_crop(image, size)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 (b, h, w, 3) -> fp32 of the same shape, (x / 255 - mean) / std for each channel."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def draw(key: jax.Array, b: int, *, flip: float = 0.0, color: float = 0.0) -> dict[str, jax.Array]:
    """What `augment` does to each of `b` images; apart from it, so that a batch can be augmented in parts.

    Args:
      key: decides.
      b: images in the global batch.
      flip: probability of a left-right flip.
      color: strength s; brightness, contrast and saturation each change by a factor from [1 - s, 1 + s].

    Returns:
      "flip" bool (b,) where `flip` is above 0; "color" fp32 (b, 3), the three factors, where `color` is.
    """
    key_flip, key_color = jax.random.split(key)
    found = {}
    if flip:
        found["flip"] = jax.random.bernoulli(key_flip, flip, (b,))
    if color:
        found["color"] = jax.random.uniform(key_color, (b, 3), minval=1 - color, maxval=1 + color)
    return found


def augment(images: jax.Array, drawn: Mapping[str, jax.Array]) -> jax.Array:
    """Flips and colours uint8 images (b, h, w, 3), on the device, as `draw` says.

    Returns:
      Images of the same shape, in fp32 between 0 and 255 where colours change.
    """
    if "flip" in drawn:
        images = jnp.where(drawn["flip"][:, None, None, None], images[:, :, ::-1], images)
    if "color" in drawn:
        brightness, contrast, saturation = jnp.moveaxis(drawn["color"][:, :, None, None], 1, 0)
        # All three are linear but for the mean, so one 3 x 3 matrix an image does them in one pass over the pixels.
        luma = jnp.tile(jnp.asarray((0.299, 0.587, 0.114))[:, None], (1, 3))
        matrix = brightness * contrast * (saturation * jnp.eye(3) + (1 - saturation) * luma)  # (b, 3, 3)
        x = images.reshape(images.shape[0], -1, 3).astype(jnp.float32)
        shift = brightness * (1 - contrast) * x.mean(axis=(1, 2), keepdims=True)
        images = jnp.clip(jnp.einsum("bnc,bcd->bnd", x, matrix) + shift, 0, 255).reshape(images.shape)
    return images
