"""One picture of what a model has learned: names for images, images for words, and clusters where it has any."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from xclip_jax.report.canvas import CARD, EDGE, INK, MARGIN, MUTED, WIDTH, Strip, save
from xclip_jax.report.examples import Cluster, Clusters, Examples, Gallery, Prediction, SearchResult, ZeroShotExamples
from xclip_jax.report.selection import SHOWN

Cell = Callable[[Strip, float, float, Any], None]

RIGHT, RIGHT_INK, OTHER = "#a7f3d0", "#047857", "#e0e7ff"
GAP = 20
CARDS = 4  # in a row
VALUE = 46  # width of the number beside a bar
CLUSTERS = 8


def draw(path: str | os.PathLike, examples: Examples, *, title: str = "What the model sees", note: str = "") -> None:
    """Writes a PNG, 1600 pixels wide.

    Args:
      path: of the PNG.
      examples: what is shown.
      title: head of the page.
      note: a line below it: which run, how long, how good.
    """
    strips = [_head(title, note)]
    for named in examples.named:
        strips += _names_for_images(named)
    if examples.searches:
        strips += _images_for_words(examples.gallery, examples.searches)
    if examples.clusters:
        strips += _clusters(examples.clusters)
    save(path, [*strips, Strip(MARGIN)])


def _head(title: str, note: str) -> Strip:
    strip = Strip(116 if note else 88)
    strip.text(MARGIN, 76, title, 42, bold=True, width=WIDTH - 2 * MARGIN)
    strip.text(MARGIN, 108, note, 18, MUTED, width=WIDTH - 2 * MARGIN)
    return strip


def _section(title: str, sentence: str) -> Strip:
    strip = Strip(104)
    strip.text(MARGIN, 56, title, 26, bold=True)
    strip.text(MARGIN, 84, sentence, 17, MUTED, width=WIDTH - 2 * MARGIN)
    return strip


def _grid(items: Sequence[Any], columns: int, height: int, cell: Cell) -> list[Strip]:
    """Cards of `height`, `columns` of them in a row; cell(strip, x, width, item) fills one."""
    width = (WIDTH - 2 * MARGIN - GAP * (columns - 1)) / columns
    strips = []
    for start in range(0, len(items), columns):
        strip = Strip(height + GAP)
        for column, item in enumerate(items[start : start + columns]):
            x = MARGIN + column * (width + GAP)
            strip.box(x, 0, width, height, CARD, radius=12, edge=EDGE)
            cell(strip, x, width, item)
        strips.append(strip)
    return strips


def _names_for_images(named: ZeroShotExamples) -> list[Strip]:
    def card(strip: Strip, x: float, width: float, guess: Prediction) -> None:
        place = "right" if guess.rank == 1 else f"rank {guess.rank:,} of {named.num_classes:,}"
        strip.text(x + 16, 31, guess.name, 17, bold=True, width=width - 152)
        ink = RIGHT_INK if guess.rank <= 5 else MUTED
        strip.text(x + width - 16, 31, place, 14, ink, anchor="rs", bold=guess.rank == 1)
        strip.picture(x + 16, 60, SHOWN, guess.image)
        left, room = x + 16 + SHOWN + 16, width - SHOWN - 48
        for row, choice in enumerate(guess.best):
            y = 46 + row * 25
            length = (room - VALUE) * choice.value
            strip.box(left, y, max(length, 4), 22, RIGHT if choice.right else OTHER, radius=4)
            ink = RIGHT_INK if choice.right else INK
            strip.text(left + 8, y + 16, choice.name, 14, ink, width=room - VALUE - 10, bold=choice.right)
            strip.text(left + room, y + 16, choice.text, 13, MUTED, anchor="rs")

    return [_section(named.title, named.sentence), *_grid(named.guesses[: 2 * CARDS], CARDS, 182, card)]


def _images_for_words(gallery: Gallery, searches: Sequence[SearchResult]) -> list[Strip]:
    def card(strip: Strip, x: float, width: float, found: SearchResult) -> None:
        strip.text(x + 20, 38, f"“{found.text}”", 20, bold=True, width=width - 40)
        _row(strip, x, width, 56, gallery, found.images)

    sentence = f"For each text, the best of {len(gallery.images):,} test pictures, best first."
    return [_section("Search by words", sentence), *_grid(searches, 2, 186, card)]


def _row(strip: Strip, x: float, width: float, y: float, gallery: Gallery, picked: Sequence[int]) -> None:
    """Images side by side with their names below."""
    step = (width - 40 + 16) / 6
    for column, i in enumerate(picked):
        left = x + 20 + column * step + (step - 16 - SHOWN) / 2
        strip.picture(left, y, SHOWN, gallery.shown[i])
        strip.text(left + SHOWN / 2, y + SHOWN + 19, gallery.names[i], 13, MUTED, anchor="ms", width=step - 10)


def _clusters(clusters: Clusters) -> list[Strip]:
    def card(strip: Strip, x: float, width: float, found: Cluster) -> None:
        strip.text(x + 20, 36, f"cluster {found.number}", 17, bold=True)
        strip.text(x + width - 20, 36, f"{found.pictures} pictures", 14, MUTED, anchor="rs")
        strip.text(x + 20, 62, " · ".join(found.words[:4]), 16, RIGHT_INK, width=width - 40)
        _row(strip, x, width, 80, clusters.gallery, found.images)

    sentence = (
        f"Training without negatives sorts pictures and words into {clusters.k:,} clusters, {clusters.used:,} of them "
        "in use here. These hold the most pictures; in green, the names nearest to each."
    )
    return [_section("Clusters it has found", sentence), *_grid(clusters.most[:CLUSTERS], 2, 210, card)]
