"""Where pairs come from: random access to records behind one contract.

A source has `__len__` and `__getitem__(i) -> {"image", "text", "tags", "id"}`: an encoded image (bytes) or a decoded
one (uint8 (h, w, 3)), captions to choose from (list[str], at least one), keywords (list[str], may be empty), and a name
(str). A sample that cannot be used raises `BadSample`. A source may have `where(i)`, a dict that names a sample for the
ledger, and `card()`, a dict for the run's records that says which data is read (see `card`).
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax import storage
from xclip_jax.data import demo, icons, tar_index, transforms
from xclip_jax.data.tables import ArrayRecordSource, TableSource, first_line
from xclip_jax.data.tar_source import TarSource, decode_text
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_PREPARED_ON_USE = {"demo": demo, "icons": icons}


class Source(Protocol):
    """Random access to image-text pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def where(source: Source, index: int) -> dict[str, str]:
    """What names sample `index` to a person."""
    own = getattr(source, "where", None)
    return own(index) if own else {}


def card(source: Source) -> dict[str, Any]:
    """What is read: "samples", their number, and "hash", which a copy in another place has too and other data has not.

    A source may add names and sizes of its files, or whatever else says which data it is.
    """
    own = getattr(source, "card", None)
    return own() if own else {"samples": len(source)}


def lookup(record: Record, key: str) -> list[str]:
    """The strings at `key` of a TFDS record, '/' stepping into nested features ("captions/text")."""
    value: Any = record
    for part in key.split("/"):
        value = [item[part] for item in value] if isinstance(value, list) else value[part]
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in values]


def tfds_card(info: tfds.core.DatasetInfo, split: str, samples: int) -> dict[str, Any]:
    """The card (see `card`) of a split of a TFDS data set: its name and version, and bytes and shards as prepared."""
    shards = [(name, part.num_bytes, list(part.shard_lengths)) for name, part in sorted(info.splits.items())]
    content = json.dumps([info.full_name, split, samples, shards]).encode()
    name = {"name": info.full_name, "split": split}
    return {"samples": samples, "hash": hashlib.blake2b(content, digest_size=16).hexdigest(), **name}


class TfdsSource:
    """A split of a TFDS data set, read with `tfds.data_source`: array_record or parquet files, no TensorFlow."""

    def __init__(
        self, data: Any, about: dict[str, Any], image_key: str, text_keys: Sequence[str], tags_key: str = ""
    ) -> None:
        """`data` as `open_tfds` returns it, `about` its `tfds_card`; keys of features, see `lookup`."""
        self.data, self.about = data, about
        self.image_key, self.text_keys, self.tags_key = image_key, tuple(text_keys), tags_key

    def __len__(self) -> int:
        return len(self.data)

    def card(self) -> dict[str, Any]:
        """Name, version and split of the data set, number of samples and a hash."""
        return self.about

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        text = [caption for key in self.text_keys for caption in lookup(record, key)]
        return {
            "image": record[self.image_key],
            "text": text,
            "tags": lookup(record, self.tags_key) if self.tags_key else [],
            "id": str(index),
        }


