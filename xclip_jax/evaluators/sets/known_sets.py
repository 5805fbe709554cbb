"""Published sets of labelled images, read from TFDS, a folder or a CSV file; and `dense/pets`.

If clip-benchmark or TFDS names a set's classes, the folders and CSV labels of `NAME@PATH` must match those names: by a
published name, a label of the TFDS data set (a WordNet id for ImageNet), or the class number from 0. Other labels are
refused because their order would be a guess. All published classes are possible answers, including classes without
images. If the names are unknown, the labels in PATH are the names; they must not be numbers, which would become
prompts, and none may be missing.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.data.base import LazySequence, field
from xclip_jax.data.config import DataConfig
from xclip_jax.data.images import decode
from xclip_jax.data.labelled import Paths, read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import find_builder, open_tfds
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.base import SetKind, pictures
from xclip_jax.evaluators.dense import NO_CLASS, PROTOCOL, DenseSet, MaskedImages
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import SHIFTED, VALIDATION, Provenance, contents, digest
from xclip_jax.evaluators.sets.custom import published_layout, read_json

_IMAGENET = "imagenet2012:5.1.0"  # its labels are WordNet ids
_BORDER = 2  # red pixels around ObjectNet's images, which the authors' loader crops
_APPROXIMATE = "the published split is not public or not one: compare only numbers with the same split_hash"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Origin, templates, class names and metric of a set."""

    tfds: str = ""  # TFDS name, configuration and version; "" if TFDS lacks the set
    split: str = "test"  # of the TFDS data set
    templates: str = ""  # key of `prompts.templates`; for "imagenet" the profile chooses
    names: str = ""  # clip-benchmark's key of the class names; "" for the data set's labels
    folders: tuple[str, ...] = ()  # names of the classes in a widespread copy of the set, in the order of `names`
    readable: bool = False  # whether the data set's labels need `prompts.readable`
    metric: str = "top1"  # the published one
    label: str = "label"  # feature with the label
    classes: tuple[int, ...] = ()  # the set's classes among ImageNet's 1000; empty for all
    train: str = "train"  # split on which probes are trained; "" if the set has no probe
    held: str = ""  # split on which probes choose C; "" for a tenth of `train`
    note: str = ""  # see `Provenance`
    role: str = ""  # see `Provenance`; sets for validation are not in the paper's suite


def _imagenet(tfds_name: str, split: str = "test", **fields: Any) -> Entry:
    return Entry(tfds_name, split, "imagenet", "imagenet1k", **fields)


_COUNTRIES = (  # codes of ISO 3166, which name the folders of Country211
    "AD AE AF AG AI AL AM AO AQ AR AT AU AW AX AZ BA BB BD BE BF BG BH BJ BM BN BO BQ BR BS BT BW BY BZ CA CD CF CH "
    "CI CK CL CM CN CO CR CU CV CW CY CZ DE DK DM DO DZ EC EE EG ES ET FI FJ FK FO FR GA GB GD GE GF GG GH GI GL GM "
    "GP GR GS GT GU GY HK HN HR HT HU ID IE IL IM IN IQ IR IS IT JE JM JO JP KE KG KH KN KP KR KW KY KZ LA LB LC LI "
    "LK LR LT LU LV LY MA MC MD ME MF MG MK ML MM MN MO MQ MR MT MU MV MW MX MY MZ NA NC NG NI NL NO NP NZ OM PA PE "
    "PF PG PH PK PL PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SS SV SX SY SZ TG TH "
    "TJ TL TM TN TO TR TT TW TZ UA UG US UY UZ VA VE VG VI VN VU WS XK YE ZA ZM ZW"
)
ENTRIES: Mapping[str, Entry] = {
    "imagenet": _imagenet(_IMAGENET, "validation"),
    "imagenet_minival": _imagenet(_IMAGENET, "train[99%:]", train="", role=VALIDATION),  # big_vision's
    "imagenet_v2": _imagenet("imagenet_v2/matched-frequency", train="", role=SHIFTED),
    "imagenet_a": _imagenet("imagenet_a", classes=prompts.IMAGENET_A, train="", role=SHIFTED),
    "imagenet_r": _imagenet("imagenet_r", classes=prompts.IMAGENET_R, train="", role=SHIFTED),
    "imagenet_sketch": _imagenet("imagenet_sketch", train="", role=SHIFTED),
    "imagenet_o": _imagenet("", classes=prompts.IMAGENET_O, train="", role=SHIFTED,
                            note="no image shows its label, one of ImageNet's; the paper's AUPR is not measured"),
    "objectnet": Entry(templates="imagenet", train="", role=SHIFTED, note="113 of 313 classes; borders cropped"),
    "food101": Entry("food101", "validation", "food101"),  # its name for the test split
    "cifar10": Entry("cifar10:3.0.2", templates="cifar10"),
    "cifar100": Entry("cifar100:3.0.2", templates="cifar100"),
    "cub200": Entry("caltech_birds2011:0.2.0", templates="birds", readable=True),
    "sun397": Entry("sun397/standard-part1-120k", templates="sun397", readable=True,
                    note="the official partition; clip_benchmark evaluates all 108,754 images"),
    "cars": Entry("cars196:2.1.0", templates="cars", note="labels of versions before 2.1.0 are wrong"),
    "voc2007": Entry("voc/2007", templates="voc2007_multilabel", metric="map11", label="labels", train=""),
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
    "pcam": Entry("patch_camelyon:2.0.0", templates="pcam", names="pcam", held="validation",
                  note="SLIP tests on the validation split"),
    # Missing in TFDS or its reader: NAME@PATH.
    "birdsnap": Entry(templates="birds"),
    "fgvc_aircraft": Entry(templates="fgvc_aircraft", metric="mean_per_class", note="by variant"),
    "fer2013": Entry(templates="fer2013", names="fer2013",  # and Kaggle's folders, which clip_benchmark reads
                     folders=("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")),
    "gtsrb": Entry(templates="gtsrb", names="gtsrb"),
    "country211": Entry(templates="country211", names="country211", folders=tuple(_COUNTRIES.split())),
    "hatefulmemes": Entry(templates="hatefulmemes", names="hatefulmemes", metric="roc_auc"),
    "renderedsst2": Entry(templates="renderedsst2"),
    "ucf101": Entry(templates="ucf101", readable=True, note=_APPROXIMATE + "; middle frames"),
    "kinetics700": Entry(templates="kinetics700", metric="top1_top5", note=_APPROXIMATE + "; middle frames"),
}  # fmt: skip

