"""Pairs that are held out of training by their content: `data.holdout`.

A pair is held out by a hash of its image's bytes. So it is on the same side in whatever order, file or source it is
read, on any number of hosts and beside any other pairs, and all pairs of one image are on one side. Captions have no
part in it: those that many images share stay in training, with other images.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import records
from xclip_jax.data.base import Record, Source
from xclip_jax.data.config import DataConfig
from xclip_jax.data.controls import Subset

_MANY = 100_000  # pairs from which on a line says that they are read


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Some pairs of a source, without those that cannot be read.

    Attributes:
      indices: of the records, int (n,).
      captions: of each record.
      hashes: hash of each image, in hexadecimal digits.
      bad: number of the source's records that cannot be read, which are not held out.
    """

    indices: np.ndarray
    captions: list[list[str]]
    hashes: list[str]
    bad: int


def image_hash(image: bytes | np.ndarray) -> str:
    """Return 16 hexadecimal digits of a hash of an image as its source has it, encoded or uint8 (h, w, 3)."""
    return hashlib.blake2b(image if isinstance(image, bytes) else image.tobytes(), digest_size=8).hexdigest()


def is_held_out(digits: str, share: float) -> bool:
    """Whether an image with this hash belongs to the `share` that is held out."""
    return int(digits, 16) < share * 2**64


_known: dict[str, Pairs] = {}  # training, evaluation and report of one process ask for the same pairs


def find(spec: str, source: Source, share: float, config: DataConfig) -> Pairs:
    """Return the pairs of a source that are held out; all of them where the share is 1. Reads each record once.

    Args:
      spec: of the source.
      source: that it names, not yet decoded.
      share: of the images.
      config: how the source is read.
    """
    key = json.dumps([spec, share, config.image_key, config.text_keys, source.fingerprint()], default=str)
    if key not in _known:
        if len(source) > _MANY:
            log0(f"reading the {len(source):,} pairs of {spec} to find those that are held out or evaluated")

        def take(record: Record) -> tuple[str, list[str] | None]:
            digits = image_hash(record["image"])
            return digits, record["text"] if is_held_out(digits, share) else None

        indices, captions, hashes, bad = [], [], [], 0
        places, threads = ((source, index) for index in range(len(source))), min(config.threads, records.MAX_THREADS)
        read = records.read_each(places, take, timeout=config.read_timeout, threads=threads)
        for index, pair in enumerate(read):
            if isinstance(pair, BadSample):
                bad += 1
            elif pair[1] is not None:
                indices.append(index)
                hashes.append(pair[0])
                captions.append(pair[1])
        _known[key] = Pairs(np.array(indices, int), captions, hashes, bad)
    return _known[key]


class TrainingPart(Subset):
    """The pairs of a source that are not held out. Its fingerprint also has a digest of those that are."""

    def __init__(self, source: Source, held_out: Pairs) -> None:
        super().__init__(source, np.setdiff1d(np.arange(len(source)), held_out.indices))
        self._outcome = records.outcome(held_out.indices, held_out.bad)

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the source, with the number of its training pairs, and `records.outcome` of the others."""
        return super().fingerprint() | {"samples": len(self), "data.holdout": self._outcome}


def training_part(specs: Iterable[str], opened: Iterable[Source], config: DataConfig) -> list[Source]:
    """Return the sources without the pairs that `config.holdout` holds out.

    Raises:
      UserError: none is held out, or no pair is left.
    """
    parts, held_out, total = [], 0, 0
    for spec, source in zip(specs, opened, strict=True):
        pairs = find(spec, source, config.holdout, config)
        held_out, total = held_out + len(pairs.indices), total + len(source)
        parts.append(TrainingPart(source, pairs))
    if not held_out or any(not len(part) for part in parts):
        what = "none" if not held_out else "all pairs of a source"
        raise UserError(
            f"data.holdout={config.holdout:g} holds out {what} of the {total} pairs of data.sources; "
            f"{'raise' if not held_out else 'lower'} it, set it to 0, or add pairs."
        )
    return parts


def selected(images: Sequence[Any], share: float) -> list[int]:
    """Return the positions of those of `images` that are held out; one that cannot be read is not."""
    positions = []
    for position in range(len(images)):
        with contextlib.suppress(BadSample):
            if is_held_out(image_hash(images[position]), share):
                positions.append(position)
    return positions
