"""Published zero-shot sets, as a table of data, and how they are read: from TFDS, from a folder, or from a CSV file.

`NAME` reads the TFDS data set in the table; `NAME@PATH` reads the same set from a folder with one sub-folder a class,
or from a CSV file with the columns path and label; so do `folder:PATH` and `csv:PATH` for a set not in the table.
`probe/NAME` and `fewshot/NAME` learn from the set's training split; with @PATH, a folder that holds train, test and
perhaps validation, each with one sub-folder a class.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.data import transforms
from xclip_jax.data.labelled import Field, read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.sources import open_tfds
from xclip_jax.errors import UserError
from xclip_jax.evaluators import names
from xclip_jax.evaluators.card import Card, digest
from xclip_jax.evaluators.names import Profile
from xclip_jax.evaluators.probe import Joined, ProbeSet
from xclip_jax.evaluators.zeroshot import ZeroShotSet

_APPROXIMATE = "the published split is not public or not one: compare only numbers with the same split_hash"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A set of the table.

    Attributes:
      tfds: name, configuration and version, "" where TFDS lacks it.
      split: of the TFDS data set.
      templates: key of `names.templates`; "imagenet" is what the profile says.
      names: clip-benchmark's key of the class names; "" for the data set's own labels.
      metric: the one that is published.
      label: feature with the label; of several parts, "/" between them.
      classes: of the 1000 of ImageNet, the only ones to choose from, where the labels are still of the 1000.
      derive: makes the label of the feature's value.
      ways: number of classes where the feature does not say it.
      border: pixels cut off on each side.
      train, held: splits that probes learn from and choose C on; no `train`, no probe; no `held`, a tenth of `train`.
      note: see `Card`.
    """

    tfds: str = ""
    split: str = "test"
    templates: str = ""
    names: str = ""
    metric: str = "top1"
    label: str = "label"
    classes: tuple[int, ...] = ()
    derive: Callable[[Any], int] | None = None
    ways: int = 0
    border: int = 0
    train: str = "train"
    held: str = ""
    note: str = ""


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
    "imagenet_v2": _imagenet("imagenet_v2/matched-frequency", train=""),
    "imagenet_a": _imagenet("imagenet_a", classes=names.IMAGENET_A, train=""),
    "imagenet_r": _imagenet("imagenet_r", classes=names.IMAGENET_R, train=""),
    "imagenet_sketch": _imagenet("imagenet_sketch", train=""),
    "food101": Entry("food101", "validation", "food101"),  # its test split is called so
    "cifar10": Entry("cifar10:3.0.2", templates="cifar10"),
    "cifar100": Entry("cifar100:3.0.2", templates="cifar100"),
    "cub200": Entry("caltech_birds2011:0.2.0", templates="birds"),
    "sun397": Entry("sun397/standard-part1-120k", templates="sun397",
                    note="the official partition; clip_benchmark evaluates all 108,754 images"),
    "cars": Entry("cars196:2.1.0", templates="cars", note="labels of versions before 2.1.0 are wrong"),
    "voc2007": Entry("voc/2007", templates="voc2007_multilabel", metric="map11", label="labels"),
    "dtd": Entry("dtd:3.0.1", templates="dtd", held="validation"),
    "pets": Entry("oxford_iiit_pet", templates="pets", names="pets", metric="mean_per_class"),
    "caltech101": Entry("caltech101:3.0.2", templates="caltech101", names="caltech101_vtab", metric="mean_per_class"),
    "flowers": Entry("oxford_flowers102", templates="flowers", names="flowers", metric="mean_per_class",
                     held="validation"),
    "mnist": Entry("mnist", templates="mnist", names="mnist"),
    "stl10": Entry("stl10", templates="stl10"),
    "svhn": Entry("svhn_cropped", templates="svhn", names="svhn"),
    "eurosat": Entry("eurosat/rgb", "train", "eurosat", "eurosat", train="", note=_APPROXIMATE),
    "resisc45": Entry("resisc45:3.0.0", "train", "resisc45", train="", note=_APPROXIMATE),
    "kitti": Entry("kitti", "test", "kitti_closest_vehicle_distance", "kitti_closest_vehicle_distance",
                   label="objects", derive=_distance, ways=4, held="validation", note=_APPROXIMATE),
    "pcam": Entry("patch_camelyon:2.0.0", templates="pcam", names="pcam", held="validation",
                  note="SLIP tests on the validation split"),
    "clevr": Entry("clevr:3.1.0", "validation", "clevr_count_all", "clevr_count_all", label="objects", derive=_count,
                   ways=8, note=_APPROXIMATE),
    # TFDS lacks these, or its reader does: NAME@PATH.
    "objectnet": Entry(templates="imagenet", border=2, note="113 classes overlap with ImageNet's; give those alone"),
    "birdsnap": Entry(templates="birds"),
    "fgvc_aircraft": Entry(templates="fgvc_aircraft", metric="mean_per_class", note="by variant"),
    "fer2013": Entry(templates="fer2013", names="fer2013"),
    "gtsrb": Entry(templates="gtsrb", names="gtsrb"),
    "country211": Entry(templates="country211", names="country211", note="folders in order of the country's code"),
    "hatefulmemes": Entry(templates="hatefulmemes", names="hatefulmemes", metric="roc_auc"),
    "renderedsst2": Entry(templates="renderedsst2"),
    "ucf101": Entry(templates="ucf101", note=_APPROXIMATE + "; middle frames"),
    "kinetics700": Entry(templates="kinetics700", metric="top1_top5", note=_APPROXIMATE + "; middle frames"),
}

