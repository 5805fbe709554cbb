"""What a number must say about itself before it can be compared with another."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Card:
    """Provenance of an evaluation set; empty where unknown.

    Attributes:
      data: name of the data set.
      version: of the data set.
      split: which part.
      split_hash: sha256, 16 digits, over the ids (or labels and texts) of the items in order: `digest`.
      protocol: how the number is made, in words.
      templates: name of the prompts.
      preprocessing: of the images, but for mean and standard deviation, which belong to the model.
      metric: the one to report; the data set's own.
      note: what keeps the number from being compared with published ones.
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


def digest(items: Iterable[Any]) -> str:
    """The first 16 hex digits of the sha256 over the JSON of `items`, one a line, in their order."""
    state = hashlib.sha256()
    for item in items:
        state.update(json.dumps(item, ensure_ascii=False, default=lambda x: x.tolist()).encode() + b"\n")
    return state.hexdigest()[:16]


def describe(card: Card) -> Mapping[str, str]:
    """The fields that say something."""
    return {key: value for key, value in dataclasses.asdict(card).items() if value}
