"""Parts of a run's sources: held-out pairs, `data.holdout`.

A pair is held out by a hash of its image's bytes. So it stays on its side in any order, file, source or company and on
any number of hosts, and all pairs with one image are on one side.
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

_MANY = 100_000  # for more pairs, a line announces that they are read


class Subset(WrappedSource):
    """The records `indices` of a source, in this order. It has the fingerprint of the whole source."""

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
    """Some readable pairs of a source: `indices` of the records, int (n,), captions, and hexadecimal image hashes.

    `bad` is the number of the source's records that cannot be read, which are not held out, and `repeats` the share of
    its readable records whose captions another one has too, each of them.
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
    """Whether an image with this hash belongs to the `share` that is held out."""
    return int(digits, 16) < share * 2**64


_known: dict[str, Pairs] = {}  # training, evaluation and report of one process need the same pairs


def find(spec: str, source: Source, share: float, config: DataConfig) -> Pairs:
    """Return the held-out pairs of the source that `spec` names, all of them if the share is 1; reads all records."""
    key = json.dumps([spec, share, config.image_column, config.text_columns, source.fingerprint()], default=str)
    if key not in _known:
        if len(source) > _MANY:
            # Not log0: the processes of a run may not have joined yet.
            line = f"reading the {len(source):,} pairs of {spec} to find those that are held out or evaluated"
            show(line, sys.stderr)

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
        captions, hashes = [texts for _, texts, _ in held], [digits for *_, digits in held]
        bad = len(source) - len(captions_of)
        repeats = records.repeated_share(np.array(captions_of))
        _known[key] = Pairs(np.array([i for i, *_ in held], int), captions, hashes, bad, repeats)
    return _known[key]


class TrainingPart(Subset):
    """The pairs of a source that are not held out. Its fingerprint has a digest of the held-out ones too."""

    def __init__(self, source: Source, held_out: Pairs) -> None:
        super().__init__(source, np.setdiff1d(np.arange(len(source)), held_out.indices))
        self._outcome = records.reading_digest(held_out.indices, held_out.bad)

    def fingerprint(self) -> dict[str, Any]:
        """Return the source's fingerprint with the number of training pairs, and a digest of the others."""
        return super().fingerprint() | {"samples": len(self), "data.holdout": self._outcome}


def training_part(specs: Iterable[str], opened: Iterable[Source], config: DataConfig) -> list[Source]:
    """Return the sources without the held-out pairs, or raise `UserError` if no pair is held out, or none is left."""
    parts, held_out, total = [], 0, 0
    for spec, source in zip(specs, opened, strict=True):
        pairs = find(spec, source, config.holdout, config)
        held_out += len(pairs.indices)
        total += len(source)
        parts.append(TrainingPart(source, pairs))
    if not held_out or any(not len(part) for part in parts):
        what = "none" if not held_out else "all pairs of a source"
        raise UserError(
            f"data.holdout={config.holdout:g} holds out {what} of the {total} pairs of data.sources; "
            f"{'raise' if not held_out else 'lower'} it, set it to 0, or add pairs."
        )
    return parts


def selected(images: Sequence[Any], share: float) -> list[int]:
    """Return the positions of the `images` that are held out; unreadable images are not."""
    positions = []
    for position in range(len(images)):
        with contextlib.suppress(BadSample):
            if is_held_out(image_hash(images[position]), share):
                positions.append(position)
    return positions
