"""Evaluation sets of the demo, `emoji/...`; results are means over three artists.

validation_concepts, test_concepts      images of 100 and 200 untrained concepts, among their names; a class is the mean
                                        over its prompts: "name, tag, tag, tag" with each tag first once, and each tag
validation_rendering, test_rendering    trained concepts in a picture by another artist, among all names
test_line, test_line_concepts           line drawings, an untrained style: all names; the 200 test concepts
validation_retrieval, test_retrieval    the images of ..._rendering with name and aliases as captions
test_probe                              visual: category by a linear probe and nearest neighbours, trained on training
                                        images, with C from validation_concepts, tested on test_concepts
test_aliases                            textual: retrieval of the 200 test concepts' names by aliases
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import encoded_records
from xclip_jax.demo import emoji
from xclip_jax.evaluators.base import Display, SetKind
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import SHIFTED, VALIDATION, Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet, TextRetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShotSet

Record = dict[str, Any]
EmojiSet = ZeroShotSet | RetrievalSet | ProbeSet | TextRetrievalSet
Maker = Callable[[str, Preprocessing, str | None], EmojiSet]

_SWEEP = Sweep(halvings=0, tolerance=1e-4)  # only 7 values of C: the demo is short


@functools.lru_cache(maxsize=16)
def _emoji(split: str, prepare: Preprocessing, data_dir: str | None) -> list[Record]:
    """Return the records of a split with their prepared images, cached for several sets."""
    records = encoded_records(emoji.prepare(data_dir), split)
    return [record | {"image": prepare(image)} for image, record in records]


def _classify(name: str, prepare: Preprocessing, data_dir: str | None, *, split: str, role: str = "") -> ZeroShotSet:
    """Return a zero-shot set: the images of `split` among the names of all concepts, or the prompts of one role's."""
    classes = {c["id"]: c for c in emoji.concepts(emoji.prepare(data_dir)) if role in ("", c["role"])}
    records = [r for r in _emoji(split, prepare, data_dir) if r["concept"] in classes]
    index = {concept: i for i, concept in enumerate(classes)}
    labels = np.array([index[r["concept"]] for r in records])
    vendors = np.array([r["vendor"] for r in records])
    groups = {str(v): vendors == v for v in np.unique(vendors)} if len(set(vendors)) > 1 else {}
    names = [c["name"] for c in classes.values()]
    card = _card(
        split,
        [(r["vendor"], r["concept"]) for r in records],
        names,
        protocol="nearest class text by cosine, mean over artists",
        preprocessing=prepare.resizing,
        templates="name and three tags in turn, each tag" if role else "name",
    )
    texts = [_prompts(c) if role else [c["name"]] for c in classes.values()]
    return ZeroShotSet(name, _images(records), labels, texts, groups, names, card, together=labels)


def _images(records: Sequence[Record]) -> list[np.ndarray]:
    return [r["image"] for r in records]


def _card(split: str, *items: list[Any], **fields: str) -> Provenance:
    role = ""
    if split.startswith("validation"):
        role = VALIDATION
    elif split == "test_line":
        role = SHIFTED
    items_hash = digest(x for part in items for x in part)
    return Provenance("emoji_pairs", str(emoji.EmojiPairs.VERSION), split, items_hash, role=role, **fields)


def _retrieve(name: str, prepare: Preprocessing, data_dir: str | None, *, split: str) -> RetrievalSet:
    records = _emoji(split, prepare, data_dir)
    captions = [[r["name"], *r["aliases"]] for r in records]
    card = _card(
        split, captions, protocol="recall, any match", preprocessing=prepare.resizing, metric="image_to_text/r1"
    )
    return RetrievalSet(name, _images(records), captions, card)


_ROLES = ("train", "validation_concepts", "test_concepts")  # of concepts; their pictures are in splits of these names