class FolderSource:
    """A folder of images, sub-folders too, each beside a .txt file of the same name: one caption a line.

    Files and folders whose names begin with a dot are left out: what editors and systems keep there are no pairs.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(f"data folder {str(path)!r} does not exist; set data.sources to folder:PATH of your pairs.")
        self.images = sorted(_visible_images(self.path))
        if not any(p.with_suffix(".txt").is_file() for p in self.images):
            raise UserError(
                f"data folder {str(path)!r} holds {len(self.images)} images and none with a .txt file of the same name "
                f"beside it; captions belong in such files."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        path = self.images[index]
        try:
            image = storage.read(str(path), tar_index.MAX_BYTES["image"])
            caption = storage.read(str(path.with_suffix(".txt")), tar_index.MAX_BYTES["text"])
        except FileNotFoundError as error:
            raise BadSample("no caption file" if path.exists() else "no image file") from error
        except OSError as error:
            raise storage.unreadable(error) from error
        text = [line.strip() for line in decode_text(caption).splitlines() if line.strip()]
        if not text:
            raise BadSample("caption is empty", f"{str(path.with_suffix('.txt'))!r}")
        return {"image": image, "text": text, "tags": [], "id": str(path)}

    def where(self, index: int) -> dict[str, str]:
        """Path of the image."""
        return {"file": str(self.images[index])}

    def card(self) -> dict[str, Any]:
        """Number of images, and a hash of names below the folder and sizes of images and caption files."""
        digest = hashlib.blake2b(digest_size=16)
        root = len(str(self.path / "x")) - 1
        for image in map(str, self.images):  # pathlib would take most of the time, of millions of files minutes
            sizes = _size(image), _size(f"{os.path.splitext(image)[0]}.txt")
            digest.update(f"{image[root:]}\0{sizes}\n".encode("utf-8", "surrogateescape"))
        return {"samples": len(self), "hash": digest.hexdigest()}


def _visible_images(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield pathlib.Path(folder, name)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class Decoded:
    """Keeps each image decoded in memory after its first use. For sets that fit: n * h * w * 3 bytes."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> dict[str, str]:
        """As the source says."""
        return where(self.source, index)

    def card(self) -> dict[str, Any]:
        """As the source says."""
        return card(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self._records.get(index)
        if record is None:
            record = self.source[index]
            record = self._records[index] = record | {"image": transforms.decode(record["image"])}
        return record


def open_tfds(spec: str, split: str, data_dir: str | None) -> tuple[Any, tfds.core.DatasetInfo]:
    """A data source without decoded images, and its information.

    Raises:
      UserError: an unknown data set or split; one that is not prepared, or in files without random access.
    """
    where = data_dir or "the default data_dir"
    prepare = (
        f"`pip install 'xclip_jax[tfds-prepare]'` and `tfds build {spec} --file_format=array_record"
        f"{f' --data_dir={data_dir}' if data_dir else ''}`"
    )
    try:
        builder: Any = tfds.builder(spec, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"unknown TFDS data set {spec!r}; see https://www.tensorflow.org/datasets/catalog.") from error
    except Exception as error:
        raise UserError(f"TFDS data set {spec!r} cannot be opened in {where} ({first_line(error)}).") from error
    try:
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        return builder.as_data_source(split, decoders=decoders), builder.info
    except Exception as error:
        if not builder.is_prepared():
            message = f"TFDS data set {spec!r} is not prepared in {where}; prepare it once with {prepare}."
        elif isinstance(error, NotImplementedError):
            message = (
                f"TFDS data set {spec!r} in {where} is prepared as {builder.info.file_format.value}, which gives no "
                f"random access; delete it and prepare it once more, with {prepare}."
            )
        else:
            message = (
                f"TFDS data set {spec!r}, split {split!r}, cannot be read from {where} ({first_line(error)}). Is the "
                f"split right? If files are missing, prepare it once more with {prepare}."
            )
        raise UserError(message) from error


def open_source(spec: str, *, data_dir: str, image_key: str, text_keys: Sequence[str], tags_key: str) -> Source:
    """The source named by `spec`.

    Args:
      spec: "tar:PATTERN", "csv:PATTERN", "parquet:PATTERN", "array_record:PATTERN" (see `storage.expand`),
        "folder:PATH", "tfds:NAME/SPLIT", "demo:SPLIT" (the emoji pairs) or "icons:SPLIT" (the icon pairs), the last
        two prepared on first use.
      data_dir: where TFDS data sets lie; "" for the default.
      image_key, text_keys, tags_key: features of a record, columns of a table; see `TarSource` for tars; ignored by
        folders. `tags_key` may be "".

    Raises:
      UserError: unknown kind, missing folder, data set that is not prepared.
    """
    kind, _, rest = spec.partition(":")
    if kind == "folder":
        return FolderSource(rest)
    if kind == "tar":
        return TarSource(rest, text_keys, tags_key)
    if kind in ("csv", "parquet"):
        return TableSource(kind, rest, image_key, text_keys, tags_key)
    if kind == "array_record":
        return ArrayRecordSource(rest, image_key, text_keys, tags_key)
    if kind in _PREPARED_ON_USE:
        builder = _PREPARED_ON_USE[kind].prepare(data_dir or None)
        info, split = builder.info, rest
        try:
            data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except (KeyError, ValueError) as error:
            raise UserError(f"source {spec!r}: unknown split; expected one of {', '.join(info.splits)}.") from error
    elif kind == "tfds":
        name, _, split = rest.rpartition("/")
        if not name:
            raise UserError(f"source {spec!r} names no split; write tfds:NAME/SPLIT, as in tfds:coco_captions/train.")
        data, info = open_tfds(name, split, data_dir or None)
    else:
        raise UserError(
            f"unknown source {spec!r}; write tar:PATTERN, folder:PATH, csv:PATTERN, parquet:PATTERN, "
            f"array_record:PATTERN, tfds:NAME/SPLIT, demo:SPLIT or icons:SPLIT{_suggestion(spec)}"
        )
    return TfdsSource(data, tfds_card(info, split, len(data)), image_key, text_keys, tags_key)


def _suggestion(spec: str) -> str:
    """What a path without its prefix most likely means."""
    path = os.path.expanduser(spec)
    prefix = {".tar": "tar", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(os.path.splitext(path)[1])
    prefix = "folder" if os.path.isdir(path) else prefix
    return f"; did you mean {f'{prefix}:{spec}'!r}?" if prefix else "."
