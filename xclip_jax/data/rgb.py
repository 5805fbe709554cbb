"""Images of any mode as RGB of eight bits; the background of transparent ones is config key `data.background`."""

import numpy as np
from PIL import Image

from xclip_jax.core.errors import BadSample

WHITE, DROPPED = "white", "drop_alpha"
BACKGROUNDS = (WHITE, DROPPED)


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Convert any mode to RGB: palettes to colours, 16 bits and floats to 8, transparency as `background` says.

    Raises:
      BadSample: floats that are neither from 0 to 1 nor from 0 to 255.
    """
    if image.mode.startswith(("I", "F")):
        return _to_eight_bits(image, background)
    if image.has_transparency_data and background == WHITE:
        image, canvas = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image, background: str) -> Image.Image:
    """Convert grey of 16 bits, or of floats; Pillow would clip them, to a white or a black image."""
    values = np.array(image)
    if image.mode.startswith("I"):
        clear = values == image.info.get("transparency", -1)
        values = np.right_shift(np.clip(values, 0, 65535, out=values), 8, out=values)
        if background == WHITE:
            values[clear] = 255
    else:
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255):  # as of NaN
            raise BadSample("float image out of range", f"values from {low:g} to {high:g}; scale them to 0 to 1")
        values = np.rint(values * 255) if high <= 1 else values
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of an image is transparent, at least in part."""
    if not image.has_transparency_data:
        return False
    if image.mode.startswith("I"):  # Pillow has no mode of 16 bits with alpha, only a transparent value
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def describe(share: float, background: str) -> str:
    """The share of transparent images and what is made of them, in words."""
    made = "laid on white" if background == WHITE else "read without their alpha, with the colours hidden under it"
    return f"{'less than 1' if 0 < share < 0.01 else f'{100 * share:.0f}'} %, {made}"
