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

from studies.icons import corpus
from studies.icons.clustered import (
    ClusteredRetrievalSet,
    ClusteredTextRetrievalSet,
    ClusteredZeroShotSet,
    Task,
    TransferProbeSet,
)
from studies.icons.drawing import INK
from studies.icons.splits import hash_rank
from xclip_jax.data.config import DataConfig
from xclip_jax.data.images import decode
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import encoded_records
from xclip_jax.evaluators import dense
from xclip_jax.evaluators.base import Pictures, SetKind
from xclip_jax.evaluators.dense import DenseSet, MaskedImages
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import SHIFTED, VALIDATION, Provenance, digest

KIND = "studies.icons.sets:IconSets"
Record = dict[str, Any]
PROBE_CLASSES = {"test": 100, "validation": 60}
MIN_DRAWINGS, MIN_EACH_SIDE, SHOTS = 12, 4, (1, 4)
DENSE_DRAWINGS = (1200, 300, 1500)  # fitted, for the choice of C, tested
_CATEGORIES = 20  # the commonest ones of training
_CS = tuple(10.0**e for e in np.arange(-4, 3.5, 0.5))


@functools.lru_cache(maxsize=8)
def _records(split: str, data_dir: str | None) -> tuple[list[bytes], list[Record]]:
    """PNG images and the rest of the records of a split, in order of id; kept, because several sets share them."""
    items = sorted(encoded_records(corpus.prepare(data_dir), split), key=lambda item: item[1]["id"])
    return [image for image, _ in items], [record for _, record in items]


@functools.lru_cache(maxsize=8)
def _drawings(split: str, prepare: Preprocessing, data_dir: str | None) -> tuple[list[np.ndarray], list[Record]]:
    """Images of `_records`, preprocessed; kept as well."""
    images, records = _records(split, data_dir)
    return [prepare(image) for image in images], records


def _concepts(data_dir: str | None, role: str) -> list[Record]:
    return [c for c in corpus.concepts(corpus.prepare(data_dir)) if c["role"] == role]


def _card(split: str, *items: list[Any], **fields: str) -> Provenance:
    fields = {"role": VALIDATION if split.startswith("validation") else ""} | fields
    items_hash = digest(x for part in items for x in part)
    return Provenance("icon_pairs", str(corpus.IconPairs.VERSION), split, items_hash, **fields)


def _zeroshot(name: str, prepare: Preprocessing, data_dir: str | None, split: str, role: str) -> ClusteredZeroShotSet:
    """The images of `split` among the names of the concepts of `role`."""
    classes = _concepts(data_dir, role)
    index = {concept["id"]: i for i, concept in enumerate(classes)}
    images, records = _drawings(split, prepare, data_dir)
    names = [concept["name"] for concept in classes]
    card = _card(
        split,
        [(record["id"], record["concept"]) for record in records],
        names,
        protocol="nearest class text by cosine, mean over drawings; intervals by resampling concepts",
        preprocessing=prepare.resizing,
        templates="name",
        **({"role": SHIFTED} if split == "test_rendering" else {}),
    )
    labels = np.array([index[record["concept"]] for record in records])
    coarse = [concept["category"] or "none" for concept in classes]
    return ClusteredZeroShotSet(name, images, labels, [[n] for n in names], {}, names, card, coarse)


