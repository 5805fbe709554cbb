"""A picture of a model's predictions, drawn with Pillow as rows of text, boxes and images."""

import functools
import io
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from xclip_jax.report.examples import SHOWN, Cluster, Examples, Gallery, Prediction, SearchResult

WIDTH = 1600  # pixels
MARGIN = 56
INK = "#111827"
MUTED = "#6b7280"
PAPER = "#f3f4f6"
CARD = "#ffffff"
EDGE = "#e5e7eb"
RIGHT = "#a7f3d0"
RIGHT_INK = "#047857"
OTHER = "#e0e7ff"

# Drawn at twice the size and halved, since Pillow smooths letters but not the edges of boxes.
_SCALE = 2
_GLYPHS = frozenset(map(chr, (*range(32, 127), *map(ord, "©«°±·»‘’“”…"))))

GAP = 20
CARDS = 4  # in a row
NAME_HEIGHT = 182  # height of a card
SEARCH_HEIGHT = 186
CLUSTER_HEIGHT = 210
VALUE = 46  # width of the number at the end of a bar
CLUSTERS = 8


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)


def printable(text: str) -> str:
    """Return text in the glyphs of Pillow's font: accents are dropped, other characters become "?"."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = re.sub("[‐‑–—−]", "-", plain)
    return "".join(c if c in _GLYPHS else "?" for c in plain)


def fit(text: str, size: int, width: float) -> str:
    """Return printable text, cut with an ellipsis to at most `width` pixels at font `size`."""
    text = printable(text[:500])  # longer text never fits and would be slow to cut
    if _font(size).getlength(text) <= width * _SCALE:
        return text
    while text and _font(size).getlength(text + "…") > width * _SCALE:
        text = text[:-1]
    return text.rstrip(" ,:(") + "…"


class Row:
    """A part of the picture with full width and this height in pixels."""

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
        """Draw one line with its baseline at y, from x on ("ls"), to x ("rs") or around x ("ms")."""
        stroke = size / 36 if bold else 0  # an outline replaces the font's missing bold weight
        place = (x * _SCALE, y * _SCALE)
        self._pen.text(place, fit(text, size, width), color, _font(size), anchor, stroke_width=stroke)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0, edge: str = ""
    ) -> None:
        """Draw a filled box with round corners and an edge of this colour."""
        corners = [v * _SCALE for v in (x, y, x + width, y + height)]
        self._pen.rounded_rectangle(corners, radius * _SCALE, fill, edge or None, _SCALE)

    def picture(self, x: float, y: float, side: int, image: np.ndarray) -> None:
        """Draw an image, uint8 (h, w, 3), as a square of `side` pixels."""
        square = Image.fromarray(image).resize((side * _SCALE, side * _SCALE), Image.Resampling.LANCZOS)
        self.image.paste(square, (round(x * _SCALE), round(y * _SCALE)))


def save(path: str | os.PathLike, rows: list[Row], *, width: int = WIDTH) -> None:
    """Stack the rows and write them as a PNG scaled to `width` pixels."""
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


def draw(path: str | os.PathLike, examples: Examples, *, title: str = "Predictions of the model") -> None:
    """Write a PNG of a title, searches, classified sets and clusters."""
    head = Row(88)
    head.text(MARGIN, 76, title, 42, bold=True, width=WIDTH - 2 * MARGIN)
    rows = [head]
    if examples.searches:
        sentence = f"For each text, the top of {len(examples.gallery.images):,} test images, best first."
        card = functools.partial(search_card, examples.gallery)
        rows += [_section("Search by words", sentence), *grid(examples.searches, 2, SEARCH_HEIGHT, card)]
    for named in examples.named:
        card = functools.partial(name_card, named.num_classes)
        rows += [_section(named.title, named.sentence), *grid(named.guesses[: 2 * CARDS], CARDS, NAME_HEIGHT, card)]
    clusters = examples.clusters
    if clusters:
        sentence = (
            f"The non-contrastive loss assigns images and texts to {clusters.k:,} clusters without labels, "
            f"{clusters.used:,} of them in use here. Shown are those with the most images; in green, the nearest names."
        )
        card = functools.partial(cluster_card, clusters.gallery)
        rows += [_section("Clusters", sentence), *grid(clusters.most[:CLUSTERS], 2, CLUSTER_HEIGHT, card)]
    save(path, [*rows, Row(MARGIN)])


def _section(title: str, sentence: str) -> Row:
    row = Row(104)
    row.text(MARGIN, 56, title, 26, bold=True)
    row.text(MARGIN, 84, sentence, 17, MUTED, width=WIDTH - 2 * MARGIN)
    return row


def grid(items: Sequence[Any], columns: int, height: int, cell: Callable[[Row, float, float, Any], None]) -> list[Row]:
    """Return rows of `columns` cards of this height; cell(row, x, width, item) fills one."""
    width = (WIDTH - 2 * MARGIN - GAP * (columns - 1)) / columns
    rows = []
    for start in range(0, len(items), columns):
        row = Row(height + GAP)
        for column, item in enumerate(items[start : start + columns]):
            x = MARGIN + column * (width + GAP)
            row.box(x, 0, width, height, CARD, radius=12, edge=EDGE)
            cell(row, x, width, item)
        rows.append(row)
    return rows


def name_card(num_classes: int, row: Row, x: float, width: float, prediction: Prediction) -> None:
    """Draw an image with its best names as bars."""
    place = "right" if prediction.rank == 1 else f"rank {prediction.rank:,} of {num_classes:,}"
    row.text(x + 16, 31, prediction.name, 17, bold=True, width=width - 152)
    ink = RIGHT_INK if prediction.rank <= 5 else MUTED
    row.text(x + width - 16, 31, place, 14, ink, anchor="rs", bold=prediction.rank == 1)
    row.picture(x + 16, 60, SHOWN, prediction.image)
    left = x + 16 + SHOWN + 16
    room = width - SHOWN - 48
    for i, label in enumerate(prediction.best):
        y = 46 + i * 25
        length = (room - VALUE) * label.value
        row.box(left, y, max(length, 4), 22, RIGHT if label.right else OTHER, radius=4)
        ink = RIGHT_INK if label.right else INK
        row.text(left + 8, y + 16, label.name, 14, ink, width=room - VALUE - 10, bold=label.right)
        row.text(left + room, y + 16, label.text, 13, MUTED, anchor="rs")


def search_card(gallery: Gallery, row: Row, x: float, width: float, result: SearchResult) -> None:
    """Draw a text with its best images."""
    row.text(x + 20, 38, f"“{result.text}”", 20, bold=True, width=width - 40)
    _images(row, x, width, 56, gallery, result.images)


def _images(row: Row, x: float, width: float, y: float, gallery: Gallery, indices: Sequence[int]) -> None:
    step = (width - 40 + 16) / 6
    for column, i in enumerate(indices):
        left = x + 20 + column * step + (step - 16 - SHOWN) / 2
        row.picture(left, y, SHOWN, gallery.shown[i])
        row.text(left + SHOWN / 2, y + SHOWN + 19, gallery.names[i], 13, MUTED, anchor="ms", width=step - 10)


def cluster_card(gallery: Gallery, row: Row, x: float, width: float, cluster: Cluster) -> None:
    """Draw a cluster with its nearest names and images."""
    row.text(x + 20, 36, f"cluster {cluster.number}", 17, bold=True)
    row.text(x + width - 20, 36, f"{cluster.pictures} images", 14, MUTED, anchor="rs")
    row.text(x + 20, 62, " · ".join(cluster.words[:4]), 16, RIGHT_INK, width=width - 40)
    _images(row, x, width, 80, gallery, cluster.images)
