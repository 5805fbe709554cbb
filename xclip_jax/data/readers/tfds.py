"""Data sets of TensorFlow Datasets, as pairs or labelled images, read without TensorFlow."""

import contextlib
import hashlib
import io
import json
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.data import labelled
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions, check_columns, decode_utf8, field
from xclip_jax.data.readers.table import pair

B = TypeVar("B", bound=tfds.core.DatasetBuilder)


def lookup(record: Record, key: str) -> list[str]:
    """Return the strings at `key` of a TFDS record, '/' for nested features; `BadSample` if one is not UTF-8."""
    value: Any = record
    for part in key.split("/"):
        value = [item[part] for item in value] if isinstance(value, list) else value[part]
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [decode_utf8(item) if isinstance(item, bytes) else str(item) for item in values]


def open_tfds(
    spec: str, split: str, data_dir: str | None, image_column: str = "image"
) -> tuple[Any, tfds.core.DatasetInfo]:
    """Open a split as a data source of undecoded images, at `image_column`; return it with the set's information.

    Raises:
      UserError: an unknown data set or split, or a data set that is not prepared, or not for random access.
    """
    folder = data_dir or "the default data_dir"
    prepare = (
        f"`pip install 'xclip_jax[tfds-prepare]'` and `tfds build {spec} --file_format=array_record"
        f"{f' --data_dir={data_dir}' if data_dir else ''}`"
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a banner where TensorFlow is missing
            builder: Any = tfds.builder(spec, data_dir=data_dir)
        features = builder.info.features
        encoded = image_column in features and isinstance(features[image_column], tfds.features.Image)
        decoders = {image_column: tfds.decode.SkipDecoding()} if encoded else None
        return builder.as_data_source(split, decoders=decoders), builder.info
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"unknown TFDS data set {spec!r}; see https://www.tensorflow.org/datasets/catalog.") from error
    except Exception as error:  # not prepared, prepared without random access, an unknown split, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")  # it may have several lines
        raise UserError(
            f"TFDS data set {spec!r}, split {split!r}, cannot be read from {folder} ({reason}). Is the split right? A "
            f"set that is not prepared there as array_record is prepared once with {prepare}."
        ) from error


class TfdsSource(Source):
    """A split of a TFDS data set, read with `tfds.data_source`: array_record or parquet files."""

    def __init__(self, data: Any, info: tfds.core.DatasetInfo, split: str, options: SourceOptions) -> None:
        """`data` and `info` are from `open_tfds`; keys of features are as for `lookup`."""
        self.data, self.options = data, options
        check_columns(info.full_name, sorted(info.features), options.columns)
        shards = [(name, part.num_bytes, list(part.shard_lengths)) for name, part in sorted(info.splits.items())]
        content = json.dumps([info.full_name, split, len(data), shards]).encode()
        self._fingerprint = {
            "samples": len(data),
            "hash": hashlib.blake2b(content, digest_size=16).hexdigest(),
            "name": info.full_name,
            "split": split,
        }

    def __len__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> dict[str, Any]:
        """Return name, version and split of the data set, and a hash of these and the sizes of its shards."""
        return self._fingerprint

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        return pair(record[self.options.image_column], str(index), self.options, lambda key: lookup(record, key))


def open_labelled(name: str, split: str, data_dir: str | None) -> labelled.Labelled:
    """Open the images of a split, in the classes of its feature "label"; nothing is kept in memory.

    A version of a TFDS data set does not change, so that it identifies the items.
    """
    data, info = open_tfds(name, split, data_dir)
    features = info.features
    version = str(info.version)
    names = getattr(features["label"], "names", ()) if "label" in features else ()
    if not names or "image" not in features:
        raise UserError(f"tfds:{name}/{split}: TFDS data set {name!r} has no features image and label (of classes).")
    source = labelled.Labelled(
        "image",
        field(data, "image"),
        field(data, "label"),
        names,
        identity=[f"tfds:{name}/{split}", version],
        read=lambda i: operator.itemgetter("image", "label")(data[i]),
    )
    source.version = version
    return source


def _name_and_split(rest: str) -> tuple[str, str]:
    name, _, split = rest.rpartition("/")
    if not name:
        raise UserError(f"source 'tfds:{rest}' does not name a split; write tfds:NAME/SPLIT.")
    return name, split


class TfdsSplits(SourceKind):
    """`tfds:NAME/SPLIT`, prepared once as array_record files."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TfdsSource:
        name, split = _name_and_split(rest)
        return TfdsSource(*open_tfds(name, split, options.dir or None, options.image_column), split, options)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return open_labelled(*_name_and_split(rest), options.dir or None)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        try:
            return split in tfds.builder(rest, data_dir=options.dir or None).info.splits
        except Exception:  # opening the first split says what is wrong
            return False


def prepare_dataset(make: Callable[[str], B], data_dir: str | os.PathLike | None, check: Callable[[], Any]) -> B:
    """Prepare a data set as array_record files, unless it is prepared already, and return its builder.

    `make` returns the builder for a root of TFDS data sets: `data_dir`, else $TFDS_DATA_DIR, else `tfds` in
    `storage.cache_dir`. `check` raises what would prevent the preparation. An interrupted one leaves nothing.
    """
    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or storage.cache_dir() / "tfds")
    builder = make(root)
    # Its dozen nested bars, for a few seconds, would hide the lines that report progress.
    tfds.disable_progress_bar()
    if not builder.is_prepared():
        check()
    try:
        builder.download_and_prepare()
    except OSError:
        # The final rename fails if another process was faster; it wrote the same files.
        if not builder.data_path.exists():
            raise
        builder = make(root)
    return builder


def encoded_records(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the encoded image of each record of a split, and its other features, which are texts and lists of texts."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for record in (source[i] for i in range(len(source))):
        texts = {key: lookup(record, key) for key in record if key != "image"}
        yield record["image"], {key: x[0] if isinstance(record[key], bytes) else x for key, x in texts.items()}


def open_prepared(kind: str, builder: Any, split: str, options: SourceOptions) -> TfdsSource:
    """Open a split of a prepared data set, or raise `UserError`; `kind` is the first part of its specs."""
    try:
        data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except (KeyError, ValueError) as error:
        raise UserError(
            f"source '{kind}:{split}': unknown split; expected one of {', '.join(builder.info.splits)}."
        ) from error
    return TfdsSource(data, builder.info, split, options)
