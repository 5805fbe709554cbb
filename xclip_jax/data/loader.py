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

from xclip_jax.data import labelled, records, sources, transforms, workers
from xclip_jax.data.config import DataConfig
from xclip_jax.data.ledger import Entry, Ledger
from xclip_jax.data.shared_memory import Slots
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.errors import BadSample, UserError
from xclip_jax.parallel.mesh import batch_sharding

Batch = dict[str, Any]

# A position is given up, and the run stops, after this many bad samples in its place.
MAX_RESAMPLES = 100
# Rows whose records are read in a row, before their images are decoded: alternating would empty the processor's caches.
READ_GROUP = 32
# Finished batches that each worker keeps.
WORKER_BUFFER = 2
# Batches that the loop holds: steps that were dispatched may not have copied theirs yet.
IN_FLIGHT = 4


def open_sources(config: DataConfig, classes: int = 0, fields: Sequence[str] | None = None) -> list[sources.Source]:
    """Open the sources of `config`.

    Args:
      config: names them.
      classes: number of classes of labelled sources; 0 for pairs.
      fields: those of training batches, of "image", "text" and "label"; None where nothing is trained.

    Raises:
      UserError: a source that cannot be opened, keys that contradict each other, labelled sources that do not fit
        `classes`, `fields` or each other, and for training fewer pairs than a batch has.
    """
    if not config.sources:
        raise UserError("data.sources is empty; name a source such as folder:PATH or tfds:NAME/SPLIT.")
    if classes:
        if config.spread_duplicate_captions:
            raise UserError(
                "data.spread_duplicate_captions compares captions, and labelled items have none: set it to False."
            )
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

    `fields` are those of a batch, of "image", "text" and "label"; without "image" nothing is written, without "text"
    the caption is "".
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
        # Large enough that not even the smallest square crop is enlarged.
        exact = config.resample != "area"
        image = transforms.decode(record["image"], scaled_to=0 if exact else math.ceil(self.size / scale[0] ** 0.5))
        transforms.random_resized_crop(image, self.size, rng, scale, resample=config.resample, out=out)

    def caption(self, record: sources.Record, rng: np.random.Generator) -> str:
        """One of the captions, keywords, or both."""
        text = record["text"][rng.integers(len(record["text"]))]
        tags = [tag for tag in record["tags"] if tag != text]
        draw = rng.random()
        if not (tags and self.config.tags) or draw >= self.config.tags_append_prob + self.config.tags_only_prob:
            return text
        chosen = rng.permutation(tags)[: rng.integers(1, self.config.tags + 1)]
        return ", ".join(chosen if draw < self.config.tags_only_prob else [text, *chosen])


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """All samples of a run, an endless sequence. Item i is the record at position i of the run.

    Attributes:
      sources: which are read.
      places: element i is (number of the source, index in it); it depends on nothing but the seed and i.
    """

    sources: Sequence[sources.Source]
    places: grain.MapDataset

    def __getitem__(self, position: int) -> sources.Record:
        number, index = self.places[position]
        return self.sources[number][index]


class _SpreadDuplicates:
    """Index of the record at each position, (position, _) -> int: another shuffle of the records in every epoch.

    The m records of a group are spaced an m-th of an epoch apart, from a random start and in random order; a record
    without duplicates is anywhere. The last of an epoch and the first of the next may be near each other.
    """

    def __init__(self, groups: np.ndarray, seed: int) -> None:
        self.groups, self.seed = groups, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int, _: Any = None) -> int:
        epoch, offset = divmod(position, len(self.groups))
        order = self._epochs.get(epoch)
        if order is None:
            order = self._order(epoch)
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1} | {epoch: order}
        return int(order[offset])

    def _order(self, epoch: int) -> np.ndarray:
        n, rng = len(self.groups), np.random.default_rng((self.seed, epoch))
        sizes = np.bincount(self.groups)
        shuffled = rng.permutation(n)
        grouped = shuffled[np.argsort(self.groups[shuffled], kind="stable")]
        group = self.groups[grouped]
        turn = np.arange(n) - (np.cumsum(sizes) - sizes)[group]
        return grouped[np.argsort((turn + rng.random(len(sizes))[group]) / sizes[group])]