PAPER = tuple(name for name, entry in ENTRIES.items() if entry.tfds and entry.role != VALIDATION)


@dataclasses.dataclass(frozen=True)
class Content:
    """Labelled images of a set or split."""

    images: Sequence[Any]  # encoded, or uint8 (h, w, 3)
    labels: np.ndarray  # int (n,), or bool (n, classes) if an image may have several classes
    classes: list[str]  # their names
    data: str  # for data, version and split see `Provenance`
    version: str = ""
    split: str = ""
    identity: Any = ""  # JSON that identifies images outside files, for the split's hash
    templates: Sequence[str] = ()  # the data set's own, which override the profile's; may be empty


def read(spec: str, data_dir: str) -> Content:
    """Open a set, with the published names of its classes."""
    name, _, path = spec.partition("@")
    entry = ENTRIES[name]
    if not path and not entry.tfds:
        how = "its folder objectnet-1.0" if name == "objectnet" else "a CSV file or a folder with sub-folders per class"
        raise UserError(f"{name} is not in TFDS; write {name}@PATH, {how}.")
    if name == "objectnet":
        return read_objectnet(path)
    if path:
        images, labels, classes = read_files(name, pathlib.Path(path))
        labels, classes = _published(spec, labels, classes, data_dir)
        return Content(images, labels, classes, path)
    content = read_tfds(entry, entry.split, data_dir)
    labels = content.labels
    classes = prompts.class_names(entry.names, content.classes) if entry.names else content.classes
    if entry.classes:
        number = {whole: i for i, whole in enumerate(entry.classes)}
        labels = np.array([number[label] for label in labels.tolist()], int)
        classes = [classes[i] for i in entry.classes]
    return dataclasses.replace(content, labels=labels, classes=classes)


def read_objectnet(location: str) -> Content:
    """Read ObjectNet's images of the classes in ImageNet, without borders, from its folder `objectnet-1.0`.

    Like in wise-ft and clip_benchmark, classes are in the order of their folders and have names in lower case.
    """
    folder = pathlib.Path(location).expanduser()
    with published_layout("objectnet", location):
        labels_of = read_json(folder / "mappings" / "folder_to_objectnet_label.json")
        in_imagenet = read_json(folder / "mappings" / "objectnet_to_imagenet_1k.json")
        classes = {place: label.lower() for place, label in sorted(labels_of.items()) if label in in_imagenet}
        files, numbers, places = read_files("objectnet", folder / "images")
        position = {place: i for i, place in enumerate(classes)}
        labels = np.array([position.get(places[number], -1) for number in numbers])
        kept = np.flatnonzero(labels >= 0)
        if not len(kept):
            raise ValueError(f"none of {len(places)} folders in 'images' is a class of ImageNet")
    paths = Paths([files.paths[i] for i in kept], files.root)

    def crop(index: int) -> np.ndarray:
        return decode(paths[index], rotate=False)[_BORDER:-_BORDER, _BORDER:-_BORDER]

    pixels = LazySequence(len(paths), crop, paths.name)
    return Content(pixels, labels[kept], list(classes.values()), location, identity=contents(paths))


