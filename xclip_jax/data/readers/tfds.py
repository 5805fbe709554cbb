"""Pairs or labelled images from TensorFlow Datasets, read without TensorFlow."""

import hashlib
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
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions, check_columns, decode_utf8, field, pair

B = TypeVar("B", bound=tfds.core.DatasetBuilder)
_FORM = "tfds:NAME/SPLIT"
_LONGEST = 500  # letters of an error message of TFDS, which may list all data sets


def lookup(record: Record, key: str) -> list[Any]:
    """Return the values at `key` of a TFDS record, '/' for nested features; `BadSample` for texts not in UTF-8."""
    value: Any = record
    for part in key.split("/"):
        value = [item[part] for item in value] if isinstance(value, list) else value[part]
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [decode_utf8(item) if isinstance(item, bytes) else item for item in values]


def find_builder(name: str, data_dir: str | None) -> Any:
    """Return the builder of a TFDS data set, prepared or not, in `data_dir` or TFDS's folder; raises TFDS's errors."""
    return tfds.builder(name, data_dir=os.path.expanduser(data_dir or "") or None)


def open_tfds(
    spec: str, split: str, data_dir: str | None, image_column: str = "image"
) -> tuple[Any, tfds.core.DatasetInfo]:
    """Return a split, with undecoded images at `image_column`, and the data set's information.

    `UserError` for an unknown data set or split, or one not prepared for random access.
    """
    try:
        builder = find_builder(spec, data_dir)
        features = builder.info.features
        encoded = image_column in features and isinstance(features[image_column], tfds.features.Image)
        decoders = {image_column: tfds.decode.SkipDecoding()} if encoded else None
        return builder.as_data_source(split, decoders=decoders), builder.info
    except Exception as error:  # unknown, not prepared, prepared without random access, an unknown split, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST].rstrip(".")
        folder = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"TFDS data set {spec!r}, split {split!r}, cannot be read; check both names, or prepare the set once, with "
            f"`pip install 'xclip_jax[tfds-prepare]'` and `tfds build {spec} --file_format=array_record{folder}` "
            f"({reason})."
        ) from error


class TfdsSource(Source):
    """A split of a TFDS data set, read with `tfds.data_source`: array_record or parquet files."""

    def __init__(self, data: Any, info: tfds.core.DatasetInfo, split: str, options: SourceOptions) -> None:
        """Use the result of `open_tfds`; see `lookup` for keys of nested features."""
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
        return self._fingerprint  # of name, version, split and sizes of shards

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        return pair(record[self.options.image_column], str(index), self.options, lambda key: lookup(record, key))


def name_and_split(form: str, rest: str) -> tuple[str, str]:
    """Split "NAME/SPLIT" at the last /; a `UserError` for a missing split shows `form`, the full form of the spec."""
    name, _, split = rest.rpartition("/")
    if not name:
        raise UserError(f"source '{form.partition(':')[0]}:{rest}' does not name a split; write {form}.")
    return name, split


class TfdsSplits(SourceKind):
    """`tfds:NAME/SPLIT`, prepared once as array_record files."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TfdsSource:
        name, split = name_and_split(_FORM, rest)
        return TfdsSource(*open_tfds(name, split, options.dir or None, options.image_column), split, options)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        name, split = name_and_split(_FORM, rest)
        data, info = open_tfds(name, split, options.dir or None)
        features = info.features
        names = getattr(features["label"], "names", ()) if "label" in features else ()
        if not names or "image" not in features:
            raise UserError(f"source 'tfds:{rest}' needs the features image and label (of classes), and lacks one.")
        version = str(info.version)  # the content of a version never changes
        source = labelled.Labelled(
            "image",
            field(data, "image"),
            field(data, "label"),
            names,
            identity=[f"tfds:{rest}", version],
            read=lambda i: operator.itemgetter("image", "label")(data[i]),
        )
        source.version = version
        return source

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        try:
            return split in find_builder(rest, options.dir).info.splits
        except Exception:  # opening the first split explains the error
            return False


def prepare_dataset(make: Callable[[str], B], data_dir: str | os.PathLike | None, check: Callable[[], Any]) -> B:
    """Prepare a data set as array_record files unless it is prepared already; return its builder.

    `make` returns the builder for a root of TFDS data sets: `data_dir`, $TFDS_DATA_DIR or `tfds` in
    `storage.cache_dir`. `check` raises an error if the preparation would fail.
    """
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or storage.cache_dir() / "tfds")
    builder = make(root)
    tfds.disable_progress_bar()  # a dozen nested bars would hide other output
    if not builder.is_prepared():
        check()
    try:
        builder.download_and_prepare()
    except OSError:
        # The final rename fails if another process was faster, with the same files.
        if not builder.data_path.exists():
            raise
        builder = make(root)
    return builder


def encoded_records(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the encoded image of each record, and its other features: texts and lists of texts."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for record in (source[i] for i in range(len(source))):
        texts = {key: lookup(record, key) for key in record if key != "image"}
        yield record["image"], {key: x[0] if isinstance(record[key], bytes) else x for key, x in texts.items()}


def open_prepared(kind: str, builder: Any, split: str, options: SourceOptions) -> TfdsSource:
    """Open a split of a prepared data set whose specs begin with `kind`; raise `UserError` for an unknown split."""
    splits = ", ".join(builder.info.splits)
    with storage.unreadable_as(f"source '{kind}:{split}': unknown split; expected one of {splits}"):
        data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return TfdsSource(data, builder.info, split, options)
