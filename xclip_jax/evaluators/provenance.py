"""Provenance of an evaluation result: data set, split, protocol, and hashes of what was evaluated."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xclip_jax.data.labelled import Paths

VALIDATION, SHIFTED = "validation", "shifted"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Provenance of an evaluation set; empty where unknown.

    Attributes:
      data: name of the data set.
      version: of the data set.
      split: of the data set.
      split_hash: `digest` of the set's contents, in order: labels, class names and texts; of images their files' names
        and sizes, of a TFDS data set its name, version, split and number of items.
      protocol: of the measurement, in words.
      templates: name of the prompt templates.
      preprocessing: of the images, without mean and standard deviation, which belong to the model.
      metric: the one to report; the data set's own.
      note: why the number cannot be compared with published ones.
      role: `VALIDATION` of a set for model selection, `SHIFTED` of one whose images are of another style or source than
        the training data's.
    """

    data: str = ""
    version: str = ""
    split: str = ""
    split_hash: str = ""
    protocol: str = ""
    templates: str = ""
    preprocessing: str = ""
    metric: str = "top1"
    note: str = ""
    role: str = ""


def digest(items: Iterable[Any]) -> str:
    """Return the first 16 hex digits of the sha256 over the JSON of `items`, one a line, in their order."""
    state = hashlib.sha256()
    for item in items:
        line = json.dumps(item, ensure_ascii=False, default=lambda x: x.tolist())
        state.update(line.encode("utf-8", "surrogatepass") + b"\n")  # names of files need not be UTF-8
    return state.hexdigest()[:16]


def contents(images: Sequence[Any]) -> list[tuple[str, int]]:
    """Return name and size in bytes of each image's file, for `digest`; [] for images that are not in files.

    Names are relative to the folder that has all of the files: the path of the data set does not matter.
    """
    if not isinstance(images, Paths) or not len(images):
        return []
    paths = [os.path.abspath(path) for path in images.paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [(os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path).st_size) for path in paths]


def describe(card: Provenance) -> Mapping[str, str]:
    """Return the fields that are not empty, but for the role, as evaluation.json has them."""
    return {key: value for key, value in dataclasses.asdict(card).items() if value and key != "role"}
