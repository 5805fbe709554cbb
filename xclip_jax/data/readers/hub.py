"""Data sets of the Hugging Face Hub, and of the package `datasets`, at random access: `hf:ORG/NAME/SPLIT`.

A set is fetched and converted to Arrow files once, in the cache of `datasets`, and mapped into memory from there. The
package, the extra `datasets`, is imported on first use. The environment configures it and the Hub's client: HF_HOME,
HF_DATASETS_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and others.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import hub_client
from xclip_jax.core.errors import UserError
from xclip_jax.data import labelled
from xclip_jax.data.base import Form, MissingColumnError, Record, Source, SourceKind, SourceOptions
from xclip_jax.data.readers.table import image_of, pair
from xclip_jax.data.text import json_strings

PREFIX = hub_client.PREFIX
# If data.text_keys is its default and not a column, the first of these columns is read.
_CAPTIONS = ("text", "txt", "caption", "captions", "sentences", "sentence", "alt_text")
_HUB = re.compile(rf"({hub_client.ID})(?:@([^/]+))?(?:/([^/]+))?/([^/]+)")
_LOCAL = ("/", "./", "../", "~")
_LIST = "dataset_dict.json"  # lists the splits that `DatasetDict.save_to_disk` wrote
# Columns that a spec names at its end, or before the split that a probe adds.
_COLUMNS = re.compile(r"\?([^/?]*=[^/?]*)(?=/[^/]*$|$)")
_EXPECTED = "expected ?image=COLUMN&label=COLUMN, or one"
_BATCH = 10_000  # rows that are hashed at once
_MAX_MESSAGE = 300  # letters of an error message of `datasets`


def _package(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{purpose} needs the package datasets: pip install 'xclip_jax[datasets]'.") from error
    return datasets


def open_split(rest: str) -> Any:
    """Return the `datasets.Dataset` that the spec "hf:" + `rest` names.

    Args:
      rest: "ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT", or a path that begins with /, ./, ../ or ~: a folder that
        `save_to_disk` wrote, or FOLDER/SPLIT of a folder that `load_dataset` reads.

    Raises:
      UserError: `datasets` is not installed, the spec has another form, or the set cannot be opened.
    """
    spec = f"{PREFIX}{rest}"
    if rest.startswith(_LOCAL):
        return _open_folder(spec, pathlib.Path(rest).expanduser())
    if not (match := _HUB.fullmatch(rest)):
        raise UserError(
            f"source {spec!r} does not name a split; write hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT, or hf:/PATH."
        )
    repository, revision, configuration, split = match.groups()
    return _ask(spec, "load_dataset", repository, configuration, split=split, revision=revision)


def split_names(rest: str) -> list[str]:
    """Return the splits of "hf:" + `rest`, a spec without a split, unread. Raises `UserError` as `open_split` does."""
    spec = f"{PREFIX}{rest}"
    if not rest.startswith(_LOCAL):
        match = _HUB.fullmatch(f"{rest}/train")
        if not match:
            raise UserError(f"source {spec!r} does not name a data set; write hf:ORG/NAME[@REVISION][/CONFIGURATION].")
        repository, revision, configuration, _ = match.groups()
        return _ask(spec, "get_dataset_split_names", repository, configuration, revision=revision)
    path = pathlib.Path(rest).expanduser()
    if (path / _LIST).is_file():
        try:
            return list(json.loads((path / _LIST).read_text())["splits"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{spec}: {str(path / _LIST)!r} cannot be read ({error!r}).") from error
    saved = sorted(entry.parent.name for entry in path.glob("*/state.json"))
    return saved or _ask(spec, "get_dataset_split_names", str(path), None)


def _open_folder(spec: str, path: pathlib.Path) -> Any:
    if (path / "state.json").is_file():
        package = _package(spec)
        try:
            return package.load_from_disk(str(path))
        except Exception as error:  # the class depends on the damage
            raise UserError(f"{spec}: {str(path)!r} cannot be read: {_message(error)}.") from error
    if (path / _LIST).is_file():
        splits = sorted(entry.parent.name for entry in path.glob("*/state.json"))
        raise UserError(f"source {spec!r} does not name a split; its splits are {', '.join(splits)}.")
    if not path.parent.is_dir() or str(path.parent) == "/":
        raise UserError(f"source {spec!r}: folder {str(path.parent)!r} does not exist; write hf:FOLDER/SPLIT.")
    return _ask(spec, "load_dataset", str(path.parent), None, split=path.name)


def _ask(spec: str, function: str, name: str, configuration: str | None, **options: Any) -> Any:
    """Call a function of `datasets`; its errors become sentences."""
    package = _package(spec)
    try:
        return getattr(package, function)(name, configuration, **options)
    except package.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{spec}: {_message(error)}; check the name, or {hub_client.LOG_IN}.") from error
    except ConnectionError as error:
        raise UserError(
            f"{spec} is not in the cache, {package.config.HF_DATASETS_CACHE}, and the Hub cannot be reached; connect "
            "this machine, or fetch it on another one and copy the cache."
        ) from error
    except Exception as error:  # an unknown split or configuration, files of an unknown type, a full disk, ...
        raise UserError(f"{spec}: datasets cannot open it: {_message(error)}.") from error


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_MESSAGE].rstrip(".") or type(error).__name__


def _listed(features: Mapping[str, Any]) -> str:
    """Return the columns of a set with their types, for messages."""
    return ", ".join(f"{name} ({getattr(x, 'dtype', None) or type(x).__name__})" for name, x in features.items())


def split_columns(rest: str) -> tuple[str, dict[str, str]]:
    """Split "?image=COLUMN&label=COLUMN" off the end of `rest`; in the columns' names %26 is a & and %2F a /.

    Raises:
      UserError: another key than "image" and "label", no column, or another place than the end.
    """
    place, columns = rest, {}
    if match := _COLUMNS.search(rest):
        place = rest[: match.start()] + rest[match.end() :]
        pairs = (part.partition("=") for part in match[1].split("&"))
        columns = {key: urllib.parse.unquote(name) for key, _, name in pairs}
        if not all(columns.values()) or not columns.keys() <= {"image", "label"}:
            raise UserError(f"source {PREFIX + rest!r} ends in {match[0]!r}; {_EXPECTED}.")
    if "?" in place and not place.startswith(_LOCAL):  # folders may be called so
        raise UserError(f"source {PREFIX + rest!r} has a ? without columns, or before its end; {_EXPECTED} at the end.")
    return place, columns


def image_column(spec: str, features: Mapping[str, Any], key: str = SourceOptions.image_key, remedy: str = "") -> str:
    """Return the column of images: `key`, or if that is the default and no column, the only one of type Image.

    Args:
      spec: spec of the set, for the message.
      features: columns of the set.
      key: column that the config or the spec names.
      remedy: the message's advice, "" for setting the config's key.

    Raises:
      UserError: no such column, or several; the message lists all columns.
    """
    if key in features:
        return key
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if key == SourceOptions.image_key and len(images) == 1:
        return images[0]
    others = f"of images; its columns are {_listed(features)}"
    if len(images) > 1:
        others = f"and several of images, {', '.join(images)}"
    fault = f"{spec} has no column {key!r} {others}"
    raise UserError(f"{fault}; {remedy}.") if remedy else MissingColumnError(fault, "data.image_key")


def caption_columns(spec: str, features: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of captions: `keys`, or if these are the default and no columns, the first of `_CAPTIONS`.

    A key is a column, or COLUMN/FIELD of a nested one.

    Raises:
      UserError: no such column; the message lists all columns.
    """
    missing = [key for key in keys if key.partition("/")[0] not in features]
    if not missing:
        return tuple(keys)
    usual = [name for name in _CAPTIONS if name in features]
    if tuple(keys) == SourceOptions.text_keys and usual:
        return (usual[0],)
    raise MissingColumnError(
        f"{spec} has no column {missing[0]!r} of captions; its columns are {_listed(features)}", "data.text_keys"
    )


