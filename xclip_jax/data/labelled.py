"""Labelled items: images in folders of classes or listed in a CSV file, and texts."""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, LazySequence, Record, Source, display_name, read_csv

__all__ = ["Labelled"]


def file_size(path: str | os.PathLike) -> int:
    """Return the size of a file in bytes, -1 if it does not exist."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class Paths(LazySequence):
    """Encoded images in local files, read on access; names in fingerprints are relative to `root`."""

    def __init__(self, paths: Sequence[pathlib.Path], root: pathlib.Path | None = None) -> None:
        self.paths = paths
        self.root = root
        super().__init__(len(paths), self._image, lambda i: str(paths[i]), self._listed)

    def _listed(self) -> Iterator[tuple[str, int]]:
        return ((str(path).removeprefix(str(self.root or "")), file_size(path)) for path in self.paths)

    def _image(self, index: int) -> bytes:
        try:
            return storage.read(str(self.paths[index]), MAX_BYTES["image"])
        except OSError as error:
            raise storage.unreadable(error) from error


def read_files(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    """Return images, labels and class names of a folder with one sub-folder per class, or a CSV file of path and label.

    Folders are read like torchvision's ImageFolder. In a CSV file each distinct label is a class, sorted as numbers if
    all are integers. If a | separates several labels of an image, the labels are bool (n, classes), and an image may
    have none. A `UserError` begins with `name`.
    """
    path = path.expanduser()
    if path.is_file():
        return _read_table(name, path)
    folders = path.iterdir() if path.is_dir() else ()
    names = sorted(entry.name for entry in folders if entry.is_dir() and not entry.name.startswith("."))
    images = [images_in(path / folder) for folder in names]
    empty = [folder for folder, inside in zip(names, images, strict=True) if not inside]
    if empty or not names:
        raise UserError(
            f"{name}: {str(path)!r} does not exist, or is not a folder with images in one sub-folder per class: of "
            f"{len(names)} sub-folders {len(empty)} contain no images, first {empty[:1]}."
        )
    labels = np.repeat(np.arange(len(names)), [len(inside) for inside in images])
    # Folder names may contain any bytes, but class names must be UTF-8.
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    return Paths([pathlib.Path(image) for inside in images for image in inside], path), labels, names


def images_in(folder: pathlib.Path) -> list[str]:
    """Return the images in `folder` and visible folders below it, in ImageFolder's order.

    Raises `OSError` if a folder cannot be listed, since the set would be incomplete.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    inside = []  # strings: a path object for each of a million files would take ten seconds
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not (name.startswith(".") or _leads_back(root, name))]
        names = sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        start = str(pathlib.Path(root, "x"))[:-1]
        inside.append((root, [start + name for name in names]))
    return [file for _, files in sorted(inside) for file in files]


def _leads_back(root: str, name: str) -> bool:
    """Whether a folder in `root` is a link to an ancestor; following it would list the same files twice."""
    link = pathlib.Path(root, name)
    return link.is_symlink() and any(place.resolve().is_relative_to(link.resolve()) for place in link.parents)


def _read_table(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    with storage.unreadable_as(f"{name}: {str(path)!r} is not a CSV file with the columns path and label"):
        table = read_csv(str(path), ("path", "label"))
        places = table["path"].to_pylist()
        cells = table["label"].to_pylist()
    images = [path.parent / os.path.expanduser(place) for place in places]
    words = [list(filter(None, map(str.strip, cell.split("|")))) for cell in cells]
    several = any("|" in cell for cell in cells)
    distinct = {word for of_row in words for word in of_row}
    missing = [image for image in images if not os.path.isfile(image)]
    unlabelled = [place for place, of_row in zip(places, words, strict=True) if not of_row and not several]
    if missing or unlabelled or not distinct:
        raise UserError(
            f"{name}: in {str(path)!r} {len(missing)} images do not exist, and {len(unlabelled)} of {len(images)} have "
            f"no label; correct or delete such rows, first {[*map(str, missing), *unlabelled][:1]}."
        )
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in distinct)
    names = sorted(distinct, key=lambda word: (int(word) if numbers else 0, word))
    index = {word: i for i, word in enumerate(names)}
    if not several:
        return Paths(images, path.parent), np.array([index[of_row[0]] for of_row in words]), names
    labels = np.zeros((len(cells), len(names)), bool)
    for row, of_row in zip(labels, words, strict=True):
        row[[index[word] for word in of_row]] = True
    return Paths(images, path.parent), labels, names


