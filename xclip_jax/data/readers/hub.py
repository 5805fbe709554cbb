"""Data sets of the Hugging Face Hub, `hf:ORG/NAME/SPLIT`, and sets saved by the package `datasets`, `hf:/PATH`.

A set of the Hub is converted once to Arrow files in the cache of `datasets`, then memory-mapped for random access.
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and other environment variables configure the package and the Hub's client.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow

from xclip_jax.core import hub_client
from xclip_jax.core.errors import UserError
from xclip_jax.core.imports import import_extra
from xclip_jax.data import labelled
from xclip_jax.data.base import SourceKind, SourceOptions, check_columns, split_columns
from xclip_jax.data.readers.table import ColumnSource, ImageColumn, in_classes, path_in

PREFIX = hub_client.PREFIX
_HUB = re.compile(rf"({hub_client.ID})(?:@([^/]+))?(?:/([^/]+))?/([^/]+)")
_LOCAL = ("/", "./", "../", "~")
_MAX_MESSAGE = 300  # letters of an error message of `datasets`


@contextlib.contextmanager
def _package(spec: str) -> Iterator[Any]:
    """Provide the package `datasets` and convert its errors to `UserError`."""
    try:
        yield import_extra("datasets", "datasets", spec)
    except UserError:
        raise
    except Exception as error:  # an unknown split or configuration, no connection, a full disk, ...
        message = " ".join(str(error).split())[:_MAX_MESSAGE].rstrip(".") or type(error).__name__
        remedy = f"check the name, or {hub_client.LOG_IN}"
        if isinstance(error, ImportError):
            remedy = "install it"
        raise UserError(f"{spec}: datasets cannot open it: {message}; {remedy}.") from error


def _repository(rest: str) -> tuple[str, str, dict[str, Any]]:
    match = _HUB.fullmatch(rest)
    if not match:
        form = "hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT, or hf:/PATH"
        raise UserError(f"source {PREFIX + rest!r} does not name a data set and a split; write {form}.")
    repository, revision, configuration, split = match.groups()
    return repository, split, {"revision": revision} | ({"name": configuration} if configuration else {})


def open_split(rest: str) -> Any:
    """Return the `datasets.Dataset` of the spec "hf:" + `rest`, or raise `UserError`.

    `rest` is "ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT", or a path that begins with /, ./, ../ or ~: a folder written
    by `Dataset.save_to_disk`.
    """
    if rest.startswith(_LOCAL):
        with _package(f"{PREFIX}{rest}") as package:
            return package.Dataset.load_from_disk(os.path.expanduser(rest))
    repository, split, options = _repository(rest)
    with _package(f"{PREFIX}{rest}") as package:
        return package.load_dataset(repository, split=split, **options)


def _images(rows: Any, column: str, place: str) -> ImageColumn:
    """Return the images of the split that a spec names.

    Paths in a saved set are relative to its folder. Paths in a set of the Hub may point into the Hub's caches; other
    files of this machine are bad samples.
    """

    def locate(_: int, path: str) -> tuple[str, str]:
        if place.startswith(_LOCAL):
            return path_in(os.path.expanduser(place), path), ""
        from datasets import config
        from huggingface_hub import constants

        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        file = pathlib.Path(path).resolve()
        is_cached = any(file.is_relative_to(pathlib.Path(cache).resolve()) for cache in caches)
        return path, "" if is_cached else f"{PREFIX}{place}"

    return ImageColumn(_arrow(rows, [column])[column], locate)


def _arrow(rows: Any, columns: Iterable[str]) -> Any:
    """Return columns as a memory-mapped `pyarrow.Table`."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


class HubPairs(ColumnSource):
    """Image-text pairs of a split."""

    def __init__(self, place: str, options: SourceOptions, rows: Any) -> None:
        """Read the `rows` of `open_split(place)`; raise `UserError` if columns are missing."""
        self._fingerprint: dict[str, Any] = {}
        check_columns(f"{PREFIX}{place}", rows.features, options.columns)
        super().__init__(_images(rows, options.image_column, place), _arrow(rows, options.caption_columns), options)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, the columns, and a hash of captions and image sizes."""
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.columns.to_batches():
            is_list, is_number = pyarrow.types.is_list, pyarrow.types.is_primitive
            if all(is_list(kind) and is_number(kind.value_type) for kind in batch.schema.types):  # as text: an hour
                for column in batch.columns:
                    for values in (column.value_lengths(), column.flatten()):
                        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
                continue
            for row in batch.to_pylist():
                digest.update(repr(sorted(row.items())).encode("utf-8", "surrogatepass"))
        for size in self.images.sizes():
            digest.update(repr(size).encode("utf-8", "surrogatepass"))
        columns = {"image": self.options.image_column, "text": list(self.options.text_columns)}
        self._fingerprint = {"samples": len(self), "hash": digest.hexdigest(), "columns": columns}
        return self._fingerprint


class HubSets(SourceKind):
    """`hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT` and `hf:/PATH`, with ?image=COLUMN&label=COLUMN."""

    extras = ("datasets",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> HubPairs:
        place, columns = split_columns(rest)
        options = dataclasses.replace(options, image_column=columns.get("image", options.image_column))
        return HubPairs(place, options, open_split(place))

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        """Open images with the classes in column ?label=, by default "label"."""
        place, columns = split_columns(rest)
        rows = open_split(place)
        label = columns.get("label", "label")
        key = columns.get("image", options.image_column)
        check_columns(f"{PREFIX}{rest}", rows.features, [key, label])
        return in_classes(f"{PREFIX}{rest}", _images(rows, key, place), _arrow(rows, [label]), label)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        place = split_columns(f"{rest}/{split}")[0]
        if place.startswith(_LOCAL):
            return os.path.isdir(os.path.expanduser(place))
        repository, _, arguments = _repository(place)
        name = arguments.pop("name", None)
        with _package(f"{PREFIX}{rest}") as package:
            return split in package.get_dataset_split_names(repository, name, **arguments)
