"""Data sets of the Hugging Face Hub, and of the package `datasets`, at random access: `hf:ORG/NAME/SPLIT`.

A set is fetched and converted to Arrow files once, in the cache of `datasets`, and mapped into memory from there. The
environment configures the package and the client of the Hub: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and others.
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
_LIST = "dataset_dict.json"  # lists the splits that `DatasetDict.save_to_disk` wrote
_MAX_MESSAGE = 300  # letters of an error message of `datasets`


@contextlib.contextmanager
def _package(spec: str) -> Iterator[Any]:
    """Provide the package `datasets`; its errors in the context become sentences."""
    try:
        import datasets.config
        import datasets.exceptions
    except ImportError as error:
        raise UserError(f"{spec} needs the package datasets: pip install 'xclip_jax[datasets]'.") from error
    try:
        yield datasets
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{spec}: {_message(error)}; check the name, or {hub_client.LOG_IN}.") from error
    except ConnectionError as error:
        raise UserError(
            f"{spec} is not in the cache, {datasets.config.HF_DATASETS_CACHE}, and the Hub cannot be reached; connect "
            "this machine, or fetch it on another one and copy the cache."
        ) from error
    except Exception as error:  # an unknown split or configuration, files of an unknown type, a full disk, ...
        raise UserError(f"{spec}: datasets cannot open it: {_message(error)}.") from error


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_MESSAGE].rstrip(".") or type(error).__name__


def _repository(rest: str) -> tuple[str, dict[str, Any], str]:
    """Return repository or folder, the arguments of `datasets` that name a configuration of it, and the split."""
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
    """Return the `datasets.Dataset` that the spec "hf:" + `rest` names.

    `rest` is "ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT", or a path that begins with /, ./, ../ or ~: a folder that
    `save_to_disk` wrote, or FOLDER/SPLIT of a folder that `load_dataset` reads. `UserError` if it cannot be opened.
    """
    place, options, split = _repository(rest)
    with _package(f"{PREFIX}{rest}") as package:
        if saved := _saved(place, split):
            return package.load_from_disk(saved)
        if splits := _saved_splits(place):
            raise ValueError(f"Unknown split {split!r}. Should be one of {splits}")
        if files := _files(place, split):
            options["data_files"] = {split: files}
        return package.load_dataset(place, split=split, **options)


def _saved(place: str, split: str) -> str:
    """Return the folder if `save_to_disk` wrote it, else ""."""
    folder = os.path.join(place, split)
    return folder if os.path.isfile(os.path.join(folder, "state.json")) else ""


def _files(place: str, split: str) -> str:
    """Return a pattern of the files SPLIT.* and SPLIT-* in a local folder, "" if it has none.

    By itself `datasets` looks for few names of splits, and for these in sub-folders and in the folder's name too.
    """
    pattern = f"{glob.escape(split)}[.-]*"
    return pattern if os.path.isabs(place) and glob.glob(pattern, root_dir=place) else ""


def _saved_splits(place: str) -> list[str]:
    """Return the splits of a folder that `DatasetDict.save_to_disk` wrote, [] for another place."""
    path = pathlib.Path(place, _LIST)
    return list(json.loads(path.read_text())["splits"]) if path.is_file() else []


def split_names(rest: str) -> list[str]:
    """Return the splits of "hf:" + `rest`, a spec without a split, unread. Raises `UserError` as `open_split` does."""
    place, options, _ = _repository(f"{rest}/train")
    with _package(f"{PREFIX}{rest}") as package:
        if splits := _saved_splits(place):
            return splits
        configuration = options.pop("name", None)
        return package.get_dataset_split_names(place, configuration, **options)


def find_image_column(features: Mapping[str, Any], key: str) -> str:
    """Return the column of images: `key`, or if that is the default and no column, the only one of type Image."""
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    return images[0] if key == SourceOptions.image_column and key not in features and len(images) == 1 else key


def _images(rows: Any, column: str, rest: str) -> ImageColumn:
    """Return the images of a split.

    Paths of a local set are relative to its folder. A set of the Hub may name files in the caches of its packages;
    other files of this machine are bad samples.
    """
    folder = ""
    if rest.startswith(_LOCAL):
        place, _, split = _repository(split_columns(rest)[0])
        folder = _saved(place, split) or place

    def locate(_: int, path: str) -> tuple[str, str]:
        if folder:
            return path_in(folder, path), ""
        return path, "" if _is_cached(path) else f"{PREFIX}{rest}"

    return ImageColumn(_arrow(rows, [column])[column], locate)


def _arrow(rows: Any, columns: Iterable[str]) -> Any:
    """Return columns as a `pyarrow.Table`, mapped into memory."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


