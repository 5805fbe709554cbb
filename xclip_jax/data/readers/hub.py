"""Data sets of the Hugging Face Hub and of the package `datasets`, with random access: `hf:ORG/NAME/SPLIT`.

A set is downloaded and converted once to Arrow files in the cache of `datasets`, then memory-mapped. HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE and other environment variables configure the package and the Hub's client.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow

from xclip_jax.core import hub_client
from xclip_jax.core.errors import UserError
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
        import datasets.config
        import datasets.exceptions
    except ImportError as error:
        raise UserError(f"{spec} needs the package datasets: pip install 'xclip_jax[datasets]'.") from error
    try:
        yield datasets
    except Exception as error:  # an unknown split or configuration, files of an unknown type, a full disk, ...
        message = " ".join(str(error).split())[:_MAX_MESSAGE].rstrip(".") or type(error).__name__
        fault = f": datasets cannot open it: {message}"
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            fault = f": {message}; check the name, or {hub_client.LOG_IN}"
        elif isinstance(error, ConnectionError):
            fault = f" is not in the cache, {datasets.config.HF_DATASETS_CACHE}, and the Hub cannot be reached; "
            fault += "connect this machine, or fetch it on another one and copy the cache"
        raise UserError(f"{spec}{fault}.") from error


def _repository(rest: str) -> tuple[str, dict[str, Any], str]:
    """Return repository or folder, arguments for `datasets` such as the configuration, and the split."""
    if rest.startswith(_LOCAL):
        folder, name = os.path.split(os.path.abspath(os.path.expanduser(rest)))  # without ./ it may name a public set
        return folder, {}, name
    match = _HUB.fullmatch(rest)
    if not match:
        form = "hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT, or hf:/PATH"
        raise UserError(f"source {PREFIX + rest!r} does not name a data set and a split; write {form}.")
    repository, revision, configuration, split = match.groups()
    return repository, {"revision": revision} | ({"name": configuration} if configuration else {}), split


def open_split(rest: str) -> Any:
    """Return the `datasets.Dataset` of a spec, or raise `UserError`.

    Args:
      rest: the spec after "hf:": "ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT", or a path that begins with /, ./, ../ or
        ~: a folder written by `save_to_disk`, or FOLDER/SPLIT of a folder that `load_dataset` reads.
    """
    place, options, split = _repository(rest)
    with _package(f"{PREFIX}{rest}") as package:
        if _is_saved(os.path.join(place, split)):
            return package.load_from_disk(os.path.join(place, split))
        if _saved_splits(place):
            raise ValueError(f"Unknown split {split!r}. Should be one of {_saved_splits(place)}")
        if _files(place, split):
            options["data_files"] = {split: _files(place, split)}
        return package.load_dataset(place, split=split, **options)


def _is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder."""
    return os.path.isfile(os.path.join(folder, "state.json"))


def _files(place: str, split: str) -> str:
    """Return a pattern for the files SPLIT.* and SPLIT-* in a local folder, "" if it has none.

    `datasets` itself knows few names of splits, and looks for these in sub-folders and in the folder's name, too.
    """
    pattern = f"{glob.escape(split)}[.-]*"
    return pattern if os.path.isabs(place) and glob.glob(pattern, root_dir=place) else ""


def _saved_splits(place: str) -> list[str]:
    """Return the splits in a folder written by `DatasetDict.save_to_disk`, [] for another place."""
    path = pathlib.Path(place, "dataset_dict.json")
    return list(json.loads(path.read_text())["splits"]) if path.is_file() else []


def find_image_column(features: Mapping[str, Any], key: str) -> str:
    """Return the column of images: `key`, or the only column of type Image if the default `key` does not exist."""
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    return images[0] if key == SourceOptions.image_column and key not in features and len(images) == 1 else key


def _images(rows: Any, column: str, rest: str) -> ImageColumn:
    """Return the images of a split.

    Paths in a local set are relative to its folder. Paths in a set of the Hub may point into the Hub's caches; any
    other file of this machine is a bad sample.
    """
    folder = ""
    if rest.startswith(_LOCAL):
        folder, _, split = _repository(split_columns(rest)[0])
        if _is_saved(os.path.join(folder, split)):
            folder = os.path.join(folder, split)

    def locate(_: int, path: str) -> tuple[str, str]:
        if folder:
            return path_in(folder, path), ""
        from datasets import config
        from huggingface_hub import constants

        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        file = pathlib.Path(path).resolve()
        is_cached = any(file.is_relative_to(pathlib.Path(cache).resolve()) for cache in caches)
        return path, "" if is_cached else f"{PREFIX}{rest}"

    return ImageColumn(_arrow(rows, [column])[column], locate)


def _arrow(rows: Any, columns: Iterable[str]) -> Any:
    """Return columns as a memory-mapped `pyarrow.Table`."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


class HubPairs(ColumnSource):
    """Image-text pairs of a split."""

    def __init__(self, rest: str, options: SourceOptions, rows: Any) -> None:
        """Read the `rows` of `open_split`; raise `UserError` if columns are missing.

        "?image=COLUMN" at the end of `rest` names the images, "?label=COLUMN" the labels for evaluations.
        """
        columns = split_columns(rest)[1]
        self._fingerprint: dict[str, Any] = {}
        key = find_image_column(rows.features, columns.get("image", options.image_column))
        options = dataclasses.replace(options, image_column=key)
        check_columns(f"{PREFIX}{rest}", rows.features, options.columns)
        self._texts_table = _arrow(rows, options.caption_columns)
        super().__init__(_images(rows, options.image_column, rest), self._texts_table, options)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, the columns, and a hash of captions and image sizes."""
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._texts_table.to_batches():
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
        return HubPairs(rest, options, open_split(split_columns(rest)[0]))

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        """Open images with the classes in column ?label=, by default "label" or the only one of type ClassLabel."""
        place, columns = split_columns(rest)
        rows = open_split(place)
        classes = [name for name, feature in rows.features.items() if hasattr(feature, "names")]
        label = columns.get("label", "label" if "label" in classes or len(classes) != 1 else classes[0])
        key = find_image_column(rows.features, columns.get("image", options.image_column))
        check_columns(f"{PREFIX}{rest}", rows.features, [key, label])
        return in_classes(f"{PREFIX}{rest}", _images(rows, key, rest), _arrow(rows, [label]), label)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the data set lists the split; opening a damaged one raises the error."""
        place, arguments, _ = _repository(split_columns(f"{rest}/{split}")[0])
        name = arguments.pop("name", None)
        with _package(f"{PREFIX}{rest}") as package:
            splits = _saved_splits(place) or package.get_dataset_split_names(place, name, **arguments)
        return split in splits or bool(_files(place, split))
