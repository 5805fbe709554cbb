"""The split of a run's sources into training and held-out pairs, `data.holdout`.

A hash of the image's bytes decides. So all pairs with the same image are on the same side, whatever the order, file,
source, number of hosts and other pairs.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.console import show
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import records
from xclip_jax.data.base import Record, Source, WrappedSource
from xclip_jax.data.config import DataConfig

_MANY = 100_000  # the reading of more pairs is announced


class Subset(WrappedSource):
    """The records `indices` of a source, in this order, with the fingerprint of the whole source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        super().__init__(source)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> dict[str, str]:
        return self.source.describe(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Some readable pairs of a source.

    Attributes:
      indices: numbers of the records, int (n,).
      captions: captions of each record.
      hashes: hexadecimal hash of each image.
      bad: number of unreadable records in the whole source; they are not held out.
      repeats: share of readable records in the whole source whose captions all equal another record's.
    """

    indices: np.ndarray
    captions: list[list[str]]
    hashes: list[str]
    bad: int
    repeats: float


def image_hash(image: bytes | np.ndarray) -> str:
    """Return 16 hexadecimal digits of a hash of a source's image, encoded or uint8 (h, w, 3)."""
    return hashlib.blake2b(image if isinstance(image, bytes) else image.tobytes(), digest_size=8).hexdigest()


def is_held_out(digits: str, share: float) -> bool:
    """Whether an image with this hash belongs to the held-out `share`."""
    return int(digits, 16) < share * 2**64


_known: dict[str, Pairs] = {}  # shared by training, evaluation and report


def find(spec: str, source: Source, share: float, config: DataConfig) -> Pairs:
    """Read all records of the source `spec`, and return the held-out pairs; a share of 1 holds out all."""
    key = json.dumps([spec, share, config.image_column, config.text_columns, source.fingerprint()], default=str)
    if key not in _known:
        if len(source) > _MANY:
            # Not log0: the processes of a run may not have joined yet.
            show(f"reading the {len(source):,} pairs of {spec} to choose pairs to hold out or evaluate", sys.stderr)

        def take(record: Record) -> tuple[int, tuple[list[str], str] | None]:
            digits = image_hash(record["image"])
            held = (record["text"], digits) if is_held_out(digits, share) else None
            return hash(tuple(record["text"])), held

        places = ((source, index) for index in range(len(source)))
        threads = min(config.threads, records.MAX_THREADS)
        captions_of = array.array("q")
        held = []
        for index, result in enumerate(records.read_each(places, take, threads=threads)):
            if isinstance(result, BadSample):
                continue
            captions_of.append(result[0])
            if result[1] is not None:
                held.append((index, *result[1]))
        _known[key] = Pairs(
            indices=np.array([index for index, _, _ in held], int),
            captions=[texts for _, texts, _ in held],
            hashes=[digits for _, _, digits in held],
            bad=len(source) - len(captions_of),
            repeats=records.repeated_share(np.array(captions_of)),
        )
    return _known[key]


class TrainingPart(Subset):
    """The training pairs of a source; its fingerprint includes a digest of the held-out pairs."""

    def __init__(self, source: Source, held_out: Pairs) -> None:
        super().__init__(source, np.setdiff1d(np.arange(len(source)), held_out.indices))
        self._outcome = records.reading_digest(held_out.indices, held_out.bad)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"samples": len(self), "data.holdout": self._outcome}


def training_part(specs: Iterable[str], opened: Iterable[Source], config: DataConfig) -> list[Source]:
    """Return the sources without their held-out pairs; `UserError` if none is held out, or none is left."""
    opened = list(opened)
    parts: list[Source] = [
        TrainingPart(source, find(spec, source, config.holdout, config))
        for spec, source in zip(specs, opened, strict=True)
    ]
    total = sum(map(len, opened))
    left = sum(map(len, parts))
    if left == total or not all(map(len, parts)):
        raise UserError(
            f"data.holdout={config.holdout:g} leaves {left} of the {total} pairs of data.sources for training; each "
            "source needs some, and some must be held out. Change it, set it to 0, or add pairs."
        )
    return parts


def selected(images: Sequence[Any], share: float) -> list[int]:
    """Return the positions of the held-out `images`; unreadable images are not held out."""
    positions = []
    for position in range(len(images)):
        with contextlib.suppress(BadSample):
            if is_held_out(image_hash(images[position]), share):
                positions.append(position)
    return positions
