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

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from studies.photographs import corpus
from studies.photographs.corpus import KIND_COLUMN, TITLE, Row, hash_rank
from studies.photographs.evaluators import GeometrySet, RankedSet
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


def _card(part: str, prepare: Preprocessing, *items: Sequence[Any], **fields: str) -> Provenance:
    role = VALIDATION if part == "validation" else ""
    split_hash = digest(x for side in items for x in side)
    return Provenance("photographs", "1", part, split_hash, preprocessing=prepare.resizing, role=role, **fields)


def _take(root: str, split: str, chosen: Sequence[int], prepare: Preprocessing) -> tuple[list[Row], Sequence[Any]]:
    """Return chosen rows of a split, and their images."""
    rows = corpus.rows(root, split)
    column = corpus.table(root, split)["image"].combine_chunks().field("bytes")
    return [rows[i] for i in chosen], pictures([column[i].as_py() for i in chosen], prepare)


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
    first = functools.partial(hash_rank, "prompt")
    return {name: sorted(titles, key=first)[:TITLES] for name, titles in of_class.items()}


def _naming(name: str, prepare: Preprocessing, root: str, part: str, kinds: str, prompts: str) -> RankedSet:
    """Kinds or colours as classes, and their names, templates or titles as prompts."""
    column = "baseColour" if kinds == "colours" else KIND_COLUMN
    split = f"{part}_unseen" if kinds == "unseen" else part
    rows = corpus.rows(root, split)
    classes = sorted({row[column] for row in rows}) if kinds == "unseen" else known(root, part, column)
    taken: set[str] = set()
    if prompts == "titles":
        texts = _titles(rows if kinds == "unseen" else corpus.rows(root, _TRAINED[part]), classes)
        if kinds == "unseen":
            taken = {title for titles in texts.values() for title in titles}
    else:
        templates = TEMPLATES if prompts == "templates" else TEMPLATES[:1]
        texts = {name: [template.format(c=name.lower()) for template in templates] for name in classes}
    chosen = [i for i, row in enumerate(rows) if row[column] in texts and row[TITLE] not in taken]
    rows, images = _take(root, split, chosen, prepare)
    labels = np.array([classes.index(row[column]) for row in rows])
    together = np.unique([row[TITLE] for row in rows], return_inverse=True)[1]
    protocol = "nearest class text by cosine; intervals by resampling titles"
    ids = [row["id"] for row in rows]
    card = _card(part, prepare, ids, list(texts.items()), protocol=protocol, templates=prompts)
    return RankedSet(name, images, labels, list(texts.values()), {}, classes, card, together=together)


def _retrieval(name: str, prepare: Preprocessing, root: str, part: str, captions: str) -> RetrievalSet:
    texts = corpus.captions(root, part, captions)
    rows, images = _take(root, part, range(len(texts)), prepare)
    ids = [row["id"] for row in rows]
    card = _card(part, prepare, ids, texts, protocol="recall, any match", metric="image_to_text/r1")
    return RetrievalSet(name, images, [[text] for text in texts], card)


def _probe(name: str, prepare: Preprocessing, root: str, part: str) -> ProbeSet:
    classes = set(known(root, part))
    trained = _TRAINED[part]

    def usable(split: str) -> list[int]:
        rows = corpus.rows(root, split)
        return [i for i, row in enumerate(rows) if row[KIND_COLUMN] in classes and row["season"]]

    ids = [str(row["id"]) for row in corpus.rows(root, trained)]
    order = sorted(usable(trained), key=lambda i: hash_rank("probe", ids[i]))
    choose = ("validation", usable("validation")) if part == "test" else (trained, order[PROBED:][:PROBE_VALIDATION])
    sides = ((trained, order[:PROBED]), choose, (part, usable(part)))
    rows, images = zip(*(_take(root, split, chosen, prepare) for split, chosen in sides), strict=True)
    tasks = {}
    for task, column in (("kind", KIND_COLUMN), ("season", "season"), ("audience", "gender")):
        names = sorted({row[column] for row in rows[0]})
        tasks[task] = tuple(np.array([names.index(row[column]) for row in side]) for side in rows)
    protocol = "features before projection; L-BFGS, C on other photographs; 20 neighbours"
    of_sides = [[row["id"] for row in side] for side in rows]
    card = _card(part, prepare, *of_sides, protocol=protocol, metric="kind/linear/top1")
    return ProbeSet(name, *images, tasks, sweep=Sweep(halvings=2, tolerance=1e-4), card=card)


def _geometry(name: str, prepare: Preprocessing, root: str, part: str) -> GeometrySet:
    probe = _probe(name, prepare, root, part)
    card = dataclasses.replace(probe.card, protocol="see `evaluators.Geometry`", metric="rank")
    fields: dict[str, Any] = vars(probe) | {"card": card}
    return GeometrySet(**fields)


_MAKERS: Mapping[str, Callable[..., Any]] = {
    **{
        f"{kinds}{suffix}": functools.partial(_naming, kinds=kinds, prompts=suffix.removeprefix("_") or "names")
        for kinds in ("unseen", "known")
        for suffix in ("", "_templates", "_titles")
    },
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