def _caption_groups(opened: Sequence[sources.Source]) -> np.ndarray:
    """Number of each record's group, int (n,), over all records of `opened`; a group has the same captions."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = []
    for source in opened:
        for index in range(len(source)):
            record = records.read(source, index)
            key = ("", str(len(groups))) if isinstance(record, BadSample) else tuple(record["text"])  # "": nobody's
            groups.append(numbers.setdefault(key, len(numbers)))
    return np.array(groups)


def sample_order(opened: Sequence[sources.Source], config: DataConfig, seed: int) -> SampleOrder:
    """Return the order of all samples, shuffled in each epoch; with weights each source by itself, and then mixed.

    Shares are exact to a hundredth of the smallest weight, and each source has epochs of its own. See
    `DataConfig.spread_duplicate_captions`.
    """

    def shuffled(parts: Sequence[sources.Source], seed: int) -> grain.MapDataset:
        places = grain.MapDataset.range(sum(map(len, parts)))
        if config.spread_duplicate_captions:
            return places.repeat().map_with_index(_SpreadDuplicates(_caption_groups(parts), seed))
        return places.shuffle(seed=seed).repeat()

    if config.weights and len(opened) > 1:
        orders = [
            shuffled([source], seed + number).map(lambda index, number=number: (number, int(index)))
            for number, source in enumerate(opened)
        ]
        return SampleOrder(opened, grain.MapDataset.mix(orders, list(config.weights)))
    starts = list(itertools.accumulate(map(len, opened), initial=0))

    def place(index: int) -> tuple[int, int]:
        number = bisect.bisect_right(starts, index) - 1
        return number, int(index) - starts[number]

    return SampleOrder(opened, shuffled(opened, seed).map(place))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Number of a global batch -> this host's rows of it, a pure function of the number.

    Attributes:
      order, transform: what is read, and how it is transformed.
      batch, host, hosts: rows of the global batch, and which of them are read.
      rngs: a generator for each position of the run.
      slots: shared memory of the workers, if there are any.
      start: number of the first batch.
    """

    order: SampleOrder
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
        spec = {
            "image": ((rows, size, size, 3), np.uint8),
            "text": ((rows, self.transform.length), np.int32),
            "label": ((rows,), np.float32),
        }
        return {field: spec[field] for field in self.transform.fields}

    def __call__(self, g: int) -> dict[str, Any]:
        worker, slot = 0, None
        if self.slots:
            worker = (g - self.start) % self.transform.config.workers  # as Grain deals them out
            slot = self.slots.take(worker)
        batch = slot[1] if slot else {key: np.empty(shape, dtype) for key, (shape, dtype) in self.spec.items()}
        rows = self.batch // self.hosts
        first, captions, bad = g * self.batch + self.host * rows, [], []
        for row in range(0, rows, READ_GROUP):
            positions = range(first + row, first + min(row + READ_GROUP, rows))
            places = [self.order.places[position] for position in positions]
            read = [records.read(self.order.sources[number], index) for number, index in places]
            rngs = [self.rngs.acquire_rng(position) for position in positions]
            for position, place, record, rng in zip(positions, places, read, rngs, strict=True):
                # Views of the row, into which its image and label go.
                i = position - first
                out = {key: batch[key][i : i + 1] for key in batch if key != "text"}
                captions.append(self._fill(position, *place, record, rng, out, bad))
                self.rngs.release_rng(rng)
        if "text" in batch:
            batch["text"][:] = self.transform.tokenizer(captions, self.transform.length)
        encoded = json.dumps(bad).encode()  # bytes, which Grain passes on as they are
        return {"slot": (worker, slot[0]), "bad": encoded} if slot else batch | {"bad": encoded}

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
        """Write image and label of a record to `out` and return a caption. A bad record is replaced by a random one."""
        source = self.order.sources[number]
        for _ in range(MAX_RESAMPLES):
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
        bad[-1]["last"] = MAX_RESAMPLES  # `Ledger.add` stops the run, where its error is not lost in a worker process
        for row in out.values():
            row[:] = 0
        return ""


def batches(
    order: SampleOrder,
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
    """Yield this host's rows of the global batches number `start` to `stop` - 1, with the transform's `fields`.

    Row r of global batch g is sample g * batch + r of the run, and host h holds rows h * batch / hosts and up: the
    global batches are the same on any number of hosts and from any start. Processes that hold the same rows count as
    one host, see `mesh.batch_part`. A bad sample is replaced by another of its source, which too depends on nothing but
    the seed and the position.

    Raises:
      UserError: a bad sample without a `ledger` to record it; no usable sample for a position; too little memory for
        the workers.
    """
    config = transform.config
    reader = _Reader(order, transform, batch, host, hosts, grain.experimental.RngPool(seed), None, start)
    if config.workers:
        # The buffered ones, one that is being written, and the worker's share of those that the loop holds.
        depth = WORKER_BUFFER + 1 + math.ceil(IN_FLIGHT / config.workers)
        reader = dataclasses.replace(reader, slots=Slots(reader.spec, config.workers, depth))
    # Grain's elements are batches here: the number that are read at once, and that are buffered.
    options = grain.ReadOptions(0, 0) if config.workers else grain.ReadOptions(config.threads, config.buffer)
    dataset = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if config.workers:
        processes = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=WORKER_BUFFER)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=workers.prepare)
    return _report_bad_samples(iter(dataset), reader, ledger)


def _report_bad_samples(
    read: grain.DatasetIterator[dict[str, Any]], reader: _Reader, ledger: Ledger | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches; their bad samples and numbers of tokens go to the ledger."""
    try:
        for g, batch in enumerate(workers.shielded(read) if reader.slots else read, reader.start):
            bad = json.loads(batch.pop("bad"))
            if "slot" in batch:
                batch = reader.slots.open(*batch["slot"])
            if ledger is not None:
                ends = batch.get("text", np.zeros((0, 1))) == reader.transform.tokenizer.eot_id
                tokens = int((ends.argmax(axis=1) + 1).sum())
                ledger.add((g + 1) * reader.batch, tokens, bad, reader.host)
            elif bad:
                raise UserError(f"sample {bad[0]} cannot be used.")
            yield batch
    finally:
        read.close()  # else worker processes live as long as this one


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make arrays of the global batch, split over the mesh, of this host's rows."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
