"""Training batches: a pure function of (sources, seed, batch number), so that a run can resume anywhere."""

import bisect
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import holdout, images, records, sources, transforms
from xclip_jax.data.base import Record, Source
from xclip_jax.data.config import DataConfig
from xclip_jax.data.ledger import BadSampleLog, Entry
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.parallel.mesh import batch_sharding

Batch = dict[str, Any]

MAX_RESAMPLES = 100  # bad samples in a row for one position that stop the run
READ_GROUP = 32  # rows to read before decoding them: alternating would empty the processor's caches
BUFFER = 8  # batches that threads read ahead, at least
_CACHED_PLACES = 1 << 22  # size of the cache of epochs in `_SpreadDuplicates`, which always keeps two epochs


@dataclasses.dataclass(frozen=True)
class Transform:
    """Writes a record to a row of a batch, a pure function of the record and the random generator.

    Possible `fields` of a row are "image", uint8 (size, size, 3), "text", int32 (length,), "label", a number,
    "image_key" and "text_key", int32 (2,): hashes of the image's bytes, and of the caption, and "negatives", int32
    (`data.negatives`, length), in which the caption stands for missing ones. A row also has the vectors in `columns`,
    {name: size}, fp32 (size,).
    """

    config: DataConfig
    size: int
    tokenizer: Tokenizer
    length: int
    fields: tuple[str, ...] = ("image", "text")
    columns: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, record: Record, rng: np.random.Generator, row: Mapping[str, np.ndarray]) -> None:
        """Write the fields of `record` to the arrays of `row`, whose first axis has length 1."""
        if "image" in row:
            config, scale = self.config, self.config.crop_scale
            # So that even the smallest square crop is not enlarged.
            scaled_to = math.ceil(self.size / scale[0] ** 0.5) if config.resample == "area" else 0
            image = images.decode(record["image"], scaled_to=scaled_to, **images.DECODINGS[config.decoding])
            out = row["image"][0]
            transforms.random_resized_crop(image, self.size, rng, scale, resample=config.resample, out=out)
        if "image_key" in row:
            row["image_key"][0] = _hash(record["image"])
        drawn = ""
        if "text" in row:
            drawn = self.draw(record, rng)
            caption = self._change(drawn, record["tags"], rng) if self._change else drawn
            row["text"][:] = self.tokenizer([caption], self.length)
            if "text_key" in row:
                row["text_key"][0] = _hash(caption.encode("utf-8", "replace"))
        if "negatives" in row:
            if "negatives" not in record:
                raise UserError(f"{record['id']!r}: its source gives no 'negatives'; set data.negatives to 0.")
            wrong = rng.permutation(np.array(record["negatives"], object))[: self.config.negatives]
            texts = [self._change(text, [], rng) if self._change else text for text in wrong]
            row["negatives"][0] = row["text"]
            row["negatives"][0, : len(texts)] = self.tokenizer(texts, self.length)
        if "label" in row:
            row["label"][0] = record["label"]
        for name in self.columns.keys() & row.keys():
            value = record.get(name)
            vector = np.asarray(value(drawn) if callable(value) else value)
            if vector.shape != row[name].shape[1:]:
                sizes = f"of shape {vector.shape}, and a term of the objective reads {row[name].shape[1:]}"
                raise UserError(f"records of data.sources have a column {name!r} {sizes}; change one of the two.")
            row[name][0] = vector

    def arrays(self, rows: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return {field: (shape, dtype)} of a batch of `rows` samples."""
        shapes = {
            "image": ((rows, self.size, self.size, 3), np.uint8),
            "text": ((rows, self.length), np.int32),
            "label": ((rows,), np.float32),
            "image_key": ((rows, 2), np.int32),
            "text_key": ((rows, 2), np.int32),
            "negatives": ((rows, self.config.negatives, self.length), np.int32),
        }
        columns = {name: ((rows, size), np.float32) for name, size in self.columns.items()}
        return {field: shapes[field] for field in self.fields} | columns

    def draw(self, record: Record, rng: np.random.Generator) -> str:
        """Draw one of the captions, by the weights of their columns if any."""
        text = record["text"]
        columns = record.get("columns", ()) if any(self._weights) else ()
        shares = np.array([self._weights[i] / columns.count(i) for i in columns])
        return text[rng.choice(len(text), p=shares / shares.sum()) if shares.any() else rng.integers(len(text))]

    @functools.cached_property
    def _weights(self) -> list[float]:
        return list(self.config.text_weights.values())

    @functools.cached_property
    def _change(self) -> sources.CaptionTransform | None:
        return sources.caption_transform(self.config)


def _hash(content: bytes | np.ndarray) -> np.ndarray:
    """Return 64 bits as int32 (2,)."""
    return np.frombuffer(bytes.fromhex(holdout.image_hash(content)), np.int32)


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The endless sequence of a run's records by position."""

    sources: Sequence[Source]
    places: grain.MapDataset  # position -> (number of the source, index in it); depends only on the seed
    captions: Sequence[Mapping[str, Any]] = ()  # `records.reading_digest` of their groups, if equal ones are spread

    def locate(self, position: int) -> tuple[int, int]:
        """Return the number of the source, and the index in it, at a position of the run."""
        place = self.places[position]
        assert place is not None  # only Grain's filters give None
        return place


class _SpreadDuplicates:
    """Maps a position to the index of a record; every epoch is another shuffle of the records.

    The m records of a group are an m-th of an epoch apart, from a random start and in random order. Across epochs,
    records of a group may be near each other.
    """

    def __init__(self, groups: np.ndarray, seed: int) -> None:
        self.groups = groups
        self.seed = seed
        # Threads read from several epochs at once if these are short.
        size = max(2, _CACHED_PLACES // len(groups))
        self._cached_order = functools.lru_cache(maxsize=size)(self._order)
        self._lock = threading.Lock()

    def __call__(self, position: int, _: Any = None) -> int:
        epoch, offset = divmod(position, len(self.groups))
        with self._lock:  # all threads reach a new epoch together
            return int(self._cached_order(epoch)[offset])

    def _order(self, epoch: int) -> np.ndarray:
        n = len(self.groups)
        rng = np.random.default_rng((self.seed, epoch))
        sizes = np.bincount(self.groups)
        shuffled = rng.permutation(n)
        grouped = shuffled[np.argsort(self.groups[shuffled], kind="stable")]
        group = self.groups[grouped]
        turn = np.arange(n) - (np.cumsum(sizes) - sizes)[group]
        return grouped[np.argsort((turn + rng.random(len(sizes))[group]) / sizes[group])]


def _caption_groups(opened: Sequence[Source], config: DataConfig) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Group records by equal captions: int (n,) for all sources, and `records.reading_digest` of each source."""
    numbers: dict[tuple[str, ...], int] = {}
    groups, bad = [], []
    places = ((source, index) for source in opened for index in range(len(source)))
    threads = min(config.threads, records.MAX_THREADS)
    for captions in records.read_each(places, lambda record: tuple(record["text"]), threads=threads):
        bad.append(isinstance(captions, BadSample))
        # "" is never a caption.
        key = ("", str(len(groups))) if isinstance(captions, BadSample) else captions
        groups.append(numbers.setdefault(key, len(numbers)))
    ends = list(itertools.accumulate(map(len, opened), initial=0))
    digests = [records.reading_digest(np.array(groups[a:b]), sum(bad[a:b])) for a, b in itertools.pairwise(ends)]
    return np.array(groups), digests


def sample_order(opened: Sequence[Source], config: DataConfig, seed: int) -> SampleOrder:
    """Return the order of all samples, shuffled in each epoch; with weights, the sources are shuffled and then mixed.

    Shares are exact to a hundredth of the smallest weight, and each source has epochs of its length. With
    `DataConfig.spread_duplicate_captions` this reads all captions.
    """
    digests: list[dict[str, Any]] = []
    read = opened
    if config.cache:
        read = [sources.Decoded(source, config.decoding) for source in opened]

    def shuffled(parts: Sequence[Source], seed: int) -> grain.MapDataset:
        places = grain.MapDataset.range(sum(map(len, parts)))
        if config.spread_duplicate_captions:
            groups, digests_of_parts = _caption_groups(parts, config)
            digests.extend(digests_of_parts)
            return places.repeat().map_with_index(_SpreadDuplicates(groups, seed))
        return places.shuffle(seed=seed).repeat()

    if config.weights and len(opened) > 1:
        orders = [
            shuffled([source], (seed + number) % 2**32).map(lambda index, number=number: (number, int(index)))
            for number, source in enumerate(opened)
        ]
        return SampleOrder(read, grain.MapDataset.mix(orders, list(config.weights)), digests)
    starts = list(itertools.accumulate(map(len, opened), initial=0))

    def place(index: int) -> tuple[int, int]:
        number = bisect.bisect_right(starts, index) - 1
        return number, int(index) - starts[number]

    return SampleOrder(read, shuffled(opened, seed).map(place), digests)


def _fill(
    row: Batch, record: Record | BadSample, rng: np.random.Generator, transform: Transform, source: Source, place: Entry
) -> list[Entry]:
    """Write a record to `row`, or instead of a bad one a random record of its source; return the bad ones."""
    bad = []
    for _ in range(MAX_RESAMPLES):
        try:
            if isinstance(record, BadSample):
                raise record
            transform(record, rng, row)
            return bad
        except Exception as error:
            reason = records.as_bad_sample(error)
            bad.append({"reason": reason.reason, "detail": reason.detail} | place | source.describe(place["index"]))
        place = place | {"index": int(rng.integers(len(source)))}
        (record,) = records.read_all([(source, place["index"])])
    raise UserError(
        f"source {place['source']} gave {MAX_RESAMPLES} bad samples in a row, the last for {bad[-1]['reason']!r}; run "
        "xclip-jax check on it."
    )


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
    shards: Sequence[int] = (),
    ledger: BadSampleLog | None = None,
) -> Generator[Batch]:
    """Yield this host's rows of the global batches number `start` to `stop` - 1, with the transform's `fields`.

    Row r of global batch g is sample g * batch + r of the run: the global batches are the same on any number of hosts
    and from any start. Host h reads the h-th of `hosts` contiguous parts or, with `shards`, these parts of
    hosts * len(shards), one after another, see `mesh.BatchPart`. A bad sample is replaced by another one of its
    source, which depends only on the seed and the position. `UserError` without a `ledger`, or if none can be used.
    """
    shards = shards or (host,)
    n = batch // (hosts * len(shards))
    rows = [row for shard in shards for row in range(shard * n, (shard + 1) * n)]
    rngs = grain.experimental.RngPool(seed)

    def read_batch(g: int) -> Batch:
        local: Batch = {field: np.empty(*array) for field, array in transform.arrays(len(rows)).items()}
        bad = []
        for first in range(0, len(rows), READ_GROUP):
            positions = [g * batch + row for row in rows[first : first + READ_GROUP]]
            places = [order.locate(position) for position in positions]
            read = records.read_all([(order.sources[number], index) for number, index in places])
            drawn = [rngs.acquire_rng(position) for position in positions]
            samples = zip(positions, places, read, drawn, strict=True)
            for i, (position, (number, index), record, rng) in enumerate(samples, first):
                row = {key: values[i : i + 1] for key, values in local.items()}
                place = {"source": number, "index": index}
                entries = _fill(row, record, rng, transform, order.sources[number], place)
                bad += ({"position": position} | entry for entry in entries)
                rngs.release_rng(rng)
        return local | {"bad": bad}

    # Grain's elements are batches here; its buffer includes unfinished ones.
    threads = transform.config.threads
    options = grain.ReadOptions(threads, max(threads, BUFFER))
    made = iter(grain.MapDataset.range(start, stop).map(read_batch).to_iter_dataset(options))
    try:
        for g, local in enumerate(made, start):
            bad = local.pop("bad")
            if ledger is not None:
                tokens = int(transform.tokenizer.lengths(local["text"]).sum()) if "text" in local else 0
                ledger.add((g + 1) * batch, tokens, bad, host)
            elif bad:
                raise UserError(f"sample {bad[0]} cannot be used.")
            yield local
    except UserError as error:
        raise UserError(str(error)) from error  # without Grain's notes on tracebacks
    finally:
        made.close()


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the global batch as arrays sharded over the mesh, from this host's rows in rising order."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
