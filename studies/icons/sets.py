"""Evaluation sets of the icons, each for tests and, by other names, for tuning.

Their names in a config are studies.icons.sets:IconSets/NAME, with these names:

    test_concepts       zero-shot: drawings of concepts that are not in training, among the names of these; a
                        class's only prompt is its name
    test_rendering      out of domain: known concepts as drawn by artists who are not in training, among the
                        names of all concepts of training
    test_retrieval      the first drawing of each concept of test_rendering, with the name, its other forms and
                        aliases as captions
    test_probe          visual: new concepts learned from some artists and recognised in drawings by others; 100 of
                        test_concepts by linear probe, neighbours and few shots; C is chosen on 60 of
                        validation_concepts
    test_dense          dense: outside, drawn and enclosed parts of 1,500 drawings of test_concepts by a linear probe
                        of patches that learns from 1,500 of validation_concepts
    test_aliases        textual: names of the unseen concepts, retrieved by their aliases
    test_categories     textual: the category by a linear probe on names, trained on training's concepts, C chosen on
                        validation_concepts, tested on test_concepts
    validation_...      the same on the validation splits; a probe's choices are made on one half of their concepts

Intervals resample concepts, not drawings.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from studies.icons import corpus, drawn
from studies.icons.drawing import INK
from studies.icons.drawn import Drawn, DrawnSets
from studies.icons.splits import hash_rank
from xclip_jax.data.images import decode
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import dense
from xclip_jax.evaluators.base import Display, pictures
from xclip_jax.evaluators.dense import DenseSet, MaskedImages
from xclip_jax.evaluators.probe import ProbeSet, Sweep

KIND = "studies.icons.sets:IconSets"
ICONS = Drawn("icon_pairs", str(corpus.IconPairs.VERSION), corpus.prepare)
DENSE_DRAWINGS = (1200, 300, 1500)  # fitted, for the choice of C, tested
_CATEGORIES = 20  # the commonest ones of training


def _categories(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> ProbeSet:
    """Names of concepts, classified by category; the commonest categories in training are the classes."""
    del prepare
    train, held, tested = (ICONS.concepts(data_dir, role) for role in ("train", "validation_concepts", "test_concepts"))
    if part == "validation":
        ordered = sorted(held, key=lambda concept: hash_rank("half", concept["id"]))
        held, tested = ordered[::2], ordered[1::2]
    numbers: dict[str, int] = {}
    for concept in train:
        numbers[concept["category"]] = numbers.get(concept["category"], 0) + 1
    numbers.pop("", None)
    classes = sorted(sorted(numbers, key=lambda text: (-numbers[text], text))[:_CATEGORIES])
    parts = [[c for c in concepts if c["category"] in classes] for concepts in (train, held, tested)]
    labels = tuple(np.array([classes.index(c["category"]) for c in part], int) for part in parts)
    train_names, held_names, test_names = ([c["name"] for c in part] for part in parts)
    card = ICONS.card(
        f"train+{part}_concepts" if part == "test" else "validation_concepts",
        [(c["name"], c["category"]) for part in parts for c in part],
        protocol="linear probe (L-BFGS, C of 7 on validation) on text features before projection",
        metric="linear/top1",
    )
    sweep = Sweep(halvings=0, tolerance=1e-4)
    return ProbeSet(name, train_names, held_names, test_names, {"": labels}, sweep=sweep, neighbours=False, card=card)


class Regions(Sequence):
    """Masks of drawings, see `regions`."""

    def __init__(self, drawings: Sequence[bytes]) -> None:
        """`drawings` are encoded images."""
        self._drawings = drawings

    def __len__(self) -> int:
        return len(self._drawings)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        return regions(decode(self._drawings[index]))


def regions(picture: np.ndarray) -> np.ndarray:
    """Return where a drawing on white is outside (0), drawn (1) or enclosed (2), uint8 (h, w).

    Drawn is what counts as ink when a drawing is made. The ground is outside as far as it is connected to the border,
    by sides of pixels and not by their corners; all else is enclosed. A patch in the middle of a shape looks like one
    next to it: only the rest of the drawing tells them apart.

    Args:
      picture: uint8 (h, w, 3).
    """
    drawn = picture.min(axis=-1) < INK
    ground = np.pad(~drawn, 1, constant_values=True).astype(np.uint8)  # one ground around the picture
    connected = cv2.connectedComponents(ground, connectivity=4)[1]
    outside = (connected == connected[0, 0])[1:-1, 1:-1]
    return np.select([drawn, outside], [1, 0], 2).astype(np.uint8)


def dense_sides(concepts: Sequence[str], part: str) -> list[set[str]]:
    """Concepts of validation_concepts by hash: those that are fitted, choose C and, in validation, are tested."""
    order = sorted(set(concepts), key=lambda concept: hash_rank("dense concept", concept))
    quarters = {"test": ((0, 1, 2), (3,), ()), "validation": ((0,), (2,), (1, 3))}[part]
    return [{concept for i, concept in enumerate(order) if i % 4 in some} for some in quarters]


def _dense(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> DenseSet:
    """Drawings and their regions; fitting, the choice of C and the test use different concepts."""
    learned, tested = (drawn.records_of(ICONS, f"{name}_concepts", data_dir) for name in ("validation", part))
    sides = dense_sides([record["concept"] for record in learned[1]], part)
    if part == "test":
        sides[2] = {record["concept"] for record in tested[1]}
    parts, ids = [], []
    for (images, records), number, side in zip((learned, learned, tested), DENSE_DRAWINGS, sides, strict=True):
        some = [i for i, record in enumerate(records) if record["concept"] in side]
        some = sorted(some, key=lambda i: hash_rank("dense drawing", records[i]["id"]))[:number]
        groups = np.unique([records[i]["concept"] for i in some], return_inverse=True)[1]  # last of all the test's
        pngs = [images[i] for i in some]
        parts.append(MaskedImages(pictures(pngs, prepare), Regions(pngs)))
        ids.append([records[i]["id"] for i in some])
    card = ICONS.card(
        f"{part}_concepts",
        *ids,
        protocol=f"{dense.PROTOCOL}; outside, drawn, enclosed; intervals by resampling concepts",
        preprocessing=prepare.resizing,
        metric="miou",
    )
    return DenseSet(name, ("outside", "drawn", "enclosed"), *parts, prepare=prepare, card=card, together=groups)


_MAKERS: Mapping[str, Callable[[str, Preprocessing, str | None], Any]] = {
    f"{KIND}/{part}_{what}": functools.partial(maker, **options)
    for part in ("validation", "test")
    for what, maker, options in (
        ("concepts", drawn.zeroshot, {"home": ICONS, "split": f"{part}_concepts", "roles": (f"{part}_concepts",)}),
        ("rendering", drawn.zeroshot, {"home": ICONS, "split": f"{part}_rendering", "roles": ("train",)}),
        ("retrieval", drawn.retrieval, {"home": ICONS, "part": part}),
        ("probe", drawn.probe, {"home": ICONS, "part": part}),
        ("dense", _dense, {"part": part}),
        ("aliases", drawn.aliases, {"home": ICONS, "part": part}),
        ("categories", _categories, {"part": part}),
    )
}
TESTS = tuple(name for name in _MAKERS if name.startswith(f"{KIND}/test_"))

_PANELS = {
    f"{KIND}/test_concepts": (
        "Things it has never seen",
        "Training had no picture of these, by any artist. The model chooses among {num_classes} new names.",
    ),
    f"{KIND}/test_rendering": (
        "Known things, drawn by other artists",
        "Training showed nothing by these artists. The model chooses among {num_classes} names.",
    ),
}
_CREDIT = (
    "Icons: sets of the npm package @iconify/json, each under its own licence (MIT, Apache-2.0, CC-BY and others); "
    "authors, licences and addresses are in LICENCES.md beside the prepared data."
)


class IconSets(DrawnSets):
    """The sets of this module by their names."""

    names, makers = tuple(_MAKERS), _MAKERS
    display = Display(
        _PANELS, ("cat", "heart", "fruit", "angry face", "arrow left", "clock", "house", "vehicle"), _CREDIT
    )
