"""Published zero-shot sets, as a table of data, and how they are read: from TFDS, from a folder, or from a CSV file.

`NAME` reads the TFDS data set in the table; `NAME@PATH` reads the same set from a folder with one sub-folder a class,
or from a CSV file with the columns path and label; so do `folder:PATH` and `csv:PATH` for a set not in the table.
Probes of the same sets are in `probe_datasets`.

Where clip-benchmark has names for a set's classes, folders and labels of CSV files get them by what they are called: a
published name, a label of the TFDS data set (a WordNet id of ImageNet), or the class's number from 0. Others are
refused, as their order would be a guess. All published classes are answers, those without an image too.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.data.labelled import Field, read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.sources import open_tfds
from xclip_jax.errors import UserError
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.pictures import Pictures
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.provenance import SHIFTED, Provenance, contents, digest
from xclip_jax.evaluators.zeroshot import ZeroShotSet

_APPROXIMATE = "the published split is not public or not one: compare only numbers with the same split_hash"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A set of the table.

    Attributes:
      tfds: name, configuration and version, "" where TFDS lacks it.
      split: of the TFDS data set.
      templates: key of `prompts.templates`; "imagenet" is what the profile says.
      names: clip-benchmark's key of the class names; "" for the data set's own labels.
      readable: whether own labels need `prompts.readable`.
      spelled: what the published archive calls the classes, in the order of `names`.
      in_order: pattern of class folders that are in the order of `names` when they are sorted.
      metric: the one that is published.
      label: feature with the label; of several parts, "/" between them.
      classes: of the 1000 of ImageNet, the only ones to choose from, where the labels are still of the 1000.
      derive: makes the label of the feature's value.
      ways: number of classes where the feature does not say it.
      border: pixels cut off on each side.
      train, held: splits that probes learn from and choose C on; no `train`, no probe; no `held`, a tenth of `train`.
      note: see `Provenance`.
      shifted: whether it is of another source or style than what its classes are known from, as `SHIFTED` says.
    """

    tfds: str = ""
    split: str = "test"
    templates: str = ""
    names: str = ""
    readable: bool = False
    spelled: tuple[str, ...] = ()
    in_order: str = ""
    metric: str = "top1"
    label: str = "label"
    classes: tuple[int, ...] = ()
    derive: Callable[[Any], int] | None = None
    ways: int = 0
    border: int = 0
    train: str = "train"
    held: str = ""
    note: str = ""
    shifted: bool = False


def _column(objects: Any, key: str) -> Sequence[Any]:
    """A part of nested features, which TFDS gives as a dict of columns or as a list of dicts."""
    return [each[key] for each in objects] if isinstance(objects, list) else objects[key]


def _count(objects: Any) -> int:
    """CLEVR: three to ten objects -> 0 to 7."""
    return len(_column(objects, "color")) - 3


def _distance(objects: Any) -> int:
    """KITTI, VTAB's task: the nearest vehicle (car, van, truck) within 8 m, 20 m, any distance, or none -> 0 to 3."""
    kinds, at = np.asarray(_column(objects, "type")), np.asarray(_column(objects, "location")).reshape(-1, 3)
    near = at[np.isin(kinds, (0, 1, 2)), 2]
    return 3 if not len(near) else int(np.searchsorted((8.0, 20.0), near.min()))


def _imagenet(tfds_name: str, split: str = "test", **fields: Any) -> Entry:
    return Entry(tfds_name, split, "imagenet", "imagenet1k", **fields)