PAPER = tuple(name for name, entry in ENTRIES.items() if entry.tfds)


def check(spec: str) -> bool:
    """Whether `spec` names a set of this table, a folder or a CSV file; the path is not looked at."""
    name, at, path = _plain(spec).partition("@")
    from_files = spec.startswith(("folder:", "csv:")) and spec[-1] != ":"  # no probe of these: they have no parts
    return (name in ENTRIES and bool(path or not at)) or from_files


def _plain(spec: str) -> str:
    return spec.removeprefix("probe/").removeprefix("fewshot/")


def load_probe(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ProbeSet:
    """The set `probe/NAME` or `fewshot/NAME`; the latter learns from 1 % and 10 % and 5 a class too.

    Raises:
      UserError: as `load`; a set without a training split, or with several labels an image.
    """
    name, _, path = _plain(spec).partition("@")
    entry = ENTRIES[name]
    if not path and not (entry.tfds and entry.train):
        raise UserError(f"{name} has no training split in TFDS; write {spec}@PATH, a folder with train and test.")
    if path:
        held = (pathlib.Path(path) / "validation").is_dir()
        folders = ("train", *["validation"] * held, "test")
        read = [(*read_files(spec, pathlib.Path(path) / folder), "") for folder in folders]
    else:
        splits = (entry.train, *[entry.held] * bool(entry.held), entry.split)
        read = [_tfds(name, dataclasses.replace(entry, split=split), data_dir) for split in splits]
    if any(part[2] != read[0][2] for part in read) or any(np.ndim(part[1]) != 1 for part in read):
        raise UserError(f"{spec}: the splits must have the same classes, and each image one of them.")
    if len(read) == 2:
        read.insert(1, ([], np.array([], int), read[0][2], ""))
    metric = entry.metric if entry.metric == "mean_per_class" else "top1"
    sgd = profile.sgd and spec.startswith("probe/")
    prepare = profile.preprocessing(prepare)
    if sgd:
        prepare = dataclasses.replace(prepare, resize_size=round(prepare.size * 256 / 224))
    views = "crops and flips of each epoch" if profile.augment else "central crops, without its crops and flips"
    card = Card(
        data=path or entry.tfds.partition(":")[0], version=read[0][3], split=entry.split if not path else "test",
        split_hash=digest([part[1].tolist() for part in read]),
        protocol=f"SLIP's linear probe: features before projection, SGD, 90 epochs, lr 0.00625, {views}" if sgd else
        "CLIP's linear probe: features before projection, L-BFGS, C by halving on validation, fit on both",
        preprocessing=prepare.resizing,
        metric=f"linear/{metric}", note=entry.note,
    )
    parts = ("1%", "10%", "5-shot") if spec.startswith("fewshot/") else ()
    pictures = [Pictures(part[0], prepare, entry.border) for part in read]
    learned = [image for part in read[:2] for image in (part[0],) if len(image)]
    augmented = functools.partial(Augmented, learned, prepare) if sgd and profile.augment else None
    return ProbeSet(
        spec, *pictures, {"": tuple(part[1] for part in read)}, parts, sgd=sgd, augmented=augmented, card=card
    )


def load(
    spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile
) -> ZeroShotSet | ProbeSet:
    """The set `spec` of the module's docstring, images uint8 as `prepare` and the profile say, decoded when asked for.

    Raises:
      UserError: a set that is not prepared, a path or label that is wrong.
    """
    if _plain(spec) != spec:
        return load_probe(spec, prepare, data_dir, profile)
    name, _, path = spec.partition("@")
    entry = ENTRIES.get(name, Entry(templates="dummy"))
    if spec.startswith(("folder:", "csv:")):
        name, path = spec, spec.partition(":")[2]
    if not path and not entry.tfds:
        raise UserError(f"{name} is not in TFDS; write {name}@PATH, a folder of one sub-folder a class or a CSV file.")
    read = (*read_files(name, pathlib.Path(path)), "") if path else _tfds(name, entry, data_dir)
    images, labels, label_names, version = read
    found = _names(entry, label_names)
    if entry.classes:
        labels, found = _masked(name, entry, np.asarray(labels), found)
    if np.ndim(labels) == 1 and found and np.size(labels) and np.max(labels) >= len(found):
        raise UserError(f"{name}: label {np.max(labels)} is not among {len(found)} classes.")
    used, prepare = names.chosen(entry.templates, profile), profile.preprocessing(prepare)
    words = [names.SYNONYMS.get(name, name) for name in found] if name == "fer2013" and profile.clips else found
    card = Card(
        data=path or entry.tfds.partition(":")[0],
        version=version,
        split=entry.split if not path else "",
        split_hash=digest([*np.asarray(labels).tolist(), *found]),
        protocol="mean of normalised prompts, normalised again; cosine; equal scores go to the lowest class",
        templates=f"{used} ({len(names.templates(used))}{', synonyms' if words != found else ''})",
        preprocessing=prepare.resizing,
        metric=entry.metric,
        note=entry.note,
    )
    pictures = Pictures(images, prepare, entry.border)
    return ZeroShotSet(spec, pictures, labels, names.prompts(words, used), names=found, card=card)


class Pictures(Sequence):
    """Encoded images, decoded and resized when they are asked for: data sets need not fit into memory."""

    def __init__(self, images: Sequence[Any], prepare: Preprocessing, border: int = 0) -> None:
        self._images, self._prepare, self._border = images, prepare, border

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self._images[index]
        if self._border or not isinstance(image, bytes):
            image = _colours(transforms.decode(image))
        if self._border:
            image = image[self._border : -self._border, self._border : -self._border]
        return self._prepare(image)


def _colours(image: np.ndarray) -> np.ndarray:
    """RGB of what may be grey (h, w, 1), as TFDS keeps MNIST."""
    return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


class Augmented(Sequence):
    """Random crops of encoded images, half of them flipped: those of one epoch, drawn as torchvision does."""

    def __init__(self, images: Sequence[Sequence[Any]], prepare: Preprocessing, epoch: int) -> None:
        self._images, self._epoch = Joined(images), epoch
        self._size, self._resample = prepare.size, prepare.interpolation

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self._epoch, index))
        image = _colours(transforms.decode(self._images[index]))
        image = transforms.random_resized_crop(image, self._size, rng, (0.08, 1.0), resample=self._resample)
        return image[:, ::-1] if rng.random() < 0.5 else image


