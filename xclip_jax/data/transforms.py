"""Images as arrays: cropping on the host in NumPy, normalisation and augmentation on the device.

uint8 is sent to the device: a quarter of the bytes of floats, and arithmetic costs nothing there.
"""

import math
from collections.abc import Mapping

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

cv2.setNumThreads(0)  # the loader already uses threads

RESAMPLE = ("area", "bicubic")  # for training crops
RESIZE_MODES = ("shortest", "squash")  # for evaluation
INTERPOLATIONS = ("bicubic", "bilinear")
_LONGEST = 16  # ratio of sides beyond which an image is cropped before resizing

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def fit(
    image: Image.Image, size: int, resample: str = "bicubic", mode: str = "shortest", resize_size: int = 0
) -> Image.Image:
    """Resize an image of any kind of pixels, and cut out the central square of `size` pixels.

    The mode "shortest" resizes the shorter side to `resize_size` pixels, 0 for `size`, and "squash" both sides.
    `resample` is Pillow's name of a filter, which is antialiased.
    """
    side = resize_size or size
    w, h = image.size
    # Resizing all of a very long image could take any amount of memory.
    left, top = (max(x - _LONGEST * min(w, h), 0) // 2 for x in (w, h))
    if mode == "shortest" and (left or top):
        image = image.crop((left, top, w - left, h - top))
    w, h = image.size
    new = (side, side)
    if mode == "shortest":
        new = (int(side * w / min(w, h)), int(side * h / min(w, h)))
    if new != (w, h):
        image = image.resize(new, Image.Resampling[resample.upper()])
    left, top = (round((x - size) / 2) for x in new)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resample: str = "bicubic",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize a random part of the image to a square: Inception's training crop.

    Args:
      image: uint8 (h, w, 3).
      size: side of the result, pixels.
      rng: random generator for the part.
      scale: range of the part's area, as a fraction of the image's.
      ratio: range of its width / height, log-uniform.
      resample: "bicubic", antialiased; or in a quarter of the time "area", OpenCV's mean over pixels (bicubic to
        enlarge), with the part's borders at whole pixels.
      out: uint8 (size, size, 3) for the result, such as a batch's row; None for a new array.
    """
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    h, w = image.shape[:2]
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_w = math.sqrt(area * aspect)
        crop_h = math.sqrt(area / aspect)
        if crop_w <= w and crop_h <= h:
            left = rng.uniform(0, w - crop_w)
            top = rng.uniform(0, h - crop_h)
            if resample == "area":
                # Rounding may move a tiny part past the edge.
                row = min(round(top), h - 1)
                column = min(round(left), w - 1)
                part = image[row : row + max(round(crop_h), 1), column : column + max(round(crop_w), 1)]
                how = cv2.INTER_AREA if min(part.shape[:2]) >= size else cv2.INTER_CUBIC
                cv2.resize(part, (size, size), dst=out, interpolation=how)
            else:
                box = (left, top, left + crop_w, top + crop_h)
                resized = Image.fromarray(image).resize((size, size), Image.Resampling[resample.upper()], box)
                out[:] = np.asarray(resized)
            return out
    out[:] = np.asarray(fit(Image.fromarray(image), size))
    return out


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Normalise uint8 (b, h, w, 3) to fp32 of the same shape: (x / 255 - mean) / std for each channel."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def sample_augmentations(key: jax.Array, b: int, *, flip: float = 0.0, color: float = 0.0) -> dict[str, jax.Array]:
    """Sample the augmentations of `b` images for `augment`, so that a batch can be augmented in microbatches.

    Args:
      key: random key.
      b: number of images in the global batch.
      flip: probability of a left-right flip; above 0 it gives "flip", bool (b,).
      color: strength s; above 0 it gives "color", fp32 (b, 3): brightness, contrast, saturation from [1 - s, 1 + s].
    """
    key_flip, key_color = jax.random.split(key)
    sampled = {}
    if flip:
        sampled["flip"] = jax.random.bernoulli(key_flip, flip, (b,))
    if color:
        sampled["color"] = jax.random.uniform(key_color, (b, 3), minval=1 - color, maxval=1 + color)
    return sampled


def augment(images: jax.Array, sampled: Mapping[str, jax.Array]) -> jax.Array:
    """Augment uint8 images (b, h, w, 3), see `sample_augmentations`; fp32 from 0 to 255 if colours change."""
    if "flip" in sampled:
        images = jnp.where(sampled["flip"][:, None, None, None], images[:, :, ::-1], images)
    if "color" in sampled:
        brightness, contrast, saturation = jnp.moveaxis(sampled["color"][:, :, None, None], 1, 0)
        # All three are linear except for the mean, so that one 3 x 3 matrix per image applies them in one pass.
        luma = jnp.tile(jnp.asarray((0.299, 0.587, 0.114))[:, None], (1, 3))
        matrix = brightness * contrast * (saturation * jnp.eye(3) + (1 - saturation) * luma)  # (b, 3, 3)
        x = images.reshape(images.shape[0], -1, 3).astype(jnp.float32)
        shift = brightness * (1 - contrast) * x.mean(axis=(1, 2), keepdims=True)
        images = jnp.clip(jnp.einsum("bnc,bcd->bnd", x, matrix) + shift, 0, 255).reshape(images.shape)
    return images


def sample_mix(key: jax.Array, b: int, size: int, mixup: float, cutmix: float) -> dict[str, jax.Array]:
    """Sample the arguments of `mix`: mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), half of the batches each.

    Like in timm, all `b` images of the global batch, `size` pixels wide, are mixed with the same values. `mixup` and
    `cutmix` are the parameter a of the share's distribution Beta(a, a), 0 for never.

    Returns:
      Rows for each image: "share" fp32 (b,) of its label; "weight" fp32 (b,) of its pixels outside the box; "box" int32
      (b, 4), top, bottom, left, right of the other image's pixels, empty for mixup.
    """
    key_method, key_share, key_y, key_x = jax.random.split(key, 4)
    cut = jax.random.bernoulli(key_method, 0.5 if mixup and cutmix else float(cutmix > 0))
    a = jnp.where(cut, cutmix, mixup)
    mixed = jax.random.beta(key_share, a, a)
    half = (size * jnp.sqrt(1 - mixed)).astype(jnp.int32) // 2
    centre = jnp.stack([jax.random.randint(k, (), 0, size) for k in (key_y, key_x)])
    low = jnp.clip(centre - half, 0, size)
    high = jnp.clip(centre + half, 0, size)
    box = jnp.stack([low[0], high[0], low[1], high[1]]) * cut.astype(jnp.int32)
    area = (high - low).prod() / size**2
    sampled = {"share": jnp.where(cut, 1 - area, mixed), "weight": jnp.where(cut, 1.0, mixed), "box": box}
    return {name: jnp.broadcast_to(x, (b, *x.shape)) for name, x in sampled.items()}


def mix(images: jax.Array, others: jax.Array, sampled: Mapping[str, jax.Array]) -> jax.Array:
    """Mix images with `others`, both fp32 (b, h, w, 3), as sampled by `sample_mix`."""
    top, bottom, left, right = (side[:, None] for side in jnp.moveaxis(sampled["box"], 1, 0))
    y = jnp.arange(images.shape[1])
    x = jnp.arange(images.shape[2])
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]  # (b, h, w)
    weight = jnp.where(inside, 0, sampled["weight"][:, None, None])[..., None]
    return weight * images + (1 - weight) * others
