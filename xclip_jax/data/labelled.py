"""Labelled items, to fine-tune and to evaluate: images in classes, and GLUE's texts.

A labelled source is a source as `data.sources` defines it whose records have "label", a number, and of "image" and
"text" what its items are. It also has `labels()`, all labels at once (n,) without decoding an image, `names`, those of
the classes (none where labels are numbers to be fitted), and `items`, a sequence of encoded images or of texts.
"""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.data import glue
from xclip_jax.data.sources import IMAGE_SUFFIXES, open_tfds
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]
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

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise BadSample("file cannot be read", str(error)) from error


def read_files(name: str, path: pathlib.Path) -> tuple[Paths, np.ndarray, list[str]]:
    """Images, labels and class names of a folder with one sub-folder a class, or of a CSV file with path and label.

    Labels of a CSV file that are numbers are the classes' own; several of one image, with | between them, give bool
    (n, classes).

    Raises:
      UserError: nothing there, or images that are missing; the message begins with `name`.
    """
    if path.is_dir():
        folders = sorted(p for p in path.iterdir() if p.is_dir())
        files = [(p, i) for i, folder in enumerate(folders) for p in sorted(folder.rglob("*"))
                 if p.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"{name}: folder {str(path)!r} holds no images in sub-folders; make one for each class.")
        return Paths([p for p, _ in files]), np.array([i for _, i in files]), [p.name for p in folders]
    if not path.is_file():
        raise UserError(f"{name}: {str(path)!r} does not exist; name a folder or a CSV file.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "label"} <= set(rows[0]):
        raise UserError(f"{name}: CSV file {str(path)!r} must have the columns path and label, and a row.")
    split = [(row["label"] or "").split("|") for row in rows]
    words = {word for labels in split for word in labels}
    # Labels that are numbers count as such: "10" comes after "9".
    ordered = [str(i) for i in range(max(map(int, words)) + 1)] if all(w.isdigit() for w in words) else sorted(words)
    index = {word: i for i, word in enumerate(ordered)}
    paths = [path.parent / row["path"] for row in rows]
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise UserError(f"{name}: {len(missing)} images of {str(path)!r} do not exist, {str(missing[0])!r} first.")
    if all(len(labels) == 1 for labels in split):
        return Paths(paths), np.array([index[labels[0]] for labels in split]), ordered
    several = np.zeros((len(rows), len(ordered)), bool)
    for row, labels in zip(several, split, strict=True):
        row[[index[word] for word in labels]] = True
    return Paths(paths), several, ordered


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

    def __getitem__(self, index: int) -> Record:
        item, label = self.items[index], self._labels[index]
        kind = {"image": item} if self.key == "image" else {"text": [item], "tags": []}
        return kind | {"label": label, "id": str(index)}


class TfdsLabelled:
    """Images of a TFDS split with a feature "label"; nothing is kept in memory."""

    key = "image"

    def __init__(self, spec: str, name: str, split: str, data_dir: str | None) -> None:
        self._arguments = (spec, name, split, data_dir)
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
        texts, labels = glue.read(task, split, folder, data_dir or None)
        return Labelled("text", texts, labels, glue.TASKS[task].labels)
    raise UserError(f"labelled source {spec!r} is of no known kind; write {', '.join(KINDS)}.")
