"""Evaluation sets of the photographs, `studies.photographs.sets:PhotographSets/PART_NAME` in a config.

PART is test, read once at the end of a run, or validation, for all choices. NAME is one of

    unseen              zero-shot among 20 kinds outside the training data; the only prompt is the kind's name
    unseen_templates    the same with three prompts of each kind, "{c}", "men {c}" and "women {c}"
    unseen_titles       the same with the titles of ten products of each kind as prompts, without these products
    known, known_templates, known_titles     kinds with 40 or more photographs in training; products are new
    colours             zero-shot among the names of colours
    retrieval           photographs and their titles
    retrieval_tight     photographs and captions of audience, colour and kind
    probe               linear probes and nearest neighbours of kind, season and audience
    geometry            effective rank of the features, and how clusters agree with kinds

Models whose results are for choices train on the split "choice"; `corpus` has the splits. Products of one title are
dependent and are resampled together.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from studies.clustered import ClusteredZeroShotSet
from studies.photographs import corpus
from studies.photographs.corpus import KIND_COLUMN, TITLE, Row, hash_rank
from studies.photographs.geometry import GeometrySet
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import SetKind, pictures
from xclip_jax.evaluators.feature_classifiers import Sweep
from xclip_jax.evaluators.probe import ProbeSet
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import VALIDATION, Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet

KIND = "studies.photographs.sets:PhotographSets"
TEMPLATES = ("{c}", "men {c}", "women {c}")
FEWEST, FEWEST_OF_COLOUR = 40, 100  # photographs that training has of a class
NO_COLOURS = ("", "NA", "Multi")
TITLES = 10  # products of a class whose titles are its prompts
PROBED, PROBE_VALIDATION = 8000, 2000
_TRAINED = {"test": "train", "validation": "choice"}


def _card(part: str, *items: Sequence[Any], **fields: str) -> Provenance:
    role = VALIDATION if part == "validation" else ""
    return Provenance("photographs", "1", part, digest(x for side in items for x in side), role=role, **fields)


def known(root: str, part: str, column: str = KIND_COLUMN) -> list[str]:
    """Return the kinds, or colours, that training has enough photographs of, in alphabetical order."""
    counts = Counter(row[column] for row in corpus.rows(root, _TRAINED[part]))
    least = FEWEST if column == KIND_COLUMN else FEWEST_OF_COLOUR
    return sorted(name for name, n in counts.items() if n >= least and name not in NO_COLOURS)


def _titles(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, list[str]]:
    """Return `TITLES` different titles of each class, the first by hash."""
    of_class: dict[str, set[str]] = {name: set() for name in classes}
    for row in rows:
        if row[KIND_COLUMN] in of_class:
            of_class[row[KIND_COLUMN]].add(row[TITLE])
    return {
        name: sorted(titles, key=lambda title: hash_rank("prompt", title))[:TITLES] for name, titles in of_class.items()
    }


def _naming(name: str, prepare: Preprocessing, root: str, part: str, kinds: str, prompts: str) -> ClusteredZeroShotSet:
    """Kinds or colours as classes, and their names, templates or titles as prompts."""
    column = "baseColour" if kinds == "colours" else KIND_COLUMN
    split = f"{part}_unseen" if kinds == "unseen" else part
    rows = corpus.rows(root, split)
    classes = sorted({row[column] for row in rows}) if kinds == "unseen" else known(root, part, column)
    texts = {c: [t.format(c=c.lower()) for t in (TEMPLATES if prompts == "templates" else ("{c}",))] for c in classes}
    taken: set[str] = set()
    if prompts == "titles":
        texts = _titles(rows if kinds == "unseen" else corpus.rows(root, _TRAINED[part]), classes)
        taken = {title for of_class in texts.values() for title in of_class} if kinds == "unseen" else set()
    chosen = [i for i, row in enumerate(rows) if row[column] in texts and row[TITLE] not in taken]
    labels = np.array([classes.index(rows[i][column]) for i in chosen])
    titles = [rows[i][TITLE] for i in chosen]
    card = _card(
        part, [rows[i]["id"] for i in chosen], list(texts.items()),
        protocol="nearest class text by cosine; intervals by resampling titles", preprocessing=prepare.resizing,
        templates=prompts,
    )  # fmt: skip
    images = pictures(_images(root, split, chosen), prepare)
    together = np.unique(titles, return_inverse=True)[1]
    return ClusteredZeroShotSet(name, images, labels, list(texts.values()), {}, classes, card, together=together)


def _images(root: str, split: str, chosen: Sequence[int]) -> list[bytes]:
    column = corpus.table(root, split)["image"].combine_chunks().field("bytes")
    return [column[i].as_py() for i in chosen]


def _retrieval(name: str, prepare: Preprocessing, root: str, part: str, captions: str) -> RetrievalSet:
    rows = corpus.rows(root, part)
    texts = corpus.captions(root, part, captions)
    card = _card(
        part, [row["id"] for row in rows], texts, protocol="recall, any match", preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )  # fmt: skip
    images = pictures(_images(root, part, range(len(rows))), prepare)
    return RetrievalSet(name, images, [[text] for text in texts], card)


def _sides(root: str, part: str) -> list[tuple[str, list[int]]]:
    """Return (split, rows) of a probe to fit it, to choose C, and to test it."""
    classes = set(known(root, part))
    trained = _TRAINED[part]

    def usable(split: str) -> list[int]:
        rows = corpus.rows(root, split)
        return [i for i, row in enumerate(rows) if row[KIND_COLUMN] in classes and row["season"]]

    rows = corpus.rows(root, trained)
    order = sorted(usable(trained), key=lambda i: hash_rank("probe", str(rows[i]["id"])))
    choose = ("validation", usable("validation")) if part == "test" else (trained, order[PROBED:][:PROBE_VALIDATION])
    return [(trained, order[:PROBED]), choose, (part, usable(part))]


def _probe(name: str, prepare: Preprocessing, root: str, part: str) -> ProbeSet:
    sides = _sides(root, part)
    rows = [[corpus.rows(root, split)[i] for i in chosen] for split, chosen in sides]
    tasks = {}
    for task, column in (("kind", KIND_COLUMN), ("season", "season"), ("audience", "gender")):
        classes = sorted({row[column] for row in rows[0]})
        tasks[task] = tuple(np.array([classes.index(row[column]) for row in side]) for side in rows)
    card = _card(
        part, [row["id"] for side in rows for row in side],
        protocol="features before projection; L-BFGS, C on other photographs; 20 neighbours",
        preprocessing=prepare.resizing, metric="kind/linear/top1",
    )  # fmt: skip
    train, validation, test = (pictures(_images(root, split, chosen), prepare) for split, chosen in sides)
    return ProbeSet(name, train, validation, test, tasks, sweep=Sweep(halvings=2, tolerance=1e-4), card=card)


def _geometry(name: str, prepare: Preprocessing, root: str, part: str) -> GeometrySet:
    fitted, _, tested = _sides(root, part)
    classes = known(root, part)
    labels = [
        np.array([classes.index(corpus.rows(root, split)[i][KIND_COLUMN]) for i in chosen])
        for split, chosen in (fitted, tested)
    ]
    card = _card(
        part, *(side.tolist() for side in labels), protocol="see studies.photographs.geometry",
        preprocessing=prepare.resizing, metric="rank",
    )  # fmt: skip
    images = [pictures(_images(root, split, chosen), prepare) for split, chosen in (fitted, tested)]
    return GeometrySet(name, images[0], images[1], labels[0], labels[1], card)


_NAMING = {
    f"{kinds}{suffix}": functools.partial(_naming, kinds=kinds, prompts=suffix.removeprefix("_") or "names")
    for kinds in ("unseen", "known")
    for suffix in ("", "_templates", "_titles")
}
_MAKERS: Mapping[str, Callable[..., Any]] = {
    **_NAMING,
    "colours": functools.partial(_naming, kinds="colours", prompts="names"),
    "retrieval": functools.partial(_retrieval, captions="loose"),
    "retrieval_tight": functools.partial(_retrieval, captions="tight"),
    "probe": _probe,
    "geometry": _geometry,
}


class PhotographSets(SetKind):
    """The sets of this module by their names."""

    names = tuple(f"{KIND}/{part}_{name}" for part in ("validation", "test") for name in _MAKERS)

    @classmethod
    def knows(cls, spec: str) -> bool:
        return spec in cls.names

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> Any:
        """Open the set `spec`; the profile, which changes published sets only, is ignored."""
        part, _, name = spec.removeprefix(f"{KIND}/").partition("_")
        return _MAKERS[name](spec, prepare, corpus.folder(data.dir or None), part)
