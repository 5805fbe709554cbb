"""Labelled items, to fine-tune and to evaluate: images in classes, and GLUE's texts.

A labelled source is a source as `data.sources` defines it whose records have "label", a number, and of "image" and
"text" what its items are. It also has `labels()`, all labels at once (n,) without decoding an image, `names`, those of
the classes (none where labels are numbers to be fitted), and `items`, a sequence of encoded images or of texts. Its
`card()` has "samples", "hash" (of the items' names and sizes, or texts, and of the labels, in their order) and, where
there are classes, "classes".
"""

import csv
import hashlib
import itertools
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax.data import glue
from xclip_jax.data.sources import IMAGE_SUFFIXES, open_tfds
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]
# Those of torchvision's ImageFolder, and GIF.
SUFFIXES = (*IMAGE_SUFFIXES, ".ppm", ".pgm", ".tif", ".tiff")
_TOWERS = {"image": "img", "text": "txt"}
KINDS = ("tfds:NAME/SPLIT", "folder:PATH", "csv:PATH", "glue:TASK/SPLIT", "glue:TASK@FOLDER/SPLIT")


class Field(Sequence):
    """One feature of each record of a data source."""

    def __init__(self, source: Any, key: str) -> None:
        self._source, self._key = source, key

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index][self._key]


class Paths(Sequence):
    """Files, read when they are asked for."""

    def __init__(self, paths: Sequence[pathlib.Path], root: pathlib.Path | None = None) -> None:
        """`root` is the folder that the files belong to."""
        self.paths, self.root = paths, root

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name, below `root`, and size in bytes of each file; -1 where it cannot be read."""
        for path in self.paths:
            try:
                size = path.stat().st_size
            except OSError:
                size = -1
            yield str(path).removeprefix(str(self.root or "")), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        path = self.paths[index]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
                raise BadSample("not a regular file", str(path))
            return path.read_bytes()
        except OSError as error:
            raise BadSample("file cannot be read", str(error)) from error


def read_files(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    """Images, labels and class names of a folder with one sub-folder a class, or of a CSV file with path and label.

    A folder is read as torchvision's ImageFolder reads it: the sub-folders, sorted as strings, are the classes, and
    images in folders below count as theirs; hidden files and folders are left out. In a CSV file each distinct label is
    a class, in alphabetical or, where all are integers, numerical order. Several labels of one image, with | between
    them, give bool (n, classes), in which an image may have none.

    Raises:
      UserError: no images or classes, a class without images, a row without a path or label, or images that do not
        exist; the message begins with `name`.
    """
    path = path.expanduser()
    if path.is_dir():
        return _read_folder(name, path)
    if not path.is_file():
        raise UserError(f"{name}: {str(path)!r} does not exist; name a folder or a CSV file.")
    return _read_table(name, path)


def _read_folder(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    images = [_images(path / folder) for folder in names]
    if not any(images):
        raise UserError(f"{name}: folder {str(path)!r} holds no images in sub-folders; make one for each class.")
    if empty := [folder for folder, inside in zip(names, images, strict=True) if not inside]:
        raise UserError(
            f"{name}: class folders {', '.join(map(repr, empty[:5]))}{' and more' if len(empty) > 5 else ''} of "
            f"{str(path)!r} hold no images ({', '.join(SUFFIXES)}); add images, or delete the folders."
        )
    labels = np.repeat(np.arange(len(names)), [len(inside) for inside in images])
    return Paths([image for inside in images for image in inside], path), labels, names


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Images in `folder` and the folders below it, in ImageFolder's order."""
    inside = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside.append((root, sorted(n for n in files if n.lower().endswith(SUFFIXES) and not n.startswith("."))))
    return [pathlib.Path(root, file) for root, files in sorted(inside) for file in files]


