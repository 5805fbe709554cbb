"""Zero-shot sets: those of the table in `published_sets`, from TFDS, a folder or a CSV file, and own labelled images.

`NAME` reads the TFDS data set in the table; `NAME@PATH` reads the same set from a folder with one sub-folder a class,
or from a CSV file with the columns path and label. A set that is not in the table is named by the spec of its source
(`data.sources`) of labelled images: `folder:PATH`, `csv:PATH`, `tfds:NAME/SPLIT`, and with `zeroshot/` before it one of
another package, `zeroshot/package.module:Class:REST`. `zeroshot/holdout[@RUN]` has the held-out images of a run whose
sources have labels beside captions, see `pair_sets`. Probes of the same sets are in `probe_datasets`.

Where clip-benchmark has names for a set's classes, folders and labels of CSV files are matched with them: by a
published name, a label of the TFDS data set (a WordNet id of ImageNet), or the class's number from 0. Others are
refused, as their order would be a guess. All published classes are answers, those without an image too.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.core import imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import Chosen, Field, read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds_source import open_tfds
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.base import HELD_OUT, Joined, Pictures, SetKind
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import SHIFTED, VALIDATION, Provenance, contents, digest
from xclip_jax.evaluators.sets.pair_sets import held_out_data, names_held_out
from xclip_jax.evaluators.sets.published_sets import ENTRIES, PAPER, Entry
from xclip_jax.evaluators.zeroshot import ZeroShotSet

PREFIX = "zeroshot/"


def check(spec: str) -> bool:
    """Whether `spec` is the name of a set in this table or the spec of a source; files are not read."""
    name, separator, path = spec.partition("@")
    return (name in ENTRIES and bool(path or not separator)) or sources.has_labels(spec, "image")


def entry_of(spec: str) -> tuple[str, Entry, str]:
    """Return name, entry and path of a set in the table; the path is "" where TFDS is read.

    Raises:
      UserError: neither a path nor a TFDS data set.
    """
    name, _, path = spec.partition("@")
    entry = ENTRIES[name]
    if not path and not entry.tfds:
        raise UserError(f"{name} is not in TFDS; write {name}@PATH, a folder of one sub-folder a class or a CSV file.")
    return name, entry, path


@dataclasses.dataclass(frozen=True)
class Content:
    """Labelled images of a set, or of one of its splits.

    Attributes:
      images: encoded, or uint8 (h, w, 3).
      labels: int (n,), or bool (n, classes) where an image may have several.
      classes: their names.
      data, version, split: those of `Provenance`.
      identity: JSON that identifies images that are not files, for the split's hash.
      templates: those of the data set, which are used whatever the profile; may be empty.
    """

    images: Sequence[Any]
    labels: np.ndarray
    classes: list[str]
    data: str
    version: str = ""
    split: str = ""
    identity: Any = ""
    templates: Sequence[str] = ()


def read_source(spec: str, data_dir: str | None, image_key: str = SourceOptions.image_key) -> Content:
    """Open the labelled images of a source.

    Args:
      spec: of the source.
      data_dir: root of TFDS data sets, None for the default.
      image_key: column of the images where the source lets one choose and `spec` names none.

    Raises:
      UserError: a source that cannot be opened, or items that are not images in classes.
    """
    source = sources.open_labelled(spec, SourceOptions(data_dir or "", image_key))
    if source.key != "image" or not source.names:
        raise UserError(f"{spec}: expected images in classes, got {source.key}s; use another source.")
    data = sources.parse(spec).rest
    names, templates = list(source.names), source.templates
    return Content(source.items, source.labels(), names, data, source.version, "", source.identity, templates)


def read_held_out(spec: str, data: DataConfig) -> Content:
    """Open the labelled images of a run's sources that `data.holdout` keeps out of training.

    Raises:
      UserError: a source without labels, of other classes than the first, or without held-out images.
    """
    parts, identities = [], []
    for source_spec in data.sources:
        part = read_source(source_spec, data.dir, data.image_key)
        if np.ndim(part.labels) != 1:
            raise UserError(f"{spec}: images of {source_spec} have several labels; give each one class.")
        positions = holdout.selected(part.images, data.holdout)
        identities += [holdout.image_hash(part.images[i]) for i in positions]
        labels = np.array([part.classes[label] for label in part.labels[positions]], object)
        parts.append(dataclasses.replace(part, images=Chosen(part.images, positions), labels=labels))
    classes = sorted({name for part in parts for name in part.classes})
    number = {name: i for i, name in enumerate(classes)}
    names = np.concatenate([part.labels for part in parts])
    if not len(names):
        raise UserError(f"{spec}: none of the labelled images of {', '.join(data.sources)} is held out.")
    return Content(
        Joined([part.images for part in parts]),
        np.array([number[name] for name in names], int),
        classes,
        ", ".join(data.sources),
        split=f"held out, {data.holdout:g}",
        identity=identities,
    )


def _read_entry(name: str, entry: Entry, path: str, data_dir: str | None) -> Content:
    if path:
        images, labels, classes = read_files(name, pathlib.Path(path))
        if entry.names:
            labels, classes = _published(name, entry, labels, classes)
        return Content(images, labels, classes, path)
    images, labels, classes, version = read_tfds(name, entry, data_dir)
    classes = prompts.class_names(entry.names, classes) if entry.names else classes
    if entry.classes:
        labels, classes = _masked(name, entry, labels, classes)
    if np.ndim(labels) == 1 and np.size(labels) and np.max(labels) >= len(classes):
        raise UserError(f"{name}: label {np.max(labels)} is not among {len(classes)} classes.")
    data, known = entry.tfds.partition(":")[0], identity(entry, version, entry.split)
    return Content(images, labels, classes, data, version, entry.split, known)


def load(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ZeroShotSet:
    """Return the set `spec`, see the module's docstring; images are uint8, preprocessed and decoded on access.

    Raises:
      UserError: a set that is not prepared, a path or label that is wrong.
    """
    spec = spec.removeprefix(PREFIX)
    if sources.has_labels(spec, "image"):
        return own_set(spec, read_source(spec, data_dir), prepare, profile)
    name, entry, path = entry_of(spec)
    content = _read_entry(name, entry, path, data_dir)
    classes = content.classes
    if not entry.names:
        classes = [prompts.readable(label) if entry.readable else prompts.spaced(label) for label in classes]
    words: list[Any] = classes
    synonyms = ""
    if name == "fer2013" and profile.clips:
        words, synonyms = [prompts.SYNONYMS.get(label, label) for label in classes], ", synonyms"
    used = prompts.chosen(entry.templates, profile)
    description = f"{used} ({len(prompts.templates(used))}{synonyms})"
    content = dataclasses.replace(content, classes=classes)
    return _make(spec, content, entry, prompts.prompts(words, used), description, profile.preprocessing(prepare))


def own_set(name: str, content: Content, prepare: Preprocessing | int, profile: Profile) -> ZeroShotSet:
    """Return the set `name` of labelled images, with the templates and class names of the profile.

    A data set that has templates keeps them, and its names. Class names of other sets are ignored.

    Raises:
      UserError: the profile has class names, and none of them is of a class of the images.
    """
    if content.templates:
        profile = dataclasses.replace(profile, templates=(), names={})
    if foreign := sorted(set(profile.names) - set(content.classes)):
        classes = f"its {len(content.classes)} classes, such as {content.classes[0]!r}"
        if len(foreign) == len(profile.names):
            raise UserError(
                f"{name}: none of the class names, such as {foreign[0]!r}, is among {classes}; correct the file of "
                "names, or add some of these classes."
            )
        log0(
            f"{name}: {len(foreign)} of {len(profile.names)} class names, such as {foreign[0]!r}, are not of {classes}"
        )
    # A data set with templates has names that go into them as they are.
    own = [label if content.templates else prompts.spaced(label) for label in content.classes]
    words = [profile.names.get(label, word) for label, word in zip(content.classes, own, strict=True)]
    templates = profile.templates or content.templates or "dummy"
    description = "dummy (1)" if templates == "dummy" else f"the data set's ({len(templates)})"
    if profile.templates:
        description = " | ".join(profile.templates)
    entry = Entry(metric="map" if np.ndim(content.labels) == 2 else "top1")
    texts = prompts.prompts(words, templates)
    return _make(name, content, entry, texts, description, profile.preprocessing(prepare))


def _make(
    spec: str, content: Content, entry: Entry, texts: list[list[str]], templates: str, prepare: Preprocessing
) -> ZeroShotSet:
    card = Provenance(
        data=content.data,
        version=content.version,
        split=content.split,
        split_hash=digest(
            [content.identity, *np.asarray(content.labels).tolist(), *content.classes, *contents(content.images)]
        ),
        protocol="mean of normalised prompts, normalised again; cosine; equal scores go to the lowest class",
        templates=templates,
        preprocessing=prepare.resizing,
        metric=entry.metric,
        note=entry.note,
        role=SHIFTED if entry.shifted else VALIDATION if entry.validation else "",
    )
    pictures = Pictures(content.images, prepare, entry.border)
    return ZeroShotSet(spec, pictures, content.labels, texts, names=content.classes, card=card)


Read = tuple[Sequence[Any], np.ndarray, list[str], str]


def read_tfds(name: str, entry: Entry, data_dir: str | None) -> Read:
    """Return images, labels, classes and version of an entry's split in TFDS."""
    source, info = open_tfds(entry.tfds, entry.split, data_dir)
    # Images are skipped here, not decoded.
    values = [source[i][entry.label] for i in range(len(source))]
    feature = info.features[entry.label]
    version = str(info.version)
    if entry.derive:
        derived = np.array([entry.derive(value) for value in values])
        if derived.min() < 0 or derived.max() >= entry.ways:
            raise UserError(f"{name}: a record of {entry.tfds} gives label {derived.min()} to {derived.max()}.")
        return Field(source, "image"), derived, [str(i) for i in range(entry.ways)], version
    labels = list(getattr(feature, "feature", feature).names)
    if np.ndim(values[0]):
        several = np.zeros((len(values), len(labels)), bool)
        for row, value in zip(several, values, strict=True):
            row[np.asarray(value, int)] = True
        return Field(source, "image"), several, labels, version
    return Field(source, "image"), np.array(values, int), labels, version


