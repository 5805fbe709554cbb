"""Measures a few samples of training data, for the command check and the recipe small."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from xclip_jax.core.errors import BadSample
from xclip_jax.data import holdout, images, records, transforms
from xclip_jax.data.base import Record, Source

FEWEST = 8  # pairs required by the recipe small


@dataclasses.dataclass
class Sample:
    """Statistics of one image-text pair; `reason` is "" unless it is bad."""

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    captions: tuple[str, ...] = ()
    index: int = -1


def read(source: Source, indices: Sequence[int], threads: int, size: int) -> tuple[list[Sample], float]:
    """Read pairs and crop their images to `size`; return the samples and the elapsed seconds."""

    def examine(record: Record) -> Sample:
        pixels = images.decode(record["image"])
        height, width = pixels.shape[:2]
        digest = holdout.image_hash(record["image"])
        transforms.random_resized_crop(pixels, size, np.random.default_rng(int(digest, 16)), resample="area")
        return Sample(size=(width, height), digest=digest, captions=tuple(record["text"]))

    began = time.perf_counter()
    results = records.read_each(((source, index) for index in indices), examine, threads=threads)
    samples = [Sample(x.reason, x.detail) if isinstance(x, BadSample) else x for x in results]
    for index, sample in zip(indices, samples, strict=True):
        sample.index = index
    return samples, time.perf_counter() - began
