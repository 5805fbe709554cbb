"""Table of the published zero-shot sets: where each is from, its templates, class names and metric."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.evaluators import prompts

_APPROXIMATE = "the published split is not public or not one: compare only numbers with the same split_hash"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A set of the table.

    Attributes:
      tfds: name, configuration and version, "" where TFDS lacks it.
      split: of the TFDS data set.
      templates: key of `prompts.templates`; the profile chooses those of "imagenet".
      names: clip-benchmark's key of the class names; "" for the data set's own labels.
      readable: whether own labels need `prompts.readable`.
      spelled: names of the classes in the published archive, in the order of `names`.
      in_order: pattern of class folders that are in the order of `names` when they are sorted.
      metric: the published one.
      label: feature with the label; of several parts, "/" between them.
      classes: of the 1000 of ImageNet, the only ones to choose from, where the labels are still of the 1000.
      derive: function from the feature's value to the label.
      ways: number of classes where the feature does not have it.
      border: pixels cut off on each side.
      train, held: splits that probes learn from and choose C on; without `train` there is no probe, without `held` a
        tenth of `train` is used.
      note: see `Provenance`.
      shifted: whether its images are of another source or style than the training images of its classes, see `SHIFTED`.
      validation: whether it is for model selection, see `VALIDATION`; no part of what the paper reports.
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
    validation: bool = False


def _column(objects: Any, key: str) -> Sequence[Any]:
    """Return a part of nested features, which TFDS gives as a dict of columns or as a list of dicts."""
    return [item[key] for item in objects] if isinstance(objects, list) else objects[key]


def _count(objects: Any) -> int:
    """CLEVR: three to ten objects -> 0 to 7."""
    return len(_column(objects, "color")) - 3


def _distance(objects: Any) -> int:
    """KITTI, VTAB's task: the nearest vehicle (car, van, truck) within 8 m, 20 m, any distance, or none -> 0 to 3."""
    types = np.asarray(_column(objects, "type"))
    locations = np.asarray(_column(objects, "location")).reshape(-1, 3)
    distances = locations[np.isin(types, (0, 1, 2)), 2]
    return 3 if not len(distances) else int(np.searchsorted((8.0, 20.0), distances.min()))


def _imagenet(tfds_name: str, split: str = "test", **fields: Any) -> Entry:
    return Entry(tfds_name, split, "imagenet", "imagenet1k", **fields)


ENTRIES: Mapping[str, Entry] = {
    "imagenet": _imagenet("imagenet2012:5.1.0", "validation"),
    "imagenet_minival": _imagenet("imagenet2012:5.1.0", "train[99%:]", train="", validation=True),  # as in big_vision
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

PAPER = tuple(name for name, entry in ENTRIES.items() if entry.tfds and not entry.validation)