def _probe(name: str, prepare: Preprocessing, data_dir: str | None) -> ProbeSet:
    """Return a probe of categories on images; to save time it trains on one image per concept, by artists in turn."""
    # The newest flags have no category.
    parts = [[r for r in _emoji(split, prepare, data_dir) if r["category"]] for split in _ROLES]
    drawings: dict[str, list[int]] = {}
    for i, r in enumerate(parts[0]):
        drawings.setdefault(r["concept"], []).append(i)
    chosen = [drawn[turn % len(drawn)] for turn, (_, drawn) in enumerate(sorted(drawings.items()))]
    parts[0] = [parts[0][i] for i in sorted(chosen)]
    card = _card(
        "+".join(_ROLES),
        [(r["vendor"], r["concept"], r["subcategory"]) for part in parts for r in part],
        protocol="linear probe (L-BFGS, C of 7 on validation) and 20 neighbours (T 0.07) on features before projection",
        preprocessing=prepare.resizing,
        metric="category/linear/top1",
    )
    number = {category: i for i, category in enumerate(sorted({r["category"] for r in parts[0]}))}
    labels = tuple(np.array([number[r["category"]] for r in part], int) for part in parts)
    together = np.unique([r["concept"] for r in parts[2]], return_inverse=True)[1]
    train, validation, test = map(_images, parts)
    return ProbeSet(name, train, validation, test, {"category": labels}, sweep=_SWEEP, card=card, together=together)


def _aliases(name: str, prepare: Preprocessing, data_dir: str | None) -> TextRetrievalSet:
    del prepare
    concepts = [c for c in emoji.concepts(emoji.prepare(data_dir)) if c["role"] == "test_concepts"]
    names = [c["name"] for c in concepts]
    queries = [
        (alias, i) for i, c in enumerate(concepts) for alias in c["aliases"] if alias.casefold() != c["name"].casefold()
    ]
    card = _card("test_concepts", names, queries, protocol="recall of names by cosine of text embeddings", metric="r1")
    return TextRetrievalSet(name, names, queries, {}, card, together=np.array([i for _, i in queries]))


def _prompts(concept: Record) -> list[str]:
    """Return captions like the training captions: the name with keywords, and each keyword."""
    name = concept["name"]
    tags = concept["tags"]
    rotations = [tags[i:] + tags[:i] for i in range(len(tags))]
    return [", ".join([name, *rotation[:3]]) for rotation in rotations or [[]]] + tags


_MAKERS: Mapping[str, Maker] = {
    "emoji/validation_concepts": functools.partial(_classify, split="validation_concepts", role="validation_concepts"),
    "emoji/test_concepts": functools.partial(_classify, split="test_concepts", role="test_concepts"),
    "emoji/validation_rendering": functools.partial(_classify, split="validation_rendering"),
    "emoji/test_rendering": functools.partial(_classify, split="test_rendering"),
    "emoji/test_line": functools.partial(_classify, split="test_line"),
    "emoji/test_line_concepts": functools.partial(_classify, split="test_line", role="test_concepts"),
    "emoji/validation_retrieval": functools.partial(_retrieve, split="validation_rendering"),
    "emoji/test_retrieval": functools.partial(_retrieve, split="test_rendering"),
    "emoji/test_probe": _probe,
    "emoji/test_aliases": _aliases,
}

_CREDIT = (
    "Emoji: Twemoji (CC-BY 4.0, Twitter and contributors), OpenMoji (CC BY-SA 4.0, openmoji.org), Noto Emoji "
    "(Apache-2.0, Google). The pictures in this page are under these licences."
)
_QUERIES = (
    "cat", "red heart", "fruit", "angry face", "blue", "clock", "woman with long hair", "vehicle on rails",
)  # fmt: skip
TESTS = tuple(name for name in _MAKERS if name.startswith("emoji/test_"))
_PANELS = {
    "emoji/test_concepts": (
        "Things it has never seen",
        "No picture of these was ever shown in training. The model chooses among {num_classes} new names, each with up "
        "to three keywords.",
    ),
    "emoji/test_rendering": (
        "Known things, drawn by another artist",
        "Training showed other artists' pictures of these, never this one. The model chooses among {num_classes} "
        "names.",
    ),
    "emoji/test_line": (
        "Line drawings",
        "Training showed colour pictures only. The model chooses among {num_classes} names.",
    ),
}


class EmojiSets(SetKind):
    """`emoji/NAME`."""

    prefixes = ("emoji",)
    suites: ClassVar = {"demo": TESTS}
    display = Display(_PANELS, _QUERIES, _CREDIT)

    @classmethod
    def knows(cls, spec: str) -> bool:
        return spec in _MAKERS

    @classmethod
    def extras(cls, spec: str) -> tuple[str, ...]:
        return ("demo",)

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> EmojiSet:
        """Open the set `spec`; the profile only applies to published sets."""
        return _MAKERS[spec](spec, prepare, data.dir or None)

    @classmethod
    def shows(cls, spec: str) -> str:
        maker = getattr(_MAKERS[spec], "func", None)
        return {_classify: "classes", _retrieve: "captions"}.get(maker, "")
