"""One picture of what a model has learned: names for images, images for words, and clusters where it has any.

Examples are drawn by a seed, never picked by hand.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from xclip_jax.evaluators import Encoder, sets
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, distributions, similarities
from xclip_jax.report.page import CARD, EDGE, INK, MARGIN, MUTED, WIDTH, Strip, save

Cell = Callable[[Strip, float, float, Any], None]

RIGHT, RIGHT_INK, OTHER = "#a7f3d0", "#047857", "#e0e7ff"
GAP = 20
CARDS = 4  # in a row
VALUE = 46  # width of the number beside a bar
SHOWN = 96  # side of an image, pixels; also the size at which sets are loaded to be looked at


@dataclasses.dataclass(frozen=True)
class Panel:
    """A zero-shot set to show: its name in `evaluators.sets`, a title and a sentence that may say {ways}."""

    spec: str
    title: str
    sentence: str


PANELS = (
    Panel(
        "emoji/test_concepts",
        "Things it has never seen",
        "No picture of these was ever shown in training. The model chooses among {ways} new names, each with up to "
        "three keywords.",
    ),
    Panel(
        "emoji/test_rendering",
        "Known things, drawn by another artist",
        "Training showed other artists' pictures of these, never this one. The model chooses among {ways} names.",
    ),
    Panel(
        "emoji/test_line",
        "Line drawings",
        "Training showed colour pictures only. The model chooses among {ways} names.",
    ),
)
QUERIES = (
    "cat",
    "red heart",
    "fruit",
    "angry face",
    "blue",
    "clock",
    "woman with long hair",
    "vehicle on rails",
)


def draw(
    path: str | os.PathLike,
    encoder: Encoder,
    variables: Any,
    *,
    title: str = "What the model sees",
    note: str = "",
    panels: Sequence[Panel] = PANELS,
    queries: Sequence[str] = QUERIES,
    data_dir: str | None = None,
    seed: int = 0,
) -> None:
    """Writes a PNG, 1600 pixels wide. With several processes all of them call this, and the first one writes.

    Args:
      path: of the PNG.
      encoder: of the model.
      variables: what `TwoTowers.apply` takes.
      title: head of the page.
      note: a line below it: which run, how long, how good.
      panels: one set or more whose images get names; the images of the first two are also searched and clustered.
      queries: texts to search with.
      data_dir: root of TFDS data sets, None for the default.
      seed: decides which images are shown.

    Raises:
      UserError: a panel of an unknown set.
    """
    found = [(sets.load(p.spec, encoder.image_size, data_dir), sets.load(p.spec, SHOWN, data_dir)) for p in panels]
    strips = [_head(title, note)]
    for panel, (data, shown) in zip(panels, found, strict=True):
        strips += _names_for_images(panel, encoder, variables, data, shown, np.random.default_rng(seed))
    pool = _Gallery(
        [image for data, _ in found[:2] for image in data.images],
        [image for _, shown in found[:2] for image in shown.images],
        [data.names[label] for data, _ in found[:2] for label in data.labels],
    )
    img = encoder.images(variables, pool.images, ("z", "s"))
    strips += _images_for_words(encoder, variables, pool, img, queries)
    if "s" in img:
        names = list(dict.fromkeys(name for data, _ in found for name in data.names))
        strips += _clusters(encoder, variables, pool, img["s"], names)
    if jax.process_index() == 0:
        save(path, [*strips, Strip(MARGIN)])


@dataclasses.dataclass(frozen=True)
class _Gallery:
    """Images as the model sees them, as people see them, and their names."""

    images: list[np.ndarray]
    shown: list[np.ndarray]
    names: list[str]


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


def _names_for_images(
    panel: Panel, encoder: Encoder, variables: Any, data: ZeroShotSet, shown: ZeroShotSet, rng: np.random.Generator
) -> list[Strip]:
    order = rng.permutation(len(data.labels))
    _, first = np.unique(data.labels[order], return_index=True)  # different classes
    picked = order[np.sort(first)][: 2 * CARDS]
    few = dataclasses.replace(data, images=[data.images[i] for i in picked], labels=data.labels[picked], groups={})
    scores = ZeroShot(encoder, few).scores(variables)[""]
    values, show, meaning = _values(scores, variables)
    best = np.argsort(-scores, axis=1, kind="stable")

    def card(strip: Strip, x: float, width: float, n: int) -> None:
        label = few.labels[n]
        rank = int(np.flatnonzero(best[n] == label)[0]) + 1
        place = "right" if rank == 1 else f"rank {rank:,} of {len(data.prompts):,}"
        strip.text(x + 16, 31, data.names[label], 17, bold=True, width=width - 152)
        strip.text(x + width - 16, 31, place, 14, RIGHT_INK if rank <= 5 else MUTED, anchor="rs", bold=rank == 1)
        strip.picture(x + 16, 60, SHOWN, shown.images[picked[n]])
        left, room = x + 16 + SHOWN + 16, width - SHOWN - 48
        for row, k in enumerate(best[n, :5]):
            y = 46 + row * 25
            length = (room - VALUE) * float(np.clip(values[n, k], 0, 1))
            strip.box(left, y, max(length, 4), 22, RIGHT if k == label else OTHER, radius=4)
            ink = RIGHT_INK if k == label else INK
            strip.text(left + 8, y + 16, data.names[k], 14, ink, width=room - VALUE - 10, bold=k == label)
            strip.text(left + room, y + 16, show(values[n, k]), 13, MUTED, anchor="rs")

    cards = _grid(range(len(picked)), CARDS, 182, card)
    sentence = panel.sentence.format(ways=f"{len(data.prompts):,}")
    return [_section(panel.title, f"{sentence} Bars: {meaning}."), *cards]


def _values(scores: np.ndarray, variables: Any) -> tuple[np.ndarray, Callable[[float], str], str]:
    """What bars show, how it is written and called: probabilities, or without a learned scale the scores themselves."""
    if "log_scale" not in variables["params"]:
        return scores, lambda value: f"{value:.2f}", "likeness of cluster distributions, 0 to 1"
    scale = math.exp(variables["params"]["log_scale"])
    return distributions(scale * scores), _percent, "probability"


def _percent(value: float) -> str:
    return "<1 %" if value < 0.01 else f"{100 * value:.0f} %"


def _images_for_words(
    encoder: Encoder, variables: Any, pool: _Gallery, img: dict[str, np.ndarray], queries: Sequence[str]
) -> list[Strip]:
    txt = encoder.texts(variables, queries, ("z", "s"))
    q = distributions(txt["s"], encoder.tau) if "s" in txt else None
    scores = similarities(img, txt.get("z"), q, encoder.tau)[""].T
    best = np.argsort(-scores, axis=1, kind="stable")

    def card(strip: Strip, x: float, width: float, n: int) -> None:
        strip.text(x + 20, 38, f"“{queries[n]}”", 20, bold=True, width=width - 40)
        _row(strip, x, width, 56, pool, best[n, :6])

    sentence = f"For each text, the best of {len(pool.images):,} test pictures, best first."
    return [_section("Search by words", sentence), *_grid(range(len(queries)), 2, 186, card)]


def _row(strip: Strip, x: float, width: float, y: float, pool: _Gallery, picked: np.ndarray) -> None:
    """Images side by side with their names below."""
    step = (width - 40 + 16) / 6
    for column, i in enumerate(picked):
        left = x + 20 + column * step + (step - 16 - SHOWN) / 2
        strip.picture(left, y, SHOWN, pool.shown[i])
        strip.text(left + SHOWN / 2, y + SHOWN + 19, pool.names[i], 13, MUTED, anchor="ms", width=step - 10)


def _clusters(encoder: Encoder, variables: Any, pool: _Gallery, s_img: np.ndarray, names: list[str]) -> list[Strip]:
    p = distributions(s_img, encoder.tau)
    q = distributions(encoder.texts(variables, names, ("s",))["s"], encoder.tau)
    count = np.bincount(p.argmax(axis=1), minlength=p.shape[1])
    used = np.count_nonzero(count)
    most = np.argsort(-count, kind="stable")[: min(8, used)]

    def card(strip: Strip, x: float, width: float, k: int) -> None:
        strip.text(x + 20, 36, f"cluster {k}", 17, bold=True)
        strip.text(x + width - 20, 36, f"{count[k]} pictures", 14, MUTED, anchor="rs")
        best = np.argsort(-q[:, k], kind="stable")[:4]
        strip.text(x + 20, 62, " · ".join(names[i] for i in best), 16, RIGHT_INK, width=width - 40)
        _row(strip, x, width, 80, pool, np.argsort(-p[:, k], kind="stable")[:6])

    sentence = (
        f"Training without negatives sorts pictures and words into {p.shape[1]:,} clusters, {used:,} of them in use "
        f"here. These hold the most test pictures; in green, the names nearest to each."
    )
    return [_section("Clusters it has found", sentence), *_grid(most, 2, 210, card)]