ENTRIES: Mapping[str, Entry] = {
    "imagenet": _imagenet("imagenet2012:5.1.0", "validation"),
    "imagenet_v2": _imagenet("imagenet_v2/matched-frequency", train="", shifted=True),
    "imagenet_a": _imagenet("imagenet_a", classes=prompts.IMAGENET_A, train="", shifted=True),
    "imagenet_r": _imagenet("imagenet_r", classes=prompts.IMAGENET_R, train="", shifted=True),
    "imagenet_sketch": _imagenet("imagenet_sketch", train="", shifted=True),
    "food101": Entry("food101", "validation", "food101"),  # its test split is called so
    "cifar10": Entry("cifar10:3.0.2", templates="cifar10"),
    "cifar100": Entry("cifar100:3.0.2", templates="cifar100"),
    "cub200": Entry("caltech_birds2011:0.2.0", templates="birds", readable=True),
    "sun397": Entry(
        "sun397/standard-part1-120k",
        templates="sun397",
        readable=True,
        note="the official partition; clip_benchmark evaluates all 108,754 images",
    ),
    "cars": Entry("cars196:2.1.0", templates="cars", note="labels of versions before 2.1.0 are wrong"),
    "voc2007": Entry("voc/2007", templates="voc2007_multilabel", metric="map11", label="labels"),
    "dtd": Entry("dtd:3.0.1", templates="dtd", held="validation"),
    "pets": Entry("oxford_iiit_pet", templates="pets", names="pets", metric="mean_per_class"),
    "caltech101": Entry("caltech101:3.0.2", templates="caltech101", names="caltech101_vtab", metric="mean_per_class"),
    "flowers": Entry(
        "oxford_flowers102", templates="flowers", names="flowers", metric="mean_per_class", held="validation"
    ),
    "mnist": Entry("mnist", templates="mnist", names="mnist"),
    "stl10": Entry("stl10", templates="stl10"),
    "svhn": Entry("svhn_cropped", templates="svhn", names="svhn"),
    "eurosat": Entry("eurosat/rgb", "train", "eurosat", "eurosat", train="", note=_APPROXIMATE),
    "resisc45": Entry("resisc45:3.0.0", "train", "resisc45", train="", note=_APPROXIMATE),
    "kitti": Entry(
        "kitti",
        "test",
        "kitti_closest_vehicle_distance",
        "kitti_closest_vehicle_distance",
        label="objects",
        derive=_distance,
        ways=4,
        held="validation",
        note=_APPROXIMATE,
    ),
    "pcam": Entry(
        "patch_camelyon:2.0.0",
        templates="pcam",
        names="pcam",
        held="validation",
        note="SLIP tests on the validation split",
    ),
    "clevr": Entry(
        "clevr:3.1.0",
        "validation",
        "clevr_count_all",
        "clevr_count_all",
        label="objects",
        derive=_count,
        ways=8,
        note=_APPROXIMATE,
    ),
    # TFDS lacks these, or its reader does: NAME@PATH.
    "objectnet": Entry(
        templates="imagenet", border=2, shifted=True, note="113 classes overlap with ImageNet's; give those alone"
    ),
    "birdsnap": Entry(templates="birds"),
    "fgvc_aircraft": Entry(templates="fgvc_aircraft", metric="mean_per_class", note="by variant"),
    "fer2013": Entry(
        templates="fer2013",
        names="fer2013",
        spelled=("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"),
    ),
    "gtsrb": Entry(templates="gtsrb", names="gtsrb"),
    "country211": Entry(templates="country211", names="country211", in_order="[A-Z]{2}"),  # codes of countries
    "hatefulmemes": Entry(templates="hatefulmemes", names="hatefulmemes", metric="roc_auc"),
    "renderedsst2": Entry(templates="renderedsst2"),
    "ucf101": Entry(templates="ucf101", readable=True, note=_APPROXIMATE + "; middle frames"),
    "kinetics700": Entry(templates="kinetics700", metric="top1_top5", note=_APPROXIMATE + "; middle frames"),
}

PAPER = tuple(name for name, entry in ENTRIES.items() if entry.tfds)


def check(spec: str) -> bool:
    """Whether `spec` names a set of this table, a folder or a CSV file; the path is not looked at."""
    name, at, path = spec.partition("@")
    own = spec.startswith(("folder:", "csv:")) and spec[-1] != ":"
    return (name in ENTRIES and bool(path or not at)) or own


def entry_of(spec: str) -> tuple[str, Entry, str]:
    """Name, entry and path of a set; the path is "" where TFDS is read, and the name that of the table, if it is there.

    Raises:
      UserError: neither a path nor a TFDS data set.
    """
    if spec.startswith(("folder:", "csv:")):
        return spec, Entry(templates="dummy"), spec.partition(":")[2]
    name, _, path = spec.partition("@")
    entry = ENTRIES[name]
    if not path and not entry.tfds:
        raise UserError(f"{name} is not in TFDS; write {name}@PATH, a folder of one sub-folder a class or a CSV file.")
    return name, entry, path


