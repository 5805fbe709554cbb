"""Provenance of an evaluation result: what it is of and how it was made."""

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
      split: which part.
      split_hash: `digest` of what the set consists of, in order: labels, class names and texts; of images their files'
        names and sizes, of a TFDS data set its name, version, split and number of items.
      protocol: how the number is made, in words.
      templates: name of the prompts.
      preprocessing: of the images, but for mean and standard deviation, which belong to the model.
      metric: the one to report; the data set's own.
      note: what keeps the number from being compared with published ones.
      role: `VALIDATION` of a set that serves to choose, `SHIFTED` of one whose classes training may know in a style or
        from a source that it does not.
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
    """The first 16 hex digits of the sha256 over the JSON of `items`, one a line, in their order."""
    state = hashlib.sha256()
    for item in items:
        state.update(json.dumps(item, ensure_ascii=False, default=lambda x: x.tolist()).encode() + b"\n")
    return state.hexdigest()[:16]


def contents(images: Sequence[Any]) -> list[tuple[str, int]]:
    """Name and size in bytes of each image's file, as a part of `digest`; of images that are not in files, none.

    Names begin at the folder that holds all of the files: where the data set is stored does not matter.
    """
    if not isinstance(images, Paths) or not len(images):
        return []
    paths = [os.path.abspath(path) for path in images.paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [(os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path).st_size) for path in paths]


def describe(card: Provenance) -> Mapping[str, str]:
    """The fields that say something, as evaluation.json has them."""
    return {key: value for key, value in dataclasses.asdict(card).items() if value and key != "role"}
