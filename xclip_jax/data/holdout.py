"""The pairs that a run's training leaves out: held-out ones, `data.holdout`, and those listed in a file, `data.drop`.

A hash of the image's bytes decides what is held out. So all pairs with the same image are on the same side, whatever
the order, file, source, number of hosts and other pairs.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.console import show
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.core.storage import unreadable_as
from xclip_jax.data import records
from xclip_jax.data.base import Record, Source, WrappedSource, open_binary
from xclip_jax.data.config import DataConfig

_MANY = 100_000  # the reading of more pairs is announced
Dropped = Mapping[int, Mapping[str, int]]  # {record: {dropped caption: number of the record's captions}}


class Subset(WrappedSource):
    """The records `indices` of a source, in this order; its fingerprint is the whole source's, with `facts`."""

    def __init__(self, source: Source, indices: np.ndarray, dropped: Dropped | None = None, **facts: Any) -> None:
        super().__init__(source)
        self.indices = indices
        self._dropped = dropped or {}
        self._facts = facts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        record = self.source[int(self.indices[index])]
        dropped = self._dropped.get(int(self.indices[index]))
        if not dropped:
            return record
        kept = [i for i, caption in enumerate(record["text"]) if redact(caption) not in dropped]
        return record | {key: [record[key][i] for i in kept] for key in ("text", "columns") if key in record}

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self._facts

    def describe(self, index: int) -> dict[str, str]:
        return self.source.describe(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Some readable pairs of a source."""

    indices: np.ndarray  # numbers of the records, int (n,)
    captions: list[list[str]]  # of each record
    hashes: list[str]  # hexadecimal, of each image
    bad: int  # unreadable records in the whole source; they are not held out
    repeats: float  # share of readable records in the whole source whose captions all equal another record's


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
        _, counts = np.unique(np.array(captions_of), return_counts=True)
        _known[key] = Pairs(
            indices=np.array([index for index, _, _ in held], int),
            captions=[texts for _, texts, _ in held],
            hashes=[digits for _, _, digits in held],
            bad=len(source) - len(captions_of),
            repeats=float(counts[counts > 1].sum() / max(len(captions_of), 1)),
        )
    return _known[key]


def read_dropped(opened: Sequence[Source], config: DataConfig) -> list[Dropped]:
    """Return the captions of each source in the file `data.drop`; `UserError` if it lists another source's."""
    keys = [f"{source.fingerprint()['hash']}:{','.join(config.text_weights)}" for source in opened]
    found: dict[str, dict[int, dict[str, int]]] = {key: {} for key in keys}
    limit = config.drop_threshold
    fault = f"data.drop={config.drop!r} is no file by xclip-jax check SOURCE,text=COLUMN,... --suspects on data.sources"
    with unreadable_as(f"{fault}, {keys}"), open_binary(os.path.expanduser(config.drop)) as file:
        for line in map(json.loads, filter(bytes.strip, file)):
            captions = found[line["source"]]
            if not limit or line.get("probability", limit) < limit or line.get("cross_entropy", limit) > limit:
                captions.setdefault(line["index"], {})[line["caption"]] = line["captions"]
    return [found[key] for key in keys]


def training_part(specs: Iterable[str], opened: Iterable[Source], config: DataConfig) -> list[Source]:
    """Return the sources without held-out and dropped pairs; `UserError` if there are none, or none is left."""
    opened = list(opened)
    dropped = read_dropped(opened, config) if config.drop else [{}] * len(opened)
    parts: list[Source] = []
    for spec, source, captions in zip(specs, opened, dropped, strict=True):
        gone = [i for i, counts in captions.items() if len(counts) == max(counts.values())]
        listed = json.dumps(captions, sort_keys=True).encode()
        facts: dict[str, Any] = {"data.drop": image_hash(listed)} if captions else {}
        if config.holdout:  # of all pairs, so that runs with and without `data.drop` hold out the same
            held_out = find(spec, source, config.holdout, config)
            gone += held_out.indices.tolist()
            facts["data.holdout"] = records.reading_digest(held_out.indices, held_out.bad)
        indices = np.setdiff1d(np.arange(len(source)), gone)
        parts.append(Subset(source, indices, captions, samples=len(indices), **facts))
    total = sum(map(len, opened))
    left = sum(map(len, parts))
    if (left == total and not any(dropped)) or not all(map(len, parts)):
        raise UserError(
            f"data.holdout={config.holdout:g} and data.drop={config.drop!r} leave {left} of the {total} pairs of "
            "data.sources; each source needs some, and some must be left out. Change them or data.drop_threshold."
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