def read_tfds(entry: Entry, split: str, data_dir: str) -> Content:
    """Open a split of an entry's TFDS data set, with the data set's labels."""
    source, info = open_tfds(entry.tfds, split, data_dir or None)
    values = [source[i][entry.label] for i in range(len(source))]  # no image is decoded
    feature = info.features[entry.label]
    classes = list(getattr(feature, "feature", feature).names)
    if np.ndim(values[0]):
        values = [np.isin(np.arange(len(classes)), value) for value in values]
    version = str(info.version)
    data = entry.tfds.partition(":")[0]
    identity = [data, version, split]
    return Content(field(source, "image"), np.array(values), classes, data, version, entry.split, identity)


def _published(spec: str, labels: np.ndarray, classes: Sequence[str], data_dir: str) -> tuple[np.ndarray, list[str]]:
    """Return labels and names of the published classes, from labels of NAME@PATH with the names `classes`."""
    name, _, path = spec.partition("@")
    entry = ENTRIES[name]
    labelled = entry.tfds or (_IMAGENET if entry.names == "imagenet1k" else "")
    tfds_labels = _tfds_labels(labelled, entry.label, data_dir) if labelled else []
    if entry.names:
        whole = prompts.published(entry.names)
    elif all(map(_is_number, tfds_labels)):  # in TFDS, names come with the images
        number = next(filter(_is_number, classes), None)
        expected = len(tfds_labels) or len(classes)
        if number is None and len(classes) == expected:
            return labels, list(classes)
        has = f"{len(classes)} classes, not {expected}" if number is None else f"a class {number!r}, a number"
        prepare = f", prepare {entry.tfds} with TFDS," if entry.tfds else ""
        raise UserError(
            f"{name}: {path!r} has {has}, and the names of {name}'s classes are unknown here. Name all of them as "
            f"published{prepare} or evaluate folder:PATH or csv:PATH."
        )
    else:
        whole = [prompts.readable(label) for label in tfds_labels] if entry.readable else tfds_labels
    kept = entry.classes or range(len(whole))
    published = [whole[i] for i in kept]
    # Without a 0, numbers may well begin at 1.
    from_zero = any(_is_number(label) and int(label) == 0 for label in classes)
    by_number = "" if name == "fer2013" else " or by number from 0"  # FER2013 numbers its classes in another order
    numbers = [str(i) for i in range(len(published))] if from_zero and by_number else []
    try:
        of_tfds = [tfds_labels[i] for i in kept] if tfds_labels else []
        position = np.array(prompts.match(classes, published, entry.folders, of_tfds, numbers))
    except KeyError as error:
        raise UserError(
            f"{name}: {error.args[0]!r} is not a class of {name}, or occurs twice. Name the classes as published "
            f"({published[0]!r}, ...){by_number}, or evaluate folder:PATH or csv:PATH, with their own names."
        ) from error
    if np.ndim(labels) == 1:
        return position[labels], published
    several = np.zeros((len(labels), len(published)), bool)
    several[:, position] = labels
    return several, published


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


@functools.cache
def _tfds_labels(name: str, feature: str, data_dir: str) -> list[str]:
    """Return the labels of a TFDS data set, prepared or not; [] if this version of TFDS lacks it."""
    try:
        return list(find_builder(name, data_dir).info.features[feature].names)
    except Exception:  # files can be read without TFDS
        return []


def _pet_masks(source: Any) -> LazySequence:
    """Return masks from Oxford-IIIT Pet's trimaps (h, w, 1): 1 pet, 2 background, 3 outline, without a class."""

    def get(index: int) -> np.ndarray:
        trimap = np.asarray(source[index]["segmentation_mask"])[..., 0]
        return np.where(trimap == 3, NO_CLASS, trimap - np.uint8(1)).astype(np.uint8)

    return LazySequence(len(source), get)


class DenseSets(SetKind):
    """`dense/pets`: pets and background of Oxford-IIIT Pet."""

    prefixes = ("dense",)

    @classmethod
    def knows(cls, spec: str) -> bool:
        return spec == "dense/pets"

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> DenseSet:
        name = "oxford_iiit_pet"
        prepare = profile.preprocessing(prepare)
        splits = []
        for split in ("train", "test"):
            source, info = open_tfds(name, split, data.dir or None)
            splits.append(MaskedImages(pictures(field(source, "image"), prepare), _pet_masks(source)))
        train, test = splits
        version = str(info.version)
        card = Provenance(
            data=name,
            version=version,
            split="test",
            split_hash=digest([name, version, len(train.images), len(test.images)]),
            protocol=PROTOCOL,
            preprocessing=prepare.resizing,
            metric="miou",
        )
        classes = ["pet", "background"]
        texts = prompts.prompts(classes, prompts.chosen("imagenet", profile))
        return DenseSet(spec, classes, train, MaskedImages([], []), test, prepare, card, texts)
