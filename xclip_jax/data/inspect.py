"""Measures a few samples of training data, for the command check, the recipe small and the doctor."""

import contextlib
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from xclip_jax.core.errors import BadSample
from xclip_jax.data import images, loader, records, transforms
from xclip_jax.data.base import Record, Source
from xclip_jax.data.ledger import BadSampleLog

FEWEST = 8  # pairs required by the recipe small
_BATCH = 32  # rows of the batches of `read_batches`: few, so that every thread soon finishes one
_PATIENCE = 10  # `read_batches` ends after this multiple of its seconds, even with fewer samples


@dataclasses.dataclass
class Sample:
    """Statistics of one image-text pair; `reason` is "" unless it is bad."""

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    file_bytes: int = 0
    digest: bytes = b""
    captions: tuple[str, ...] = ()
    index: int = -1


@dataclasses.dataclass(frozen=True)
class LoaderSample:
    """Statistics of a run's first samples, read by its loader.

    Attributes:
      read: number of samples.
      speed: samples/s once all threads are busy.
      bad: bad samples by reason.
      example: the ledger's line about the first bad sample, or "".
      text: tokens, int32 (rows, n), or None.
    """

    read: int
    speed: float
    bad: Mapping[str, int]
    example: str
    text: np.ndarray | None


def read(source: Source, indices: Sequence[int], threads: int, size: int) -> tuple[list[Sample], float]:
    """Read pairs and crop their images to `size`; return the samples and the elapsed seconds."""

    def examine(record: Record) -> Sample:
        image = record["image"]
        data = image if isinstance(image, bytes) else image.tobytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        # At full size, which is reported; training decodes large JPEGs at half of it or less.
        pixels = images.decode(image)
        height, width = pixels.shape[:2]
        transforms.random_resized_crop(pixels, size, np.random.default_rng(list(digest)), resample="area")
        return Sample("", "", (width, height), len(data), digest, tuple(record["text"]))

    began = time.perf_counter()
    results = records.read_each(((source, index) for index in indices), examine, threads=threads)
    samples = [Sample(x.reason, x.detail) if isinstance(x, BadSample) else x for x in results]
    for index, sample in zip(indices, samples, strict=True):
        sample.index = index
    return samples, time.perf_counter() - began


def read_batches(
    sources: Sequence[Source], transform: loader.Transform, seed: int, *, samples: int, seconds: float
) -> LoaderSample:
    """Read samples with a run's threads, but in smaller batches and without spreading equal captions.

    Reads at least `samples`, and for at least `seconds` once all threads are busy.

    Raises:
      UserError: no usable sample for a position, or an error that affects more than a sample.
    """
    data = dataclasses.replace(transform.config, spread_duplicate_captions=False)
    rows = min(data.batch, _BATCH)
    busy = data.threads + loader.BUFFER
    order = loader.sample_order(sources, data, seed)
    with tempfile.TemporaryDirectory() as scratch:
        ledger = BadSampleLog(epath.Path(scratch), max_bad_fraction=1.0)
        batches = loader.batches(order, transform, batch=rows, start=0, stop=1 << 30, seed=seed, ledger=ledger)
        began = start = time.perf_counter()
        first, texts, count = 0, [], 0
        with contextlib.closing(batches):
            for count, batch in enumerate(batches, 1):
                now = time.perf_counter()
                if "text" in batch and len(texts) * rows < samples:
                    texts.append(np.array(batch["text"]))
                # The first batches, during which the threads start, do not count unless they take long.
                if count == busy and now - began < seconds:
                    start, first = now, count
                enough = count * rows >= samples and count > first and now - start >= seconds
                if enough or now - began > _PATIENCE * seconds > 0:
                    break
            elapsed = time.perf_counter() - start
        ledger.sync(count * rows)
        ledger.file.close()
        lines = ledger.path.read_text().splitlines() if ledger.path.exists() else []
    speed = (count - first) * rows / elapsed
    text = np.concatenate(texts) if texts else None
    return LoaderSample(count * rows, speed, ledger.counters["bad"], lines[0] if lines else "", text)