def _is_cached(path: str) -> bool:
    """Whether a file is in a cache of `datasets` or huggingface_hub, where they store the files of sets."""
    from datasets import config
    from huggingface_hub import constants

    folders = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return any(pathlib.Path(path).resolve().is_relative_to(pathlib.Path(folder).resolve()) for folder in folders)


class HubPairs(ColumnSource):
    """Image-text pairs of a split."""

    def __init__(self, rest: str, options: SourceOptions, rows: Any) -> None:
        """Read the `rows` of `open_split`; raise `UserError` if there are none, or no columns of these names.

        "?image=COLUMN" at the end of `rest` names the images, and "?label=COLUMN" is for evaluating pairs by labels.
        """
        columns = split_columns(rest)[1]
        spec = f"{PREFIX}{rest}"
        self._fingerprint: dict[str, Any] = {}
        key = find_image_column(rows.features, columns.get("image", options.image_column))
        options = dataclasses.replace(options, image_column=key)
        check_columns(spec, rows.features, options.columns)
        self._texts_table = _arrow(rows, options.caption_columns)
        super().__init__(_images(rows, options.image_column, rest), self._texts_table, options)
        if not len(self):
            raise UserError(f"{spec} has no rows; name another split.")

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, the columns, and a hash of the captions and of the sizes of images."""
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._texts_table.to_batches():
            types, is_list, is_number = batch.schema.types, pyarrow.types.is_list, pyarrow.types.is_primitive
            if all(is_list(kind) and is_number(kind.value_type) for kind in types):  # as text they would take an hour
                for values in (part for column in batch.columns for part in (column.value_lengths(), column.flatten())):
                    digest.update(values.to_numpy(zero_copy_only=False).tobytes())
                continue
            for row in batch.to_pylist():
                digest.update(repr(sorted(row.items())).encode("utf-8", "surrogatepass"))
        for size in self.images.sizes():
            digest.update(repr(size).encode("utf-8", "surrogatepass"))
        columns = {"image": self.options.image_column, "text": list(self.options.text_columns)}
        self._fingerprint = {"samples": len(self), "hash": digest.hexdigest(), "columns": columns}
        return self._fingerprint


def open_labelled(rest: str, image_column: str = SourceOptions.image_column) -> labelled.Labelled:
    """Open the images of a split in classes, see `in_classes`, by column "label" or the only one of type ClassLabel.

    "?image=COLUMN&label=COLUMN" at the end of `rest` names both columns. `UserError` if there are no such columns.
    """
    place, columns = split_columns(rest)
    rows = open_split(place)
    classes = [name for name, feature in rows.features.items() if hasattr(feature, "names")]
    only = "label" if "label" in classes or len(classes) != 1 else classes[0]
    label = columns.get("label", only)
    key = find_image_column(rows.features, columns.get("image", image_column))
    check_columns(f"{PREFIX}{rest}", rows.features, [key, label])
    return in_classes(f"{PREFIX}{rest}", _images(rows, key, rest), _arrow(rows, [label]), label)


class HubSets(SourceKind):
    """`hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT` and `hf:/PATH`, with ?image=COLUMN&label=COLUMN."""

    extras = ("datasets",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> HubPairs:
        return HubPairs(rest, options, open_split(split_columns(rest)[0]))

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return open_labelled(rest, options.image_column)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the data set lists the split; a damaged split is an error when it is opened."""
        rest = split_columns(f"{rest}/{split}")[0]
        listed = split in split_names(rest.removesuffix(f"/{split}"))
        return listed or bool(_files(_repository(rest)[0], split))