def _retrieval(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> ClusteredRetrievalSet:
    """One drawing of each concept of a rendering split, the first by id, with all names of its concept."""
    split = f"{part}_rendering"
    images, records = _drawings(split, prepare, data_dir)
    concepts = {concept["id"]: concept for concept in _concepts(data_dir, "train")}
    first = {record["concept"]: i for i, record in reversed(list(enumerate(records)))}
    chosen = sorted(first.values())
    captions = []
    for i in chosen:
        concept = concepts[records[i]["concept"]]
        captions.append(list(dict.fromkeys([concept["name"], *concept["captions"], *concept["aliases"]])))
    card = _card(
        split,
        [records[i]["id"] for i in chosen],
        captions,
        protocol="recall, any match; intervals by resampling images",
        preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )
    return ClusteredRetrievalSet(name, [images[i] for i in chosen], captions, card)


def artists_side(family: str) -> int:
    """0 for the families whose drawings a probe learns from, 1 for those that it is tested on."""
    return int(hash_rank("probe side", family), 16) % 2


def probe_concepts(records: list[Record], number: int) -> list[str]:
    """The first concepts by hash with enough drawings, and enough of them by the families of each side."""
    sides: dict[str, list[int]] = {}
    for record in records:
        sides.setdefault(record["concept"], []).append(artists_side(record["family"]))
    enough = [
        concept
        for concept, drawn in sides.items()
        if len(drawn) >= MIN_DRAWINGS and MIN_EACH_SIDE <= sum(drawn) <= len(drawn) - MIN_EACH_SIDE
    ]
    return sorted(enough, key=lambda concept: hash_rank("probe concept", concept))[:number]


def _task(images: list[np.ndarray], records: list[Record], concepts: list[str]) -> Task:
    label = {concept: i for i, concept in enumerate(concepts)}

    def side_of(side: int) -> tuple[list[np.ndarray], np.ndarray]:
        part = [i for i, r in enumerate(records) if r["concept"] in label and artists_side(r["family"]) == side]
        return [images[i] for i in part], np.array([label[records[i]["concept"]] for i in part], int)

    (train, train_labels), (test, test_labels) = side_of(0), side_of(1)
    return Task(train, test, (train_labels, test_labels))


def _probe(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> TransferProbeSet:
    images, records = _drawings("validation_concepts", prepare, data_dir)
    tuning = probe_concepts(records, PROBE_CLASSES["validation"])
    split, measured = "validation_concepts", tuning
    if part == "validation":
        tuning, measured = tuning[::2], tuning[1::2]
    tuning_task = _task(images, records, tuning)
    if part == "test":
        split = "test_concepts"
        images, records = _drawings(split, prepare, data_dir)
        measured = probe_concepts(records, PROBE_CLASSES["test"])
    card = _card(
        split,
        [(record["id"], record["concept"]) for record in records],
        [tuning, measured],
        protocol="features before projection; learned from some families, tested on others; standardised, L-BFGS, C on "
        "other concepts; 10 neighbours (T 0.07); intervals by resampling concepts",
        preprocessing=prepare.resizing,
        metric="linear/top1",
    )
    return TransferProbeSet(name, tuning_task, _task(images, records, measured), _CS, SHOTS, card=card)


def _aliases(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> ClusteredTextRetrievalSet:
    """Retrieve the names of unseen concepts by their aliases, without those that are another concept's name."""
    del prepare
    concepts = _concepts(data_dir, f"{part}_concepts")
    names = [concept["name"] for concept in concepts]
    taken = set(names)
    queries = [(text, i) for i, concept in enumerate(concepts) for text in concept["aliases"] if text not in taken]
    card = _card(
        f"{part}_concepts",
        names,
        queries,
        protocol="recall of names by cosine of text embeddings; intervals by resampling concepts",
        metric="r1",
    )
    return ClusteredTextRetrievalSet(name, names, queries, card=card)


def _categories(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> ProbeSet:
    """Names of concepts, classified by category; the commonest categories in training are the classes."""
    del prepare
    train, held, tested = (_concepts(data_dir, role) for role in ("train", "validation_concepts", "test_concepts"))
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
    card = _card(
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
    learned, tested = (_records(f"{name}_concepts", data_dir) for name in ("validation", part))
    sides = dense_sides([record["concept"] for record in learned[1]], part)
    if part == "test":
        sides[2] = {record["concept"] for record in tested[1]}
    parts, ids = [], []
    for (images, records), number, side in zip((learned, learned, tested), DENSE_DRAWINGS, sides, strict=True):
        some = [i for i, record in enumerate(records) if record["concept"] in side]
        some = sorted(some, key=lambda i: hash_rank("dense drawing", records[i]["id"]))[:number]
        pngs = [images[i] for i in some]
        groups = np.unique([records[i]["concept"] for i in some], return_inverse=True)[1]
        parts.append(MaskedImages(Pictures(pngs, prepare), Regions(pngs), groups))
        ids.append([records[i]["id"] for i in some])
    card = _card(
        f"{part}_concepts",
        *ids,
        protocol=f"{dense.PROTOCOL}; outside, drawn, enclosed; intervals by resampling concepts",
        preprocessing=prepare.resizing,
        metric="miou",
    )
    return DenseSet(name, ("outside", "drawn", "enclosed"), *parts, prepare=prepare, card=card)


_Maker = Callable[[str, Preprocessing, str | None], Any]
_MAKERS: Mapping[str, _Maker] = {
    f"{KIND}/{part}_{what}": functools.partial(maker, **options)
    for part in ("validation", "test")
    for what, maker, options in (
        ("concepts", _zeroshot, {"split": f"{part}_concepts", "role": f"{part}_concepts"}),
        ("rendering", _zeroshot, {"split": f"{part}_rendering", "role": "train"}),
        ("retrieval", _retrieval, {"part": part}),
        ("probe", _probe, {"part": part}),
        ("dense", _dense, {"part": part}),
        ("aliases", _aliases, {"part": part}),
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


class IconSets(SetKind):
    """The sets of this module by their names."""

    names = tuple(_MAKERS)
    panels = _PANELS
    queries = ("cat", "heart", "fruit", "angry face", "arrow left", "clock", "house", "vehicle")
    credit = _CREDIT

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the icons have a set of this name."""
        return spec in _MAKERS

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile) -> Any:
        """Open the set `spec`; the profile, which changes published sets only, is ignored."""
        return _MAKERS[spec](spec, Profile().preprocessing(prepare), data.dir or None)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "classes" or "captions" for sets of images, and "" for probes and texts."""
        return {"concepts": "classes", "rendering": "classes", "retrieval": "captions"}.get(spec.rpartition("_")[2], "")
