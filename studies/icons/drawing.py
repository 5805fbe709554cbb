"""SVG icons drawn as small pictures, by processes of their own: the renderer holds the interpreter while it works.

`python -m studies.icons.drawing` is such a process: it reads pickled drawings from its input, writes pickled
pictures to its output, and imports little, so that it starts in a fraction of a second.
"""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
import PIL.Image

from xclip_jax.core.errors import UserError

SIZE, SIGNATURE = 64, 16
MIN_INK, MAX_INK = 0.01, 0.98
INK = 250  # a pixel with a darker channel is ink
_CHUNK = 2000

Drawing = tuple[str, tuple[float, float, float, float]]  # body and view box


class Picture(NamedTuple):
    """A drawn icon.

    Attributes:
      png: 64 x 64 RGB.
      ink: share of pixels that are not background.
      signature: 256 bytes, by which drawings are compared; see `signature`.
    """

    png: bytes
    ink: float
    signature: bytes


def svg(body: str, box: tuple[float, float, float, float]) -> str:
    """A complete SVG of an icon's body, its view box widened to a square around its middle; `currentColor` is black."""
    left, top, width, height = box
    side = max(width, height)
    view = (left - (side - width) / 2, top - (side - height) / 2, side, side)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{" ".join(f"{x:g}" for x in view)}">{body}</svg>'
    )


def draw(body: str, box: tuple[float, float, float, float]) -> Picture:
    """Draw an icon in black, or its own colours, on white; what the renderer refuses has no ink."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg(body, box), width=SIZE, height=SIZE, skip_system_fonts=True, background="#ffffff"
        )
    except ValueError:
        return Picture(b"", 0.0, b"")
    with PIL.Image.open(io.BytesIO(png)) as image:
        picture = image.convert("RGB")
    ink = np.asarray(picture).min(axis=-1) < INK
    out = io.BytesIO()
    picture.save(out, "png")
    return Picture(out.getvalue(), float(ink.mean()), signature(picture) if ink.any() else b"")


def signature(picture: PIL.Image.Image) -> bytes:
    """The drawing in grey, cut to its bounding box, padded to a square and 16 x 16 by area mean: bytes, row by row.

    The box has fractions of pixels, as far as ink covers those at its edges: else the same drawing at another size or
    place would be shifted by up to half a pixel. Bytes are compared in whole numbers, see `splits.near`.
    """
    ink = 255 - np.asarray(picture).min(axis=-1).astype(np.int32)
    left, right = _extent(ink.max(axis=0))
    top, bottom = _extent(ink.max(axis=1))
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    # Around a drawing as large as the picture the square is never larger than one more picture on each side.
    margin_x, margin_y = picture.size
    canvas = PIL.Image.new("L", (3 * margin_x, 3 * margin_y), 255)
    canvas.paste(picture.convert("L"), (margin_x, margin_y))
    box = (margin_x + x - half, margin_y + y - half, margin_x + x + half, margin_y + y + half)
    return canvas.resize((SIGNATURE, SIGNATURE), PIL.Image.Resampling.BOX, box=box).tobytes()


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Where ink begins and ends along an axis, from the darkest pixel at each place, int (n,)."""
    places, full = np.flatnonzero(profile > 255 - INK), profile.max()
    first, last = places[0], places[-1]
    return float(first + 1 - profile[first] / full), float(last + profile[last] / full)


def draw_all(drawings: Sequence[Drawing], progress: Callable[[int], None] = lambda done: None) -> list[Picture]:
    """Draw icons on all cores, in their order.

    Args:
      drawings: body and view box of each icon.
      progress: called with the number of pictures that are ready.

    Raises:
      UserError: resvg-py is missing, or a drawing process ended with an error.
    """
    chunks = [drawings[start : start + _CHUNK] for start in range(0, len(drawings), _CHUNK)]
    pictures: list[list[Picture]] = [[] for _ in chunks]
    done = 0
    with ThreadPoolExecutor(_cores()) as pool:
        tasks = {pool.submit(_in_process, chunk): i for i, chunk in enumerate(chunks)}
        try:
            for task in as_completed(tasks):
                pictures[tasks[task]] = task.result()
                done += len(chunks[tasks[task]])
                progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [picture for part in pictures for picture in part]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_process(chunk: Sequence[Drawing]) -> list[Picture]:
    # The process imports from where this one does, wherever it was started.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "studies.icons.drawing"]
    ended = subprocess.run(command, input=pickle.dumps(list(chunk)), capture_output=True, env=environment, check=False)
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {ended.returncode}"]
        raise UserError(f"icons could not be drawn ({lines[-1]}); the drawings need pip install 'xclip_jax[demo]'.")
    return [Picture(*fields) for fields in pickle.loads(ended.stdout)]


def main() -> None:
    """Draw what the standard input asks for."""
    drawings: list[Drawing] = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps([tuple(draw(*drawing)) for drawing in drawings]))


if __name__ == "__main__":
    main()
