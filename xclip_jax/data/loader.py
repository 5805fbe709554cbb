"""Training batches: a pure function of (sources, seed, batch number), so that a run can be resumed anywhere."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from xclip_jax.data import sources, transforms
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.errors import UserError
from xclip_jax.parallel.mesh import batch_sharding

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Group `data` of a config.

    Attributes:
      sources: specs for `sources.open_source`; several are mixed.
      weights: share of samples from each source; empty for shares by size.
      dir: where TFDS data sets lie; "" for the default.
      batch: b, pairs in the global batch.
      tokenizer: "clip", "bytes" or the path of a tokenizer file.
      image_key, text_keys, tags_key: features of a TFDS record.
      tags: at most so many keywords, in random order, go into one caption; 0 for none.
      tags_behind, tags_alone: share of captions with keywords behind them, and of keywords in place of a caption.
      crop_scale: range of the training crop's share of the image.
      flip, color: see `transforms.augment`.
      statistics: channel means and deviations, a key of `transforms.STATISTICS`.
      cache: keep decoded images in memory.
      threads, buffer: samples read at once and ahead, in this process, where `workers` is 0.
      workers: reading processes; 0 for threads of this one.
    """

    sources: Sequence[str]
    weights: Sequence[float] = ()
    dir: str = ""
    batch: int = 256
    tokenizer: str = "clip"
    image_key: str = "image"
    text_keys: Sequence[str] = ("text",)
    tags_key: str = ""
    tags: int = 0
    tags_behind: float = 0.5
    tags_alone: float = 0.0
    crop_scale: Sequence[float] = (0.5, 1.0)
    flip: float = 0.0
    color: float = 0.0
    statistics: str = "clip"
    cache: bool = False
    threads: int = 4
    buffer: int = 8
    workers: int = 0


def open_sources(config: DataConfig) -> list[sources.Source]:
    """The sources of `config`, checked against its weights."""
    if not config.sources:
        raise UserError("data.sources is empty; name a source such as folder:PATH or tfds:NAME/SPLIT.")
    if config.weights and len(config.weights) != len(config.sources):
        raise UserError(
            f"data.weights has {len(config.weights)} values for {len(config.sources)} sources; give one for each, "
            "or none for shares by size."
        )
    options = {"data_dir": config.dir, "image_key": config.image_key, "text_keys": config.text_keys}
    found = [sources.open_source(spec, tags_key=config.tags_key, **options) for spec in config.sources]
    return [sources.Decoded(source) for source in found] if config.cache else found


@dataclasses.dataclass(frozen=True)
class Transform:
    """Record -> {"image": uint8 (size, size, 3), "text": int32 (length,)}, random through `rng` alone."""

    config: DataConfig
    size: int
    tokenizer: Tokenizer
    length: int

    def __call__(self, record: sources.Record, rng: np.random.Generator) -> Batch:
        image = transforms.decode(record["image"])
        image = transforms.random_resized_crop(image, self.size, rng, tuple(self.config.crop_scale))
        return {"image": image, "text": self.tokenizer([self.caption(record, rng)], self.length)[0]}

    def caption(self, record: sources.Record, rng: np.random.Generator) -> str:
        """One of the captions, keywords, or both."""
        text = record["text"][rng.integers(len(record["text"]))]
        tags = [tag for tag in record["tags"] if tag != text]
        draw = rng.random()
        if not (tags and self.config.tags) or draw >= self.config.tags_behind + self.config.tags_alone:
            return text
        chosen = rng.permutation(tags)[: rng.integers(1, self.config.tags + 1)]
        return ", ".join(chosen if draw < self.config.tags_alone else [text, *chosen])


def sample_order(found: Sequence[sources.Source], config: DataConfig, seed: int) -> grain.MapDataset:
    """All samples of a run, without end: each source shuffled anew in each of its epochs, mixed by weight.

    Element i is the record at place i of the run; it depends on nothing but `seed` and i.
    """
    orders = [
        grain.MapDataset.source(source).shuffle(seed=seed + i).repeat() for i, source in enumerate(found)
    ]
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, list(config.weights) or [float(len(source)) for source in found])


def batches(
    order: grain.MapDataset,
    transform: Transform,
    *,
    batch: int,
    start: int,
    stop: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's rows of the global batches number `start` to `stop` - 1.

    Row r of global batch g is sample g * batch + r of the run, and host h holds rows h * batch / hosts and up: the
    global batches are the same on any number of hosts and from any start.
    """
    rows = batch // hosts
    samples = order.random_map(transform, seed=seed)
    config = transform.config

    def sample(index: int) -> Batch:
        g, row = divmod(index, rows)
        return samples[(start + g) * batch + host * rows + row]

    local = grain.MapDataset.range((stop - start) * rows).map(sample).batch(rows)
    # Elements are batches here: so many are read at once, and lie ready.
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.buffer)
    if config.workers:
        workers = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=2)
        return iter(local.to_iter_dataset(options).mp_prefetch(workers))
    return iter(local.to_iter_dataset(options))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows -> arrays of the global batch, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
