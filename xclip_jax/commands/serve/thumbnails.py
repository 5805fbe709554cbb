"""Small images for the page, made by few threads and in little memory."""

import asyncio
import collections
import functools
import io
from collections.abc import Callable

from anyio import CapacityLimiter, to_thread
from PIL import Image, ImageOps

from xclip_jax.core.errors import UserError
from xclip_jax.data import images
from xclip_jax.data.images import MAX_PIXELS, WeightedSemaphore, formats

SIDE = 280  # of the longer side, pixels
_KEPT = 1024  # in memory, 10 kB each
_THREADS = 2  # so that searches find a free core
# Pixels of the images that are decoded at once, of 4 to 8 bytes: one of the largest, or several small ones.
_IN_FLIGHT = WeightedSemaphore(MAX_PIXELS)


class Thumbnails:
    """Thumbnails by the number of their image: the newest are kept, and one that is being made is not made again."""

    def __init__(self, make: Callable[[int], bytes]) -> None:
        """Make thumbnails by `make`, which runs in threads."""
        self._make, self._limiter = make, CapacityLimiter(_THREADS)
        self._tasks: collections.OrderedDict[int, asyncio.Task[bytes]] = collections.OrderedDict()

    async def get(self, image: int) -> bytes:
        """Return a thumbnail. Raises what `make` raises."""
        if image not in self._tasks:
            work = to_thread.run_sync(self._make, image, limiter=self._limiter)
            task = self._tasks[image] = asyncio.ensure_future(work)
            task.add_done_callback(functools.partial(self._forget_failed, image))
            if len(self._tasks) > _KEPT:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(image)
        return await asyncio.shield(self._tasks[image])  # others may wait for it

    def _forget_failed(self, image: int, task: asyncio.Task[bytes]) -> None:
        if (task.cancelled() or task.exception()) and self._tasks.get(image) is task:
            del self._tasks[image]


def thumbnail(content: bytes) -> bytes:
    """Return an image as WebP of at most `SIDE` x `SIDE` pixels, rotated by its EXIF tag.

    Raises:
      UserError: content that is not an image, or has more than `MAX_PIXELS`.
    """
    small = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise UserError(f"The image has {pixels:,} pixels, more than {MAX_PIXELS:,}.")
            with _IN_FLIGHT.hold(pixels):
                _shrink(image).save(small, "WEBP", quality=85)
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise errors of any class for damaged files
        raise UserError(f"The image cannot be read ({error}).") from error
    return small.getvalue()


def _shrink(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "P"):  # Pillow resizes these without interpolation
        image = image.convert("RGBA")
    elif image.mode.startswith(("I", "F")):  # 16 bits, floats
        image = images.to_rgb(image, images.WHITE)
    image.thumbnail((SIDE, SIDE))  # decodes a JPEG at a fraction of its size
    return ImageOps.exif_transpose(image)
