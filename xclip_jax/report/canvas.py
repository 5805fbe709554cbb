"""A small canvas on Pillow: rows with text, boxes and images, stacked to one image."""

import functools
import io
import os
import unicodedata

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN = 1600, 56  # pixels
INK, MUTED, PAPER, CARD, EDGE = "#111827", "#6b7280", "#f3f4f6", "#ffffff", "#e5e7eb"

# Drawn at twice the size and halved: Pillow smooths the edges of letters, but not those of boxes.
_SCALE = 2
_GLYPHS = frozenset(map(chr, (*range(32, 127), *map(ord, "©«°±·»‘’“”…"))))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)


def printable(text: str) -> str:
    """Return `text` in the glyphs of Pillow's own font: accents are dropped, other characters become "?"."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c in _GLYPHS else "-" if c in "‐‑–—−" else "?" for c in plain)


def fit(text: str, size: int, width: float) -> str:
    """Return `text`, printable and cut with an ellipsis so that it is at most `width` pixels wide at font `size`."""
    text = printable(text)
    if _font(size).getlength(text) <= width * _SCALE:
        return text
    while text and _font(size).getlength(text + "…") > width * _SCALE:
        text = text[:-1]
    return text.rstrip(" ,:(") + "…"


class Row:
    """A part of the image, `height` pixels high and of its full width. All measures are pixels of the image."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * _SCALE, height * _SCALE), PAPER)
        self._pen = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        color: str = INK,
        *,
        bold: bool = False,
        anchor: str = "ls",
        width: float = WIDTH,
    ) -> None:
        """One line with its baseline at y, from x on ("ls"), to x ("rs") or around x ("ms")."""
        # The font has one weight; half a pixel of outline makes the other.
        stroke = size / 36 if bold else 0
        self._pen.text(
            (x * _SCALE, y * _SCALE), fit(text, size, width), color, _font(size), anchor, stroke_width=stroke
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0, edge: str = ""
    ) -> None:
        """A filled box with round corners, and a line around it where `edge` is a colour."""
        corners = [v * _SCALE for v in (x, y, x + width, y + height)]
        self._pen.rounded_rectangle(corners, radius * _SCALE, fill, edge or None, _SCALE)

    def picture(self, x: float, y: float, side: int, image: np.ndarray) -> None:
        """uint8 (h, w, 3) as a square of `side` pixels."""
        square = Image.fromarray(image).resize((side * _SCALE, side * _SCALE), Image.Resampling.LANCZOS)
        self.image.paste(square, (round(x * _SCALE), round(y * _SCALE)))


def save(path: str | os.PathLike, rows: list[Row], *, width: int = WIDTH) -> None:
    """Stack the rows and write them as a PNG, scaled to `width` pixels, to `path`, on a disk or in a bucket."""
    height = sum(row.image.height for row in rows)
    page = Image.new("RGB", (WIDTH * _SCALE, height), PAPER)
    top = 0
    for row in rows:
        page.paste(row.image, (0, top))
        top += row.image.height
    png = io.BytesIO()
    page = page.reduce(_SCALE)
    if width != WIDTH:
        page = page.resize((width, round(page.height * width / WIDTH)), Image.Resampling.LANCZOS)
    page.save(png, "PNG", optimize=True)
    epath.Path(path).write_bytes(png.getvalue())