def _published(name: str, entry: Entry, labels: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return labels and names among the published classes of a set whose own classes are called `classes`.

    Raises:
      UserError: a class that is not a published one by name or number.
    """
    whole = prompts.published(entry.names)
    kept = entry.classes or range(len(whole))
    published = [whole[i] for i in kept]
    spellings = {"as published": published, "as the archive has them": entry.spelled}
    if entry.tfds and not entry.derive:
        own = _tfds_labels(entry.tfds, entry.label)
        spellings["as TFDS has them"] = [own[i] for i in kept] if own else []
    if entry.in_order and len(classes) == len(published) and all(re.fullmatch(entry.in_order, x) for x in classes):
        spellings["in their order"] = sorted(classes)
    if entry.classes:
        spellings["by number among the 1000"] = [str(i) for i in kept]
    # Without 0 among them, numbers may well begin at 1.
    numbers = [str(i) for i in range(len(published))]
    first = any(label.isascii() and label.isdigit() and int(label) == 0 for label in classes)
    spellings["by number"] = numbers if first else []
    try:
        position = np.array(prompts.match(classes, *spellings.values()))
    except KeyError as error:
        ways = [
            f"{how} ({spelling[0]!r}, ...)"
            for how, spelling in (spellings | {"by number": numbers}).items()
            if spelling
        ]
        raise UserError(
            f"{name}: {error.args[0]!r} is not a class of {name}, or is there twice. Name the classes "
            f"{' or '.join(ways)}, or evaluate folder:PATH or csv:PATH, where their own names are used."
        ) from error
    if np.ndim(labels) == 1:
        return position[labels], published
    several = np.zeros((len(labels), len(published)), bool)
    several[:, position] = labels
    return several, published


@functools.cache
def _tfds_labels(name: str, feature: str) -> list[str]:
    """Return the labels of a TFDS data set, which need not be prepared; none where this version of TFDS lacks it."""
    try:
        return list(tfds.builder(name).info.features[feature].names)
    except Exception:  # files can be read without TFDS
        return []


def identity(entry: Entry, version: str, *splits: str) -> list[str]:
    """Return what identifies a TFDS data set and splits of it; labels give their number of items."""
    return [entry.tfds.partition(":")[0], version, *splits]


def _masked(name: str, entry: Entry, labels: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return labels and names among the set's own classes; labels of the 1000 are renumbered."""
    position = np.full(len(names), -1)
    position[list(entry.classes)] = np.arange(len(entry.classes))
    foreign = np.unique(labels[position[labels] < 0])
    if len(foreign):
        raise UserError(f"{name}: class {foreign[0]} occurs and is not among its {len(entry.classes)} classes.")
    return position[labels], [names[i] for i in entry.classes]


_OWN = [name for name, kind in sources.SOURCES.items() if kind.labelled_specs and kind.labelled_items == "image"]


class PublishedSets(SetKind):
    """`NAME` and `NAME@PATH` of the table, and `SOURCE` or `zeroshot/SOURCE`."""

    prefixes = (*ENTRIES, *_OWN, PREFIX.rstrip("/"))
    names = (*PAPER, PREFIX + HELD_OUT)
    at_path = tuple(ENTRIES)
    suites: ClassVar = {"paper": (*PAPER, "coco_retrieval")}
    usage = "own data: " + "; ".join(
        [
            *(f"{spec}, {meaning}" for name in _OWN for spec, meaning in sources.SOURCES[name].labelled_specs.items()),
            f"{PREFIX}{sources.OF_ANOTHER_PACKAGE}",
            f"{PREFIX}{HELD_OUT}[@RUN], the held-out pairs of a run whose sources have labels",
        ]
    )
    load = staticmethod(load)

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the set or source exists; files are not read."""
        return names_held_out(spec, PREFIX) or check(spec.removeprefix(PREFIX))

    @classmethod
    def open(cls, spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile) -> ZeroShotSet:
        """Return the set as `load` does, or held-out images of the model's run or of another one."""
        if not names_held_out(spec, PREFIX):
            return load(spec, prepare, data.dir or None, profile)
        with imports.named_by("the config of the run that holds them out"):
            content = read_held_out(spec, data)
        return own_set(spec.removeprefix(PREFIX), content, prepare, profile)

    @classmethod
    def data_of(cls, spec: str, data: DataConfig) -> DataConfig:
        """Return `data`, or those of the run that holds the images out."""
        return held_out_data(spec, data) if names_held_out(spec, PREFIX) else data

    @classmethod
    def shows(cls, spec: str) -> str:
        """All of them have images and classes."""
        return "classes"
