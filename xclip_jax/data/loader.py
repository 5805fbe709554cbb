"""Training batches: a pure function of (sources, seed, batch number), so that a run can be resumed anywhere."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from xclip_jax.data import labelled, sources, transforms
from xclip_jax.data.ledger import Ledger
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.errors import BadSample, UserError
from xclip_jax.parallel.mesh import batch_sharding

Batch = dict[str, Any]

# A place for which so many draws from its source are bad is given up.
_DRAWS = 100


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Group `data` of a config.

    Attributes:
      sources: specs for `sources.open_source`, of fine-tuning for `labelled.open_source`; several are mixed.
      weights: share of samples from each source; empty for shares by size.
      dir: where TFDS data sets lie; "" for the default.
      batch: b, pairs in the global batch.
      tokenizer: "clip", "bytes" or the path of a tokenizer file.
      image_key, text_keys, tags_key: features of a record or columns of a table; in tars "text" is the .txt file, other
        keys are fields of the .json file. One of the captions is drawn each time.
      tags: at most so many keywords, in random order, go into one caption; 0 for none.
      tags_behind, tags_alone: share of captions with keywords behind them, and of keywords in place of a caption.
      crop_scale: range of the training crop's share of the image.
      resample: how the crop is resized, see `transforms.random_resized_crop`; "area" is the fast one.
      flip, color: see `transforms.augment`.
      statistics: channel means and deviations, a key of `transforms.STATISTICS`.
      cache: keep decoded images in memory.
      threads, buffer: samples read at once and ahead, in this process, where `workers` is 0.
      workers: reading processes; 0 for threads of this one.
      max_bad: a larger share of samples that cannot be used stops the run.
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
    resample: str = "bicubic"
    flip: float = 0.0
    color: float = 0.0
    statistics: str = "clip"
    cache: bool = False
    threads: int = 4
    buffer: int = 8
    workers: int = 0
    max_bad: float = 0.05


def open_sources(config: DataConfig, classes: int = 0) -> list[sources.Source]:
    """The sources of `config`, checked against its weights; with `classes`, labelled ones of so many classes."""
    if not config.sources:
        raise UserError("data.sources is empty; name a source such as folder:PATH or tfds:NAME/SPLIT.")
    if config.weights and len(config.weights) != len(config.sources):
        raise UserError(
            f"data.weights has {len(config.weights)} values for {len(config.sources)} sources; give one for each, "
            "or none for shares by size."
        )
    if classes:
        found = [labelled.open_source(spec, config.dir) for spec in config.sources]
        for spec, source in zip(config.sources, found, strict=True):
            if len(source.names or ["a number"]) != classes:
                raise UserError(
                    f"source {spec!r} has {len(source.names)} classes and objective.classify.classes is {classes}; "
                    "make them equal (1 for labels that are numbers)."
                )
        return [sources.Decoded(source) if config.cache and source.key == "image" else source for source in found]
    options = {"data_dir": config.dir, "image_key": config.image_key, "text_keys": config.text_keys}
    found = [sources.open_source(spec, tags_key=config.tags_key, **options) for spec in config.sources]
    return [sources.Decoded(source) for source in found] if config.cache else found


@dataclasses.dataclass(frozen=True)
class Transform:
    """Record -> {"image": uint8 (size, size, 3), "text": int32 (length,), "label": int32 or fp32 ()}.

    Random through `rng` alone. `fields` says which of the three are made.
    """

    config: DataConfig
    size: int
    tokenizer: Tokenizer
    length: int
    fields: tuple[str, ...] = ("image", "text")

    def __call__(self, record: sources.Record, rng: np.random.Generator) -> Batch:
        return {field: getattr(self, field)(record, rng) for field in self.fields}

    def image(self, record: sources.Record, rng: np.random.Generator) -> np.ndarray:
        """A random crop."""
        config, scale = self.config, tuple(self.config.crop_scale)
        # So large that a square crop, even the smallest, is not enlarged.
        exact = config.resample != "area"
        image = transforms.decode(record["image"], scaled_to=0 if exact else math.ceil(self.size / scale[0] ** 0.5))
        return transforms.random_resized_crop(image, self.size, rng, scale, resample=config.resample)

    def text(self, record: sources.Record, rng: np.random.Generator) -> np.ndarray:
        """Token ids of a caption."""
        return self.tokenizer([self.caption(record, rng)], self.length)[0]

    def label(self, record: sources.Record, rng: np.random.Generator) -> np.ndarray:
        """The label."""
        del rng
        label = np.asarray(record["label"])
        return label.astype(np.float32 if label.dtype.kind == "f" else np.int32)

    def nothing(self) -> Batch:
        """In place of a record that could not be found."""
        empty = {
            "image": np.zeros((self.size, self.size, 3), np.uint8),
            "text": np.zeros(self.length, np.int32),
            "label": np.zeros((), np.int32),
        }
        return {field: empty[field] for field in self.fields}

    def caption(self, record: sources.Record, rng: np.random.Generator) -> str:
        """One of the captions, keywords, or both."""
        text = record["text"][rng.integers(len(record["text"]))]
        tags = [tag for tag in record["tags"] if tag != text]
        draw = rng.random()
        if not (tags and self.config.tags) or draw >= self.config.tags_behind + self.config.tags_alone:
            return text
        chosen = rng.permutation(tags)[: rng.integers(1, self.config.tags + 1)]
        return ", ".join(chosen if draw < self.config.tags_alone else [text, *chosen])


@dataclasses.dataclass(frozen=True)
class Order:
    """All samples of a run, without end. Item i is the record at place i of the run.

    Attributes:
      found: the sources.
      places: element i is (number of the source, index in it); it depends on nothing but the seed and i.
    """

    found: Sequence[sources.Source]
    places: grain.MapDataset

    def __getitem__(self, place: int) -> sources.Record:
        number, index = self.places[place]
        return self.found[number][index]


def sample_order(found: Sequence[sources.Source], config: DataConfig, seed: int) -> Order:
    """Each source shuffled anew in each of its epochs, mixed by weight."""

    def places(number: int, source: sources.Source) -> grain.MapDataset:
        shuffled = grain.MapDataset.range(len(source)).shuffle(seed=seed + number).repeat()
        return shuffled.map(lambda index: (number, int(index)))

    orders = [places(number, source) for number, source in enumerate(found)]
    if len(orders) > 1:
        weights = list(config.weights) or [float(len(source)) for source in found]
        return Order(found, grain.MapDataset.mix(orders, weights))
    return Order(found, orders[0])


@dataclasses.dataclass(frozen=True)
class _Reader:
    """(place in the run, (source, index)) -> row. For a bad sample others of its source are drawn, through `rng`."""

    found: Sequence[sources.Source]
    transform: Transform

    def __call__(self, place: tuple[int, tuple[int, int]], rng: np.random.Generator) -> Batch:
        position, (number, index) = place
        source, bad = self.found[number], []
        while len(bad) < _DRAWS:
            try:
                return self.transform(source[index], rng) | {"bad": bad}
            except BadSample as error:
                entry = {"position": position, "reason": error.reason, "detail": error.detail}
                bad.append(entry | {"source": number, "index": index} | sources.where(source, index))
            index = int(rng.integers(len(source)))
        bad[-1]["last"] = _DRAWS  # `Ledger.add` stops the run, where its error is not lost in a worker process
        return self.transform.nothing() | {"bad": bad}


def _stack(rows: Sequence[Batch]) -> Batch:
    """Rows -> arrays; what was bad as JSON in bytes, since worker processes send arrays."""
    bad = json.dumps([entry for row in rows for entry in row["bad"]]).encode()
    fields = [key for key in rows[0] if key != "bad"]
    return {key: np.stack([row[key] for row in rows]) for key in fields} | {"bad": np.frombuffer(bad, np.uint8)}


def batches(
    order: Order,
    transform: Transform,
    *,
    batch: int,
    start: int,
    stop: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    ledger: Ledger | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's rows of the global batches number `start` to `stop` - 1: what the transform's `fields` say.

    Row r of global batch g is sample g * batch + r of the run, and host h holds rows h * batch / hosts and up: the
    global batches are the same on any number of hosts and from any start. A bad sample is replaced by another of its
    source, which too depends on nothing but the seed and the place.

    Raises:
      UserError: a bad sample, where no `ledger` takes note of it; a place for which nothing could be found.
    """
    rows = batch // hosts
    numbered = order.places.map_with_index(lambda position, place: (int(position), place))
    samples = numbered.random_map(_Reader(order.found, transform), seed=seed)
    config = transform.config

    def sample(index: int) -> Batch:
        g, row = divmod(index, rows)
        return samples[(start + g) * batch + host * rows + row]

    local = grain.MapDataset.range((stop - start) * rows).map(sample).batch(rows, batch_fn=_stack)
    # Elements are batches here: so many are read at once, and lie ready.
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.buffer)
    dataset = local.to_iter_dataset(options)
    if config.workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=2))
    return _noted(iter(dataset), transform.tokenizer.eot_id, batch, start, ledger)


def _noted(
    read: Iterator[Batch], eot: int, batch: int, start: int, ledger: Ledger | None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches without what was bad in them, which goes to the ledger with the number of tokens."""
    for g, found in enumerate(read, start):
        bad = json.loads(found.pop("bad").tobytes())
        if ledger is not None:
            tokens = int(((found["text"] == eot).argmax(axis=1) + 1).sum()) if "text" in found else 0
            ledger.add((g + 1) * batch, tokens, bad)
        elif bad:
            raise UserError(f"sample {bad[0]} cannot be used.")
        yield found


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows -> arrays of the global batch, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