class Images(labelled.Files):
    """Encoded images in a column of a `datasets.Dataset`: bytes, {"bytes", "path"}, or paths or URLs.

    A set of the Hub may name files in the caches of its packages; other files of this machine are bad samples.
    """

    def __init__(self, rows: Any, column: str, rest: str) -> None:
        self._spec = "" if rest.startswith(_LOCAL) else f"{PREFIX}{rest}"
        if type(rows.features[column]).__name__ == "Image":
            rows = rows.cast_column(column, _package("a column of images").Image(decode=False))
        self._rows, self._column = rows.select_columns([column]), column

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Return the path or URL of the image, or "row N" if it has none."""
        value = self._rows[index][self._column]
        value = value.get("path") if isinstance(value, dict) else value
        return value if isinstance(value, str) and value else f"row {index}"

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield the number and size in bytes of each image, or its file name and 0."""
        import pyarrow.compute

        index = 0
        for table in self._rows.with_format("arrow").iter(_BATCH):
            for array in table.column(self._column).chunks:
                if pyarrow.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
                    array = array.field("bytes")
                binary = pyarrow.types.is_binary(array.type) or pyarrow.types.is_large_binary(array.type)
                values = pyarrow.compute.call_function("binary_length", [array]) if binary else array
                for value in values.to_pylist():
                    name, size = (value.rpartition("/")[2], 0) if isinstance(value, str) else (str(index), value or 0)
                    yield name, size if isinstance(size, int) else 0
                    index += 1

    def __getitem__(self, index: int) -> bytes:  # ty: ignore[incompatible-method-override] no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._rows[index][self._column]
        path = value.get("path") if isinstance(value, dict) else None
        return image_of(value, str(index), table="" if path and _is_cached(path) else self._spec)[0]