def load(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ZeroShotSet:
    """The set `spec` of the module's docstring, images uint8 as `prepare` and the profile say, decoded when asked for.

    Raises:
      UserError: a set that is not prepared, a path or label that is wrong.
    """
    name, entry, path = entry_of(spec)
    if path:
        images, labels, classes = read_files(name, pathlib.Path(path))
        version = ""
        if entry.names:
            labels, classes = _published(name, entry, labels, classes)
    else:
        images, labels, classes, version = read_tfds(name, entry, data_dir)
        classes = prompts.class_names(entry.names, classes) if entry.names else classes
        if entry.classes:
            labels, classes = _masked(name, entry, labels, classes)
        if np.ndim(labels) == 1 and np.size(labels) and np.max(labels) >= len(classes):
            raise UserError(f"{name}: label {np.max(labels)} is not among {len(classes)} classes.")
    if not entry.names and name in ENTRIES:
        classes = [prompts.readable(label) if entry.readable else prompts.spaced(label) for label in classes]
    used, prepare = prompts.chosen(entry.templates, profile), profile.preprocessing(prepare)
    words: list[Any] = classes
    if name == "fer2013" and profile.clips:
        words = [prompts.SYNONYMS.get(label, label) for label in classes]
    elif name not in ENTRIES:
        words = [prompts.spaced(label) for label in classes]
    synonyms = ", synonyms" if name == "fer2013" and profile.clips else ""
    card = Provenance(
        data=path or entry.tfds.partition(":")[0],
        version=version,
        split=entry.split if not path else "",
        split_hash=digest(
            [
                identity(entry, version, entry.split) if not path else "",
                *np.asarray(labels).tolist(),
                *classes,
                *contents(images),
            ]
        ),
        protocol="mean of normalised prompts, normalised again; cosine; equal scores go to the lowest class",
        templates=f"{used} ({len(prompts.templates(used))}{synonyms})",
        preprocessing=prepare.resizing,
        metric=entry.metric,
        note=entry.note,
        role=SHIFTED if entry.shifted else "",
    )
    pictures = Pictures(images, prepare, entry.border)
    return ZeroShotSet(spec, pictures, labels, prompts.prompts(words, used), names=classes, card=card)


Read = tuple[Sequence[Any], np.ndarray, list[str], str]


def read_tfds(name: str, entry: Entry, data_dir: str | None) -> Read:
    """Images, labels, classes and version of an entry's split in TFDS."""
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
    """Labels and names among the published classes of a set whose own classes are called `classes`.

    Raises:
      UserError: a class that is none of the published ones by name or number.
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
    """Labels of a TFDS data set, which need not be prepared; none where this version of TFDS lacks it."""
    try:
        return list(tfds.builder(name).info.features[feature].names)
    except Exception:  # files can be read without TFDS
        return []


def identity(entry: Entry, version: str, *splits: str) -> list[str]:
    """What tells a TFDS data set from another one; labels tell how many items it has."""
    return [entry.tfds.partition(":")[0], version, *splits]


def _masked(name: str, entry: Entry, labels: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels and names among the set's own classes; labels of the 1000 are renumbered."""
    position = np.full(len(names), -1)
    position[list(entry.classes)] = np.arange(len(entry.classes))
    foreign = np.unique(labels[position[labels] < 0])
    if len(foreign):
        raise UserError(f"{name}: class {foreign[0]} occurs and is not among its {len(entry.classes)} classes.")
    return position[labels], [names[i] for i in entry.classes]


class PublishedSets(SetKind):
    """`NAME`, `NAME@PATH`, `folder:PATH` and `csv:PATH`."""

    prefixes = (*ENTRIES, "folder", "csv")
    names = PAPER
    at_path = tuple(ENTRIES)
    usage = "own data: folder:PATH, one sub-folder a class; csv:PATH, with the columns path and label"
    knows = staticmethod(check)
    load = staticmethod(load)

    @classmethod
    def shows(cls, spec: str) -> str:
        """All of them have images and classes."""
        return "classes"