Read = tuple[Sequence[Any], np.ndarray, list[str], str]


def _tfds(name: str, entry: Entry, data_dir: str | None) -> Read:
    source, info = open_tfds(entry.tfds, entry.split, data_dir)
    # Images are skipped here, not decoded.
    values = [source[i][entry.label] for i in range(len(source))]
    feature = info.features[entry.label]
    version = str(info.version)
    if entry.derive:
        found = np.array([entry.derive(value) for value in values])
        if found.min() < 0 or found.max() >= entry.ways:
            raise UserError(f"{name}: a record of {entry.tfds} gives label {found.min()} to {found.max()}.")
        return Field(source, "image"), found, [str(i) for i in range(entry.ways)], version
    labels = list(getattr(feature, "feature", feature).names)
    if np.ndim(values[0]):
        several = np.zeros((len(values), len(labels)), bool)
        for row, value in zip(several, values, strict=True):
            row[np.asarray(value, int)] = True
        return Field(source, "image"), several, labels, version
    return Field(source, "image"), np.array(values, int), labels, version


def _names(entry: Entry, labels: Sequence[str]) -> list[str]:
    if entry.classes and len(labels) == len(entry.classes):
        # A folder of the 200 alone: their wnids are in ImageNet's order.
        whole = names.class_names(entry.names, [str(i) for i in range(1000)])
        return [whole[i] for i in entry.classes]
    return names.class_names(entry.names, labels)


def _masked(name: str, entry: Entry, labels: np.ndarray, found: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels and names among the set's own classes; labels of the 1000 are renumbered."""
    if len(found) == len(entry.classes):
        return labels, found
    position = np.full(len(found), -1)
    position[list(entry.classes)] = np.arange(len(entry.classes))
    foreign = np.unique(labels[position[labels] < 0])
    if len(foreign):
        raise UserError(f"{name}: class {foreign[0]} occurs and is not among its {len(entry.classes)} classes.")
    return position[labels], [found[i] for i in entry.classes]
