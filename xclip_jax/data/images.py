"""Decodes images to 8-bit RGB on the host: JPEGs by libjpeg-turbo, other formats by Pillow."""

import functools
import io
from typing import Any, TypeGuard

import numpy as np
import simplejpeg
from PIL import Image

from xclip_jax.core.errors import BadSample

WHITE, DROPPED = "white", "drop_alpha"
DECODINGS: dict[str, Any] = {
    "xclip": {"background": WHITE, "rotate": True},
    "open_clip": {"background": DROPPED, "rotate": False},
    "transformers": {"background": WHITE, "rotate": False},  # from version 5.21 on
}
MAX_PIXELS = 1 << 26  # 200 MB decoded; larger images are decompression bombs, or useless at 224 pixels
_MAX_SIDE = 65_500  # of libjpeg
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82", b"GIF8": b";"}  # first and last bytes of whole files
# Without EPS (an external program), ICO (decoded when opened) and Pillow's rare formats.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112
# By the tag's value. `ImageOps.exif_transpose` also writes all other tags again, and fails if one of them is damaged.
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Convert an image of any mode except floats to RGB, 16 bits to 8, with transparency by `background`."""
    if image.mode == "F":
        raise BadSample("image of floats", "save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to white
        values = np.array(image)
        clear = values == image.info.get("transparency", -1)
        values = np.right_shift(np.clip(values, 0, 65535, out=values), 8, out=values)
        if background == WHITE:
            values[clear] = 255
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and background == WHITE:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise
    return image.convert("RGB")


def is_jpeg(data: Any) -> TypeGuard[bytes]:
    """Whether `data` is bytes that begin as a JPEG file does."""
    return isinstance(data, bytes) and data[:2] == b"\xff\xd8"


def _check_pixels(w: int, h: int) -> None:
    if not 0 < w * h <= MAX_PIXELS or max(w, h) > _MAX_SIDE:
        most = f"at most {MAX_PIXELS:,}, and {_MAX_SIDE:,} a side"
        raise BadSample("image too large" if w * h else "image is empty", f"{w} x {h} pixels; {most}")


@functools.cache
def formats() -> list[str]:
    """Return Pillow's names of the supported file formats."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _is_cut(data: bytes) -> bool:
    """Whether a file that cannot be decoded lacks its end."""
    if data[:4] == b"RIFF":  # WebP
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return any(data.startswith(first) and not data.rstrip(b"\0").endswith(last) for first, last in _ENDS.items())


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag, which browsers ignore
        return 1


def _decode_jpeg(data: bytes, scaled_to: int, rotate: bool) -> np.ndarray | None:
    """Decode a JPEG by libjpeg-turbo; return None if Pillow has to decode it or to name its fault."""
    try:
        header: Any = simplejpeg.decode_jpeg_header(data, strict=False)
        h, w, colors, _ = header
        _check_pixels(w, h)
        if colors in ("CMYK", "YCCK"):
            return None
        if rotate and b"Exif" in data and _orientation(Image.open(io.BytesIO(data), formats=formats())) != 1:
            return None
        if not scaled_to:
            return simplejpeg.decode_jpeg(data, "RGB")
        size: dict[str, Any] = {"min_height": scaled_to, "min_width": scaled_to, "min_factor": 2}
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, **size)
    except (LookupError, OSError, SyntaxError, TypeError, ValueError):  # of either library for a damaged file
        return None


def open_image(data: bytes | Image.Image, *, rotate: bool = True) -> Image.Image:
    """Open an image in its stored mode; see `decode` for `rotate` and errors."""
    about = f"{len(data)} bytes that begin with {data[:8]!r}" if isinstance(data, bytes) else "a Pillow image"
    try:
        image = Image.open(io.BytesIO(data), formats=formats()) if isinstance(data, bytes) else data
        _check_pixels(*image.size)
        image.load()
        turn = _TURNS.get(_orientation(image)) if rotate else None
        return image if turn is None else image.transpose(turn)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise errors of any class for damaged files
        reason, cause = "image damaged", f"{about} ({error})"
        if isinstance(error, Image.UnidentifiedImageError):
            reason, cause = "not an image", about  # its message has an address of the memory
        if isinstance(error, Image.DecompressionBombError):  # Pillow's bound, before the size is known
            reason = "image too large"
        elif "truncated" in str(error) or (isinstance(data, bytes) and _is_cut(data)):
            reason = "image cut off"
        raise BadSample(reason, cause) from error


def decode(
    data: bytes | np.ndarray | Image.Image, *, scaled_to: int = 0, background: str = WHITE, rotate: bool = True
) -> np.ndarray:
    """Decode an image to uint8 RGB (h, w, 3). Arrays (h, w, 3) and grey (h, w, 1) pass.

    libjpeg-turbo decodes JPEGs, except for CMYK and rotated ones, and Pillow the first frame of other formats.

    Args:
      data: the image.
      scaled_to: if set, a JPEG may be decoded to a half, a quarter or an eighth of its size, slightly less exactly, but
        to at least this many pixels a side.
      background: `WHITE` lays transparent images on white, `DROPPED` shows the colours under the transparency.
      rotate: whether to rotate and reflect the image by its EXIF tag.

    Raises:
      BadSample: not an image, a damaged one, another array, or more than `MAX_PIXELS`, checked before decoding.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.shape[2:] not in ((1,), (3,)) or not data.size:
            raise BadSample("image is not uint8 (h, w, 3)", f"an array of {data.dtype}, {data.shape}")
        return data if data.shape[2] == 3 else data.repeat(3, axis=2)
    if is_jpeg(data) and (image := _decode_jpeg(data, scaled_to, rotate)) is not None:
        return image
    return np.array(to_rgb(open_image(data, rotate=rotate), background))