def _read_table(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    images, cells = [], []
    for line, image, label in _rows(name, path):
        images.append(path.parent / os.path.expanduser(image))
        cells.append((line, [word for part in label.split("|") if (word := part.strip())], "|" in label))
    if missing := [image for image in images if not image.is_file()]:
        raise UserError(f"{name}: {len(missing)} images of {str(path)!r} do not exist, {str(missing[0])!r} first.")
    several = any(separated for *_, separated in cells)
    for line, words, _ in cells:
        if not words and not several:
            raise UserError(f"{name}: line {line} of {str(path)!r} has no label; give it one, or delete the line.")
    distinct = {word for _, words, _ in cells for word in words}
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in distinct)
    names = sorted(distinct, key=lambda word: (int(word) if numbers else 0, word))
    index = {word: i for i, word in enumerate(names)}
    if not several:
        return Paths(images, path.parent), np.array([index[words[0]] for _, words, _ in cells]), names
    labels = np.zeros((len(cells), len(names)), bool)
    for row, (_, words, _) in zip(labels, cells, strict=True):
        row[[index[word] for word in words]] = True
    return Paths(images, path.parent), labels, names


def _rows(name: str, path: pathlib.Path) -> list[tuple[int, str, str]]:
    """(line, path, label) of each row of a CSV file in UTF-8, with or without a byte order mark."""
    line, rows = 0, []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            for row in filter(None, reader):
                line = reader.line_num
                if fault := _fault(header, row):
                    raise UserError(f"{name}: line {line} of {str(path)!r} {fault}.")
                cells = dict(zip(header, row, strict=False))
                rows.append((line, cells.get("path", ""), cells.get("label", "")))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: CSV file {str(path)!r} is not UTF-8 (byte {error.object[error.start]:#x}: {error.reason}); save "
            "it in UTF-8, or convert it, as with iconv -f latin1 -t utf8."
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{name}: CSV file {str(path)!r} cannot be read behind line {line}: {error}; quotes must be paired."
        ) from error
    if not rows or not {"path", "label"} <= set(header):
        raise UserError(f"{name}: CSV file {str(path)!r} must have the columns path and label, and a row.")
    return rows


def _fault(header: Sequence[str], row: Sequence[str]) -> str:
    """What is wrong with a row of a CSV file, and the remedy; "" for nothing."""
    if any("\n" in cell for cell in row):
        return "ends a quoted cell of several lines; quotes must be paired"
    if any(cell.strip() for cell in row[len(header) :]):
        return f"has {len(row)} cells for {len(header)} columns; put quotes around cells with commas"
    if "path" in header and not dict(zip(header, row, strict=False)).get("path", "").strip():
        return "has no path; give it one, or delete the line"
    return ""


def _card(samples: int, names: Sequence[str], content: Iterable[Any]) -> dict[str, Any]:
    digest = hashlib.blake2b(repr(samples).encode(), digest_size=16)
    for part in content:
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return {"samples": samples, "hash": digest.hexdigest()} | ({"classes": list(names)} if names else {})


class Labelled:
    """Items whose labels are in memory."""

    version = ""

    def __init__(self, key: str, items: Sequence[Any], labels: np.ndarray, names: Sequence[str]) -> None:
        """`key` says what the items are, "image" (encoded or uint8 (h, w, 3)) or "text"."""
        self.key, self.items, self.names, self._labels = key, items, list(names), labels

    def __len__(self) -> int:
        return len(self.items)

    def labels(self) -> np.ndarray:
        """All labels (n,)."""
        return self._labels

    def where(self, index: int) -> dict[str, str]:
        """Path of the image, or the item's number."""
        return {"file": str(self.items.paths[index])} if isinstance(self.items, Paths) else {"row": str(index)}

    def card(self) -> dict[str, Any]:
        """What was read: "samples", "hash" and, of labels that are classes, "classes"."""
        items = self.items.sizes() if isinstance(self.items, Paths) else self.items
        return _card(len(self), self.names, zip(items, self._labels.tolist(), strict=True))

    def __getitem__(self, index: int) -> Record:
        item, label = self.items[index], self._labels[index]
        kind = {"image": item} if self.key == "image" else {"text": [item], "tags": []}
        return kind | {"label": label, "id": str(index)}


class TfdsLabelled:
    """Images of a TFDS split with a feature "label"; nothing is kept in memory."""

    key = "image"

    def __init__(self, spec: str, name: str, split: str, data_dir: str | None) -> None:
        self._arguments, self._name, self._split = (spec, name, split, data_dir), name, split
        self._data, info = open_tfds(name, split, data_dir)
        self.names, self.version = getattr(info.features.get("label"), "names", None), str(info.version)
        if not self.names or "image" not in info.features:
            raise UserError(f"{spec}: TFDS data set {name!r} has no features image and label (of classes).")
        self.items = Field(self._data, "image")
        self._labels: np.ndarray | None = None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A worker process opens the data set itself."""
        return TfdsLabelled, self._arguments

    def __len__(self) -> int:
        return len(self._data)

    def labels(self) -> np.ndarray:
        """All labels (n,)."""
        if self._labels is None:
            self._labels = np.array([self._data[i]["label"] for i in range(len(self))])
        return self._labels

    def card(self) -> dict[str, Any]:
        """What was read; the hash is of name, version and split, since a version of a TFDS data set is for good."""
        return _card(len(self), self.names, [self._name, self.version, self._split])

    def __getitem__(self, index: int) -> Record:
        record = self._data[index]
        return {"image": record["image"], "label": record["label"], "id": str(index)}


def open_source(spec: str, data_dir: str | None = None) -> Labelled | TfdsLabelled:
    """The labelled source `spec`, one of `KINDS`.

    A folder has one sub-folder a class, whose names sorted are the classes; a CSV file has the columns path and label.
    GLUE's splits are train and validation.

    Raises:
      UserError: another kind, nothing there, several labels an image.
    """
    kind, _, rest = spec.partition(":")
    head, _, split = rest.rpartition("/")
    if kind in ("folder", "csv") and rest:
        items, labels, names = read_files(spec, pathlib.Path(rest))
        if labels.ndim != 1:
            raise UserError(f"{spec}: images have several labels; give each one class.")
        return Labelled("image", items, labels, names)
    if kind == "tfds" and head:
        return TfdsLabelled(spec, head, split, data_dir or None)
    if kind == "glue" and head:
        task, _, folder = head.partition("@")
        texts, labels = glue.read(task, split, os.path.expanduser(folder), data_dir or None)
        return Labelled("text", texts, labels, glue.TASKS[task].labels)
    raise UserError(f"labelled source {spec!r} is of no known kind; write {', '.join(KINDS)}.")


def open_sources(
    specs: Sequence[str], data_dir: str, classes: int, fields: Sequence[str] | None = None
) -> list[Labelled | TfdsLabelled]:
    """The labelled sources `specs`, of which a model of `classes` classes learns (1 for labels that are numbers).

    Args:
      specs, data_dir: see `open_source`.
      classes: number of them, `objective.classify.classes`.
      fields: of the batches that they are for, with "image" or "text"; None for any.

    Raises:
      UserError: as `open_source`; another number of classes, classes that differ between sources, items of the wrong
        modality.
    """
    opened = [open_source(spec, data_dir) for spec in specs]
    for spec, source in zip(specs, opened, strict=True):
        if fields is not None and source.key not in fields:
            raise UserError(
                f"source {spec!r} has {source.key}s and objective.classify.tower names the other tower; set it to "
                f"{_TOWERS[source.key]!r}, or name another source."
            )
        if len(source.names or ["a number"]) != classes:
            raise UserError(
                f"source {spec!r} has {len(source.names)} classes and objective.classify.classes is {classes}; "
                "make them equal (1 for labels that are numbers)."
            )
        for first, other in itertools.zip_longest(opened[0].names, source.names):
            if first != other:
                raise UserError(
                    f"sources {specs[0]!r} and {spec!r} have different classes: {first!r} of the first is {other!r} in "
                    "the other; classes must be the same, in the same order."
                )
    return opened