def _is_cached(path: str) -> bool:
    """Whether a file is in a cache of `datasets` or huggingface_hub, where they store the files of sets."""
    from huggingface_hub import constants  # `datasets` needs it

    config = _package("a file of a set").config
    folders = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return any(pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) for folder in folders)


class HubPairs(Source):
    """Image-text pairs of a split."""

    def __init__(self, rest: str, options: SourceOptions) -> None:
        """Opens the split, see `open_split` and the config keys of `options`.

        "?label=COLUMN" at the end of `rest` is for evaluating the pairs by their labels.

        Raises:
          UserError: a set that cannot be opened or has no rows, or no columns of images and captions.
        """
        spec = f"{PREFIX}{rest}"
        place, columns = split_columns(rest)
        if "image" in columns:
            raise UserError(f"source {spec!r} names a column of images; of pairs it is data.image_key.")
        rows = open_split(place)
        if (key := options.tags_key) and key.partition("/")[0] not in rows.features:
            fault = f"{spec} has no column {key!r}; its columns are {_listed(rows.features)}"
            raise MissingColumnError(fault, "data.tags_key")
        self.options = dataclasses.replace(
            options,
            image_key=image_column(spec, rows.features, options.image_key),
            text_keys=caption_columns(spec, rows.features, options.text_keys),
        )
        if not len(rows):
            raise UserError(f"{spec} has no rows; name another split.")
        keys = [*self.options.text_keys, *filter(None, [self.options.tags_key])]
        self.images = Images(rows, self.options.image_key, rest)
        self._texts = rows.select_columns(list(dict.fromkeys(key.partition("/")[0] for key in keys)))
        self._fingerprint: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        image, texts = self.images[index], self._texts[index]

        def read(key: str) -> str | list[str]:
            values = json_strings(texts, key)
            return values[0] if len(values) == 1 else values

        return pair(image, str(index), self.options, read)

    def describe(self, index: int) -> dict[str, str]:
        return {"row": str(index)}

    def remarks(self) -> Iterator[str]:
        """Yield the names of the columns that are read."""
        yield f"columns: images {self.options.image_key!r}, captions {', '.join(map(repr, self.options.text_keys))}"

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows, the columns, and a hash of the captions and of the sizes of images."""
        if not self._fingerprint:
            digest = hashlib.blake2b(digest_size=16)
            for batch in self._texts.iter(_BATCH):
                digest.update(repr(sorted(batch.items())).encode("utf-8", "surrogatepass"))
            for size in self.images.sizes():
                digest.update(repr(size).encode("utf-8", "surrogatepass"))
            columns = {"image": self.options.image_key, "text": list(self.options.text_keys)}
            self._fingerprint = {"samples": len(self), "hash": digest.hexdigest(), "columns": columns}
        return self._fingerprint


def open_labelled(rest: str, image_key: str = SourceOptions.image_key) -> labelled.Labelled:
    """Open the images of a split, in the classes of column "label" or of the only column of type ClassLabel.

    Args:
      rest: as for `open_split`; "?image=COLUMN&label=COLUMN" at its end names the columns.
      image_key: the column of images if `rest` names none.

    Raises:
      UserError: a set that cannot be opened, no such columns, or rows without a label.
    """
    place, columns = split_columns(rest)
    spec, rows = f"{PREFIX}{rest}", open_split(place)
    classes = [name for name, feature in rows.features.items() if hasattr(feature, "names")]
    column = columns.get("label", "label" if "label" in classes or len(classes) != 1 else classes[0])
    if column not in classes:
        several = f"; add ?label= and one of {', '.join(classes)} to the spec" if classes else ""
        raise UserError(
            f"{spec} has no column {column!r} of classes{several}; its columns are {_listed(rows.features)}."
        )
    names = list(rows.features[column].names)
    key = image_column(spec, rows.features, columns.get("image", image_key), "name one in the spec, ?image=COLUMN")
    images = Images(rows, key, rest)
    labels = np.array([-1 if label is None else label for label in rows.select_columns([column])[column]], np.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"{spec} has rows without a label, or none at all; name another split.")
    return labelled.Labelled("image", images, labels, names)


class HubSets(SourceKind):
    """`hf:ORG/NAME[@REVISION][/CONFIGURATION]/SPLIT` and `hf:/PATH`, for labels with ?image=COLUMN&label=COLUMN."""

    forms: ClassVar = {
        "hf:ORG/NAME/SPLIT": Form(
            pairs="a data set of the Hugging Face Hub, columns of images and captions",
            labels="a data set of the Hugging Face Hub, columns of images and labels of classes",
        ),
        "hf:ORG/NAME": Form(splits="a data set of the Hugging Face Hub, columns of images and labels of classes"),
    }

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        return ("datasets",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> Source:
        return open_labelled(rest, options.image_key) if labels else HubPairs(rest, options)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the data set lists the split; a damaged split is an error when it is opened."""
        return split in split_names(split_columns(f"{rest}/{split}")[0].removesuffix(f"/{split}"))
