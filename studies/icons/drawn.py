"""Evaluation sets that a corpus of drawings in the form of the icons has: naming, retrieval, probes of new concepts.

A corpus has splits "train", "test_concepts", "test_rendering" and so on; see `corpus.IconPairs`. Each function that
makes a set takes the set's name, the preprocessing, the root of TFDS data sets and the corpus.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from studies.icons import corpus
from studies.icons.clustered import ClusteredZeroShotSet, Task, TransferProbeSet
from studies.icons.splits import hash_rank
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import encoded_records
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import SHIFTED, VALIDATION, Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet, TextRetrievalSet

Record = dict[str, Any]
PROBE_CLASSES = {"test": 100, "validation": 60}
MIN_DRAWINGS, MIN_EACH_SIDE, SHOTS = 12, 4, (1, 4)
_SHOWN = {"retrieval": "captions"} | dict.fromkeys(("concepts", "rendering", "combinations", "composition"), "classes")
_CS = tuple(10.0**e for e in np.arange(-4, 3.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A corpus of drawings.

    Attributes:
      name, version: of its TFDS data set.
      prepare: returns its builder for a root of TFDS data sets; see `corpus.prepare`.
    """

    name: str
    version: str
    prepare: Callable[[str | None], tfds.core.DatasetBuilder]

    def concepts(self, data_dir: str | None, *roles: str) -> list[Record]:
        """Concepts that have one of `roles`, see `corpus.concepts`."""
        return [c for c in corpus.concepts(self.prepare(data_dir)) if c["role"] in roles]

    def card(self, split: str, *items: list[Any], **fields: str) -> Provenance:
        """Provenance of a set that has `items` of a split."""
        fields = {"role": VALIDATION if split.startswith("validation") else ""} | fields
        items_hash = digest(x for part in items for x in part)
        return Provenance(self.name, self.version, split, items_hash, **fields)


class DrawnSets(SetKind):
    """Sets of a corpus, by their whole names.

    Attributes:
      makers: {name: function of name, preprocessing and root of TFDS data sets}.
    """

    makers: ClassVar[Mapping[str, Callable[[str, Preprocessing, str | None], Any]]] = {}

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the corpus has a set of this name."""
        return spec in cls.makers

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> Any:
        """Open the set `spec`; the profile, which changes published sets only, is ignored."""
        return cls.makers[spec](spec, prepare, data.dir or None)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "classes" or "captions" for sets of images, and "" for probes and texts."""
        return _SHOWN.get(spec.rpartition("_")[2], "")


@functools.lru_cache(maxsize=8)
def records_of(home: Drawn, split: str, data_dir: str | None) -> tuple[list[bytes], list[Record]]:
    """PNG images and the rest of the records of a split, in order of id; kept, because several sets share them."""
    items = sorted(encoded_records(home.prepare(data_dir), split), key=lambda item: item[1]["id"])
    return [image for image, _ in items], [record for _, record in items]


@functools.lru_cache(maxsize=8)
def drawings_of(
    home: Drawn, split: str, prepare: Preprocessing, data_dir: str | None
) -> tuple[list[np.ndarray], list[Record]]:
    """Images of `records_of`, preprocessed, and the rest of the records; kept as well."""
    images, others = records_of(home, split, data_dir)
    return [prepare(image) for image in images], others


def zeroshot(
    name: str, prepare: Preprocessing, data_dir: str | None, home: Drawn, split: str, roles: tuple[str, ...]
) -> ClusteredZeroShotSet:
    """The images of `split` among the names of the concepts that have one of `roles`."""
    classes = home.concepts(data_dir, *roles)
    index = {concept["id"]: i for i, concept in enumerate(classes)}
    images, records = drawings_of(home, split, prepare, data_dir)
    names = [concept["name"] for concept in classes]
    card = home.card(
        split,
        [(record["id"], record["concept"]) for record in records],
        names,
        protocol="nearest class text by cosine, mean over drawings; intervals by resampling concepts",
        preprocessing=prepare.resizing,
        templates="name",
        **({"role": SHIFTED} if split == "test_rendering" else {}),
    )
    labels = np.array([index[record["concept"]] for record in records])
    return ClusteredZeroShotSet(name, images, labels, [[n] for n in names], {}, names, card, together=labels)


def retrieval(name: str, prepare: Preprocessing, data_dir: str | None, home: Drawn, part: str) -> RetrievalSet:
    """One drawing of each concept of a rendering split, the first by id, with all names of its concept."""
    split = f"{part}_rendering"
    images, records = drawings_of(home, split, prepare, data_dir)
    concepts = {concept["id"]: concept for concept in home.concepts(data_dir, "train")}
    first = {record["concept"]: i for i, record in reversed(list(enumerate(records)))}
    chosen = sorted(first.values())
    captions = []
    for i in chosen:
        concept = concepts[records[i]["concept"]]
        captions.append(list(dict.fromkeys([concept["name"], *concept["captions"], *concept["aliases"]])))
    card = home.card(
        split,
        [records[i]["id"] for i in chosen],
        captions,
        protocol="recall, any match; intervals by resampling images",
        preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )
    return RetrievalSet(name, [images[i] for i in chosen], captions, card)


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


def probe(name: str, prepare: Preprocessing, data_dir: str | None, home: Drawn, part: str) -> TransferProbeSet:
    """Concepts without training drawings, learned from some families and recognised in drawings by others."""
    images, records = drawings_of(home, "validation_concepts", prepare, data_dir)
    tuning = probe_concepts(records, PROBE_CLASSES["validation"])
    split, measured = "validation_concepts", tuning
    if part == "validation":
        tuning, measured = tuning[::2], tuning[1::2]
    tuning_task = _task(images, records, tuning)
    if part == "test":
        split = "test_concepts"
        images, records = drawings_of(home, split, prepare, data_dir)
        measured = probe_concepts(records, PROBE_CLASSES["test"])
    card = home.card(
        split,
        [(record["id"], record["concept"]) for record in records],
        [tuning, measured],
        protocol="features before projection; learned from some families, tested on others; standardised, L-BFGS, C on "
        "other concepts; 10 neighbours (T 0.07); intervals by resampling concepts",
        preprocessing=prepare.resizing,
        metric="linear/top1",
    )
    return TransferProbeSet(name, tuning_task, _task(images, records, measured), _CS, SHOTS, card=card)


def aliases(name: str, prepare: Preprocessing, data_dir: str | None, home: Drawn, part: str) -> TextRetrievalSet:
    """Retrieve the names of unseen concepts by their aliases, without those that are another concept's name."""
    del prepare
    concepts = home.concepts(data_dir, f"{part}_concepts")
    names = [concept["name"] for concept in concepts]
    taken = set(names)
    queries = [(text, i) for i, concept in enumerate(concepts) for text in concept["aliases"] if text not in taken]
    card = home.card(
        f"{part}_concepts",
        names,
        queries,
        protocol="recall of names by cosine of text embeddings; intervals by resampling concepts",
        metric="r1",
    )
    return TextRetrievalSet(name, names, queries, card=card, together=np.array([i for _, i in queries]))
