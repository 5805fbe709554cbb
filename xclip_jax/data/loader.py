"""Training batches: a pure function of (sources, seed, batch number), so that a run can be resumed anywhere."""

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from xclip_jax.config.fields import Check, at_least, between, choice, key, not_empty
from xclip_jax.data import labelled, records, sources, transforms, workers
from xclip_jax.data.ledger import Entry, Ledger
from xclip_jax.data.preprocessing import Triple, mean_std
from xclip_jax.data.shared_memory import Slots
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.errors import BadSample, UserError
from xclip_jax.parallel.mesh import batch_sharding

Batch = dict[str, Any]

# A place for which so many draws from its source are bad is given up.
_DRAWS = 100
# Rows whose records are read one after another: between two images the code for it has left the processor's caches.
_TOGETHER = 32
# Batches of each worker that lie ready.
_READY = 2
# Batches that the loop holds: steps that were started may not have copied theirs yet.
_HELD = 4


def _knows_statistics(value: Any) -> bool:
    try:
        return bool(mean_std(value))
    except UserError:
        return False


_STATISTICS = Check(
    f"{', '.join(map(repr, transforms.STATISTICS))}, or mean and deviation by channel, ((r, g, b), (r, g, b))",
    _knows_statistics,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Config group `data`: what is read, how images and captions are drawn from it, and how fast."""

    sources: Sequence[str] = key((), "specs for `sources.open_source`, of fine-tuning `labelled.open_source`; mixed")
    weights: Sequence[float] = key((), "share of samples from each source; empty to see every sample once an epoch")
    apart: bool = key(
        False, "keep records of equal captions, wrong negatives of each other, apart; reads captions once at the start"
    )
    dir: str = key("", "root of TFDS data sets; empty for the default")
    batch: int = key(4096, "b, pairs of the global batch", at_least(1))
    tokenizer: str = key("clip", "clip, bytes or the path of a tokenizer file", not_empty())
    image_key: str = key("image", "feature of a record or column of a table; not of tars and folders")
    text_keys: Sequence[str] = key(
        ("text",), "captions, one of which is drawn each time; in tars text is the .txt file, else fields of .json"
    )
    tags_key: str = key("", "keywords of a record; empty for none")
    tags: int = key(0, "at most so many keywords, in random order, go into a caption", at_least(0))
    tags_behind: float = key(0.5, "share of captions with keywords behind them", between(0, 1))
    tags_alone: float = key(0.0, "share of captions that are keywords alone", between(0, 1))
    crop_scale: tuple[float, float] = key((0.5, 1.0), "smallest and largest area of a training crop over the image's")
    resample: str = key("area", "how a crop is resized; area is the fast one", choice(transforms.RESAMPLE))
    flip: float = key(0.0, "probability of a horizontal flip", between(0, 1))
    color: float = key(0.0, "strength of random brightness, contrast and saturation", between(0, 1))
    statistics: str | tuple[Triple, Triple] = key(
        "imagenet", "name of mean and deviation of pixels, or both by channel, ((r, g, b), (r, g, b))", _STATISTICS
    )
    cache: bool = key(False, "keep decoded images in memory")
    threads: int = key(16, "batches that this process reads at once, where workers is 0", at_least(1))
    buffer: int = key(8, "batches that are read ahead, where workers is 0", at_least(1))
    workers: int = key(0, "reading processes, one thread each; for buckets several a core", at_least(0))
    max_bad: float = key(0.05, "a larger share of samples that cannot be used stops the run", between(0, 1))

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            yield f"crop_scale is {self.crop_scale}; expected 0 < smallest <= largest <= 1"
        if self.weights and len(self.weights) != len(self.sources):
            yield (
                f"weights has {len(self.weights)} values for {len(self.sources)} sources; give one for each, or "
                "none for shares by size"
            )
        if any(weight <= 0 for weight in self.weights):
            yield f"weights is {self.weights}; expected values above 0, and sources without a share left out"
        if self.cache and self.workers:
            yield (
                f"cache with data.workers={self.workers} would keep {self.workers} copies of all decoded images; set "
                "data.workers=0 (data.threads share one copy) or data.cache=False"
            )
        if self.tags_behind + self.tags_alone > 1:
            yield f"tags_behind {self.tags_behind} and tags_alone {self.tags_alone} must not exceed 1 together"


def open_sources(config: DataConfig, classes: int = 0, fields: Sequence[str] | None = None) -> list[sources.Source]:
    """Open the sources of `config`.

    Args:
      config: says which, and is checked.
      classes: of labelled sources; 0 for pairs.
      fields: what the batches of training will have, of "image", "text" and "label"; None where nothing is trained.

    Raises:
      UserError: a source that cannot be opened, keys that contradict each other, labelled sources that do not fit
        `classes`, `fields` or each other, and for training fewer pairs than a batch has.
    """
    if not config.sources:
        raise UserError("data.sources is empty; name a source such as folder:PATH or tfds:NAME/SPLIT.")
    if classes:
        if config.apart:
            raise UserError("data.apart compares captions, and labelled items have none: set data.apart to False.")
        opened = labelled.open_sources(config.sources, config.dir, classes, fields)
        return [sources.Decoded(source) if config.cache and source.key == "image" else source for source in opened]
    options = {"data_dir": config.dir, "image_key": config.image_key, "text_keys": config.text_keys}
    opened = [sources.open_source(spec, tags_key=config.tags_key, **options) for spec in config.sources]
    if fields is not None and config.batch > (pairs := sum(map(len, opened))):
        raise UserError(
            f"data.batch={config.batch} exceeds the {pairs} pairs of data.sources: a batch would hold pairs several "
            f"times, as their own negatives. Set data.batch to at most {pairs}, or add pairs."
        )
    return [sources.Decoded(source) for source in opened] if config.cache else opened


@dataclasses.dataclass(frozen=True)
class Transform:
    """Writes the image of a record to uint8 (size, size, 3) and returns a caption, random through `rng` alone.

    `fields` says what batches are made of, of "image", "text" and "label"; without "image" nothing is written, without
    "text" the caption is "".
    """

    config: DataConfig
    size: int
    tokenizer: Tokenizer
    length: int
    fields: tuple[str, ...] = ("image", "text")

    def __call__(self, record: sources.Record, rng: np.random.Generator, out: np.ndarray) -> str:
        if "image" in self.fields:
            self._crop(record, rng, out)
        return self.caption(record, rng) if "text" in self.fields else ""

    def _crop(self, record: sources.Record, rng: np.random.Generator, out: np.ndarray) -> None:
        config, scale = self.config, self.config.crop_scale
        # So large that a square crop, even the smallest, is not enlarged.
        exact = config.resample != "area"
        image = transforms.decode(record["image"], scaled_to=0 if exact else math.ceil(self.size / scale[0] ** 0.5))
        transforms.random_resized_crop(image, self.size, rng, scale, resample=config.resample, out=out)

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


class _Apart:
    """Index of the record at each place, (place, _) -> int: in every epoch another shuffle of the records.

    The m records of a group come an m-th of an epoch apart, from a random time on and in random order; that of a record
    alone is any time. The last of an epoch and the first of the next may be near each other.
    """

    def __init__(self, groups: np.ndarray, seed: int) -> None:
        self.groups, self.seed = groups, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, place: int, _: Any = None) -> int:
        epoch, at = divmod(place, len(self.groups))
        order = self._epochs.get(epoch)
        if order is None:
            order = self._order(epoch)
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1} | {epoch: order}
        return int(order[at])

    def _order(self, epoch: int) -> np.ndarray:
        n, rng = len(self.groups), np.random.default_rng((self.seed, epoch))
        sizes = np.bincount(self.groups)
        shuffled = rng.permutation(n)
        grouped = shuffled[np.argsort(self.groups[shuffled], kind="stable")]
        group = self.groups[grouped]
        turn = np.arange(n) - (np.cumsum(sizes) - sizes)[group]
        return grouped[np.argsort((turn + rng.random(len(sizes))[group]) / sizes[group])]


def _by_captions(found: Sequence[sources.Source]) -> np.ndarray:
    """Number of the group of records with the same captions, int (n,), of all records of `found`."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = []
    for source in found:
        for index in range(len(source)):
            record = records.read(source, index)
            key = ("", str(len(groups))) if isinstance(record, BadSample) else tuple(record["text"])  # "": nobody's
            groups.append(numbers.setdefault(key, len(numbers)))
    return np.array(groups)


def sample_order(found: Sequence[sources.Source], config: DataConfig, seed: int) -> Order:
    """All samples shuffled anew in each epoch; with weights each source by itself, and then mixed.

    Weights hold to a hundredth of the smallest, and each source has epochs of its own. See `DataConfig.apart`.
    """

    def shuffled(parts: Sequence[sources.Source], seed: int) -> grain.MapDataset:
        places = grain.MapDataset.range(sum(map(len, parts)))
        if config.apart:
            return places.repeat().map_with_index(_Apart(_by_captions(parts), seed))
        return places.shuffle(seed=seed).repeat()

    if config.weights and len(found) > 1:
        orders = [
            shuffled([source], seed + number).map(lambda index, number=number: (number, int(index)))
            for number, source in enumerate(found)
        ]
        return Order(found, grain.MapDataset.mix(orders, list(config.weights)))
    starts = list(itertools.accumulate(map(len, found), initial=0))

    def place(index: int) -> tuple[int, int]:
        number = bisect.bisect_right(starts, index) - 1
        return number, int(index) - starts[number]

    return Order(found, shuffled(found, seed).map(place))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Number of a global batch -> this host's rows of it, a pure function of the number.

    Attributes:
      order, transform: what is read, and what becomes of it.
      batch, host, hosts: rows of the global batch, and which of them.
      rngs: a generator for each place of the run.
      slots: memory of the workers, where there are any.
      start: number of the first batch.
    """

    order: Order
    transform: Transform
    batch: int
    host: int
    hosts: int
    rngs: grain.experimental.RngPool
    slots: Slots | None
    start: int

    @property
    def spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shapes and types of a batch."""
        rows, size = self.batch // self.hosts, self.transform.size
        found = {
            "image": ((rows, size, size, 3), np.uint8),
            "text": ((rows, self.transform.length), np.int32),
            "label": ((rows,), np.float32),
        }
        return {field: found[field] for field in self.transform.fields}

    def __call__(self, g: int) -> dict[str, Any]:
        worker, taken = 0, None
        if self.slots:
            worker = (g - self.start) % self.transform.config.workers  # as Grain deals them out
            taken = self.slots.take(worker)
        found = taken[1] if taken else {key: np.empty(shape, dtype) for key, (shape, dtype) in self.spec.items()}
        rows = self.batch // self.hosts
        first, captions, bad = g * self.batch + self.host * rows, [], []
        for row in range(0, rows, _TOGETHER):
            positions = range(first + row, first + min(row + _TOGETHER, rows))
            places = [self.order.places[position] for position in positions]
            read = [records.read(self.order.found[number], index) for number, index in places]
            rngs = [self.rngs.acquire_rng(position) for position in positions]
            for position, place, record, rng in zip(positions, places, read, rngs, strict=True):
                # Views of the row, into which its image and label go.
                at = position - first
                out = {key: found[key][at : at + 1] for key in found if key != "text"}
                captions.append(self._fill(position, *place, record, rng, out, bad))
                self.rngs.release_rng(rng)
        if "text" in found:
            found["text"][:] = self.transform.tokenizer(captions, self.transform.length)
        noted = json.dumps(bad).encode()  # bytes, which Grain passes on as they are
        return {"slot": (worker, taken[0]), "bad": noted} if taken else found | {"bad": noted}

    def _fill(
        self,
        position: int,
        number: int,
        index: int,
        record: sources.Record | BadSample,
        rng: np.random.Generator,
        out: dict[str, np.ndarray],
        bad: list[Entry],
    ) -> str:
        """Writes image and label of a record to `out` and returns a caption. For a bad one others are drawn."""
        source = self.order.found[number]
        for _ in range(_DRAWS):
            try:
                if isinstance(record, BadSample):
                    raise record
                caption = self.transform(record, rng, out["image"][0] if "image" in out else None)
                if "label" in out:
                    out["label"][0] = record["label"]
                return caption
            except Exception as error:
                reason = records.as_bad_sample(error)
                entry = {"position": position, "reason": reason.reason, "detail": reason.detail}
                bad.append(entry | {"source": number, "index": index} | sources.where(source, index))
            index = int(rng.integers(len(source)))
            record = records.read(source, index)
        bad[-1]["last"] = _DRAWS  # `Ledger.add` stops the run, where its error is not lost in a worker process
        for row in out.values():
            row[:] = 0
        return ""


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
    global batches are the same on any number of hosts and from any start. Processes that hold the same rows count as
    one host, see `mesh.batch_part`. A bad sample is replaced by another of its source, which too depends on nothing but
    the seed and the place.

    Raises:
      UserError: a bad sample, where no `ledger` takes note of it; a place for which nothing could be found; too little
        memory for the workers.
    """
    config = transform.config
    reader = _Reader(order, transform, batch, host, hosts, grain.experimental.RngPool(seed), None, start)
    if config.workers:
        # Those that lie ready, one that is written, and the worker's share of those that are on their way to devices.
        depth = _READY + 1 + math.ceil(_HELD / config.workers)
        reader = dataclasses.replace(reader, slots=Slots(reader.spec, config.workers, depth))
    # Elements are batches here: so many are read at once, and lie ready.
    options = grain.ReadOptions(0, 0) if config.workers else grain.ReadOptions(config.threads, config.buffer)
    dataset = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if config.workers:
        processes = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=_READY)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=workers.prepare)
    return _noted(iter(dataset), reader, ledger)


def _noted(
    read: grain.DatasetIterator[dict[str, Any]], reader: _Reader, ledger: Ledger | None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches without what was bad in them, which goes to the ledger with the number of tokens."""
    try:
        for g, found in enumerate(workers.shielded(read) if reader.slots else read, reader.start):
            bad = json.loads(found.pop("bad"))
            if "slot" in found:
                found = reader.slots.open(*found["slot"])
            if ledger is not None:
                ends = found.get("text", np.zeros((0, 1))) == reader.transform.tokenizer.eot_id
                tokens = int((ends.argmax(axis=1) + 1).sum())
                ledger.add((g + 1) * reader.batch, tokens, bad, reader.host)
            elif bad:
                raise UserError(f"sample {bad[0]} cannot be used.")
            yield found
    finally:
        read.close()  # else worker processes live as long as this one


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows -> arrays of the global batch, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