class Labelled(Source):
    """Random access to labelled items. A record has "label", a number, and "image", or "text" and "tags".

    Attributes:
      key: kind of the items, "image" or "text".
      items: encoded or uint8 (h, w, 3) images, or strings, in the order of the records.
      names: names of the classes, in the order of their numbers; empty for regression.
      metrics: names of the metrics of a fine-tuned model, the most important first.
      multilabel: whether an item may have several classes, or none.
      version: version of the data set, "" if unknown.
      templates: the data set's own prompts for a class, {c} for its name; empty for the evaluator's.
    """

    version: str = ""
    templates: Sequence[str] = ()

    def __init__(
        self,
        key: str,
        items: Sequence[Any],
        labels: np.ndarray | Sequence[int],
        names: Sequence[str],
        metrics: Sequence[str] = ("top1",),
        identity: Sequence[str] = (),
        read: Callable[[int], tuple[Any, Any]] | None = None,
    ) -> None:
        """Hold items, and as `labels` the number of each item's class, or bool (n, classes); see also the attributes.

        `identity` stands for the items in fingerprints, for which they are else hashed. `read` returns an item and its
        label, if one access gives both.
        """
        self.key = key
        self.items = items
        self.names = list(names)
        self.metrics = metrics
        self._labels = labels
        self._identity = list(identity)
        self._read = read
        self.multilabel = isinstance(labels, np.ndarray) and labels.ndim > 1

    def __len__(self) -> int:
        return len(self.items)

    def labels(self) -> np.ndarray:
        """Return all labels, (n,), or bool (n, classes) with `multilabel`, without decoding images."""
        if not isinstance(self._labels, np.ndarray):
            self._labels = np.array([self._labels[i] for i in range(len(self))])
        return self._labels

    def describe(self, index: int) -> dict[str, str]:
        in_files = getattr(self.items, "sizes", None)
        return {"file": display_name(self.items, index)} if in_files else {"row": str(index)}

    def fingerprint(self) -> dict[str, Any]:
        """Hash the identity or else the labels, with texts or with names and sizes of files."""
        sizes = getattr(self.items, "sizes", None)
        items: Any = sizes() if sizes else self.items
        content = self._identity or zip(items, self.labels().tolist(), strict=True)
        digest = hashlib.blake2b(repr(len(self)).encode(), digest_size=16)
        for part in content:
            digest.update(repr(part).encode("utf-8", "surrogatepass"))
        fingerprint = {"samples": len(self), "hash": digest.hexdigest()}
        return fingerprint | ({"classes": self.names} if self.names else {})

    @property
    def identity(self) -> Any:
        """JSON that identifies the items in hashes of evaluation sets; "" for files and texts."""
        if self._identity:
            return self._identity
        return "" if isinstance(self.items, Paths) or self.key == "text" else self.fingerprint()["hash"]

    def __getitem__(self, index: int) -> Record:
        item, label = self._read(index) if self._read else (self.items[index], self._labels[index])
        fields = {"image": item} if self.key == "image" else {"text": [item], "tags": []}
        return fields | {"label": label, "id": str(index)}


def open_files(name: str, path: str) -> Labelled:
    """Open labelled images; see `read_files` for arguments and errors."""
    paths, labels, names = read_files(name, pathlib.Path(path))
    return Labelled("image", paths, labels, names)


def check_one_class(spec: str, source: Labelled) -> None:
    """Raise `UserError` if items have several classes."""
    if source.multilabel:
        raise UserError(f"{spec}: images have several labels; give each one class.")


def count_classes(spec: str, source: Labelled) -> int:
    """Return the number of classes, 1 for regression; raise `UserError` for a single class."""
    if len(source.names) == 1:
        raise UserError(f"{spec} has one class, {source.names[0]!r}; a classifier learns from two or more.")
    return len(source.names) or 1


def check_sources(
    specs: Sequence[str], sources: Sequence[Labelled], classes: int, fields: Sequence[str] | None = None
) -> None:
    """Raise `UserError` unless the sources `specs` fit a classifier with this number of classes, 1 for regression.

    Each needs items of one of the `fields` of batches, if any are given, one class for each item, and the same classes.
    """
    for spec, source in zip(specs, sources, strict=True):
        check_one_class(spec, source)
        fault = ""
        if fields is not None and source.key not in fields:
            fault = f"{source.key}s, and objective.classify.tower reads {'image' if 'image' in fields else 'text'}s"
        elif count_classes(spec, source) != classes:
            fault = f"{len(source.names)} classes, and objective.classify.classes is {classes} (1 for numbers)"
        elif list(source.names) != list(sources[0].names):
            fault = f"other classes than {specs[0]!r}, or another order"
        if fault:
            raise UserError(f"source {spec!r} has {fault}; change it, or use another source.")
