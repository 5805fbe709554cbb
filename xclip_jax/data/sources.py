"""Where pairs come from: random access to records behind one contract.

A source has `__len__` and `__getitem__(i) -> {"image", "text", "tags", "id"}`: an encoded image (bytes) or a decoded
one (uint8 (h, w, 3)), captions to choose from (list[str], at least one), keywords (list[str], may be empty), and a name
(str). A sample that cannot be used raises `BadSample`. Where a source has more to say it has `where(i)`, a dict that
names a sample for the ledger, and `card()`, a dict that says for the run's records what was read.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.data import demo, transforms
from xclip_jax.data.tables import ArrayRecordSource, TableSource
from xclip_jax.data.tar_source import TarSource, decode_text
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Source(Protocol):
    """Random access to image-text pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def where(source: Source, index: int) -> dict[str, str]:
    """What names sample `index` to a person."""
    return source.where(index) if hasattr(source, "where") else {}


def card(source: Source) -> dict[str, Any]:
    """What was read: "samples" and, where the source can tell, a "hash" and its files."""
    return source.card() if hasattr(source, "card") else {"samples": len(source)}


def lookup(record: Record, key: str) -> list[str]:
    """The strings at `key` of a TFDS record, '/' stepping into nested features ("captions/text")."""
    value: Any = record
    for part in key.split("/"):
        value = [item[part] for item in value] if isinstance(value, list) else value[part]
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in values]


class TfdsSource:
    """A split of a TFDS data set, read with `tfds.data_source`: array_record or parquet files, no TensorFlow."""

    def __init__(self, data: Any, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        self.data, self.image_key, self.text_keys, self.tags_key = data, image_key, tuple(text_keys), tags_key

    def __len__(self) -> int:
        return len(self.data)

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
    """A folder of images, sub-folders too, each beside a .txt file of the same name: one caption a line."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            raise UserError(f"data folder {str(path)!r} does not exist; set data.sources to folder:PATH of your pairs.")
        found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.images = [p for p in found if not p.name.startswith(".")]
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
            image, caption = path.read_bytes(), path.with_suffix(".txt").read_bytes()
        except FileNotFoundError as error:
            raise BadSample("no caption file" if path.exists() else "no image file") from error
        except OSError as error:
            raise BadSample("file cannot be read", str(error)) from error
        text = [line.strip() for line in decode_text(caption).splitlines() if line.strip()]
        if not text:
            raise BadSample("caption is empty", f"{str(path.with_suffix('.txt'))!r}")
        return {"image": image, "text": text, "tags": [], "id": str(path)}

    def where(self, index: int) -> dict[str, str]:
        """Path of the image."""
        return {"file": str(self.images[index])}


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
    """A data source without decoded images, and its information; a set that is not there is one sentence."""
    try:
        builder = tfds.builder(spec, data_dir=data_dir)
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        return builder.as_data_source(split, decoders=decoders), builder.info
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"TFDS data set {spec!r}, split {split!r}, cannot be read from {data_dir or 'the default data_dir'} "
            f"({type(error).__name__}: {reason[0] if reason else ''}). Prepare it once with `pip install "
            f"'xclip_jax[tfds-prepare]'` and `tfds build {spec} --file_format=array_record`."
        ) from error


def open_source(spec: str, *, data_dir: str, image_key: str, text_keys: Sequence[str], tags_key: str) -> Source:
    """The source named by `spec`.

    Args:
      spec: "tar:PATTERN", "csv:PATTERN", "parquet:PATTERN", "array_record:PATTERN" (see `files.expand`),
        "folder:PATH", "tfds:NAME/SPLIT" or "demo:SPLIT" (the emoji pairs, prepared on first use).
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
    if kind == "demo":
        builder = demo.prepare(data_dir or None)
        data = builder.as_data_source(rest, decoders={"image": tfds.decode.SkipDecoding()})
    elif kind == "tfds":
        name, _, split = rest.rpartition("/")
        if not name:
            raise UserError(f"source {spec!r} names no split; write tfds:NAME/SPLIT, as in tfds:coco_captions/train.")
        data, _ = open_tfds(name, split, data_dir or None)
    else:
        raise UserError(
            f"source {spec!r} is of no known kind; write tar:PATTERN, folder:PATH, csv:PATTERN, "
            "parquet:PATTERN, array_record:PATTERN, tfds:NAME/SPLIT or demo:SPLIT."
        )
    return TfdsSource(data, image_key, text_keys, tags_key)
