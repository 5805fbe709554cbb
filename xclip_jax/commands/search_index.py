"""Images with their embeddings, which texts and other images are compared with; embeddings are kept by file.

New files are embedded, vanished ones forgotten. A cache is a folder with one file, `_FILE`, and while images are being
embedded one more for each `_PART` of them. A row is an image with its id: name, size and time of the image's file; and
size and time of its caption's.
"""

import collections
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xclip_jax.commands.embed import Progress, embed_images
from xclip_jax.commands.embed_sources import Images, Source, Tars, open_images
from xclip_jax.core import file_lock, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import embeddings
from xclip_jax.data.assets import cache_dir
from xclip_jax.model import TEMPLATES, Model

MAX_NAMES = 500  # that an image is compared with
MAX_TEXT = 1000  # letters of a text, or of a name
_DEFAULT_NAMES = 100
_FILE = "embeddings.npz"
_BAD = "bad.jsonl"  # images that cannot be read
_PART = 256  # images, which an interruption loses
_KEPT = 8  # caches
_NAME = re.compile(r"[0-9a-f]{16}")  # of a cache, see `folder_of`


class Match(NamedTuple):
    """An image of the folder: its number, path in the folder and caption, and its cosine with what was asked for."""

    image: int
    name: str
    text: str
    score: float


class Embedded(NamedTuple):
    """The images that could be embedded: their numbers in the source, captions, and embeddings fp32 (n, e)."""

    numbers: list[int]
    texts: list[str]
    rows: np.ndarray


class Index:
    """A model, images, and their embeddings. Several threads may use it; they wait for one another.

    Attributes:
      names: that an image is compared with where a question has none.
    """

    def __init__(self, model: Model, source: Source, embedded: Embedded, names: Sequence[str] = ()) -> None:
        """Make an index of images that are embedded.

        Args:
          model: of the embeddings.
          source: of the images.
          embedded: images of `source`, and their embeddings.
          names: that images are compared with; by default their captions, or else the names of their folders.
        """
        self._model, self._source, self._lock = model, source, threading.Lock()
        self._numbers, self._texts, self._rows = embedded
        paths = [source.name(i) for i in self._numbers]
        self._names = _below_common_folder(paths)
        self.names = list(names) or _default_names(paths, self._texts)
        self._of_names: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))

    def __len__(self) -> int:
        return len(self._numbers)

    def by_text(self, text: str, count: int) -> list[Match]:
        """Return the images that fit a text best, best first."""
        with self._lock:
            (row,) = self._model.encode_text([text])
        return self._nearest(row, count)

    def by_image(
        self, image: int | bytes, names: Sequence[str], count: int
    ) -> tuple[list[tuple[str, float]], list[Match]]:
        """Return the best names of an image with their cosines, and the images that are most like it, best first.

        Args:
          image: number of an image of the folder, or the content of a file.
          names: to choose from; by default `self.names`.
          count: how many names and images.

        Raises:
          UserError: content that is not an image, more than `MAX_NAMES` names.
          IndexError: no image of that number.
        """
        if len(names) > MAX_NAMES:
            raise UserError(f"{len(names)} names are too many; give at most {MAX_NAMES}.")
        if isinstance(image, int):
            row = self._rows[self._checked(image)]
        else:
            prepared = self._model.prepare(image)
            with self._lock:
                (row,) = self._model.encode_prepared([prepared])
        names = list(names or self.names)
        scores = self._name_rows(names) @ row if names else np.empty(0)
        best = [(names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:count]]
        near = [match for match in self._nearest(row, count + 1) if match.image != image]
        return best, near[:count]

    def _name_rows(self, names: Sequence[str]) -> np.ndarray:
        """Embeddings (n, e) of names; those of the last question are kept."""
        with self._lock:
            if self._of_names[0] != tuple(names):
                prompts = [TEMPLATES[0].replace("{}", name) for name in names]
                self._of_names = tuple(names), self._model.encode_text(prompts)
            return self._of_names[1]

    def _nearest(self, row: np.ndarray, count: int) -> list[Match]:
        scores = self._rows @ row
        best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]  # sorting all takes as long as the product
        best = best[np.lexsort((best, -scores[best]))]
        return [Match(int(i), self._names[i], self._texts[i], float(scores[i])) for i in best]

    def content(self, image: int) -> bytes:
        """Return the file of an image of the folder. Raises as `by_image`."""
        number = self._numbers[self._checked(image)]
        try:
            return self._source.read(number)[0]
        except (OSError, UserError) as error:  # which name its path
            raise UserError(f"The file of image {image}, {self._names[image]!r}, can no longer be read.") from error

    def _checked(self, image: int) -> int:
        if not 0 <= image < len(self):
            raise IndexError(f"there is no image {image}; there are {len(self)}, from 0 on")
        return image


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    """Paths relative to the folder that all of them are in."""
    start = os.path.commonprefix(list(paths)).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
    return [path[start:] for path in paths]


def _default_names(ids: Sequence[str], texts: Sequence[str]) -> list[str]:
    """First lines of the captions, or else the names of the folders where there are several.

    At most `_DEFAULT_NAMES`, none longer than `MAX_TEXT`.
    """
    folders = _lines(pathlib.PurePath(name).parent.name.replace("_", " ") for name in ids)
    names = _lines(texts) or (folders if len(folders) > 1 else [])
    return names[:_DEFAULT_NAMES]


def _lines(texts: Iterable[str]) -> list[str]:
    """The first line of each text, each once, without empty ones and those longer than `MAX_TEXT`."""
    lines = dict.fromkeys("".join(text.strip().splitlines()[:1]).strip() for text in texts)
    return [line for line in lines if 0 < len(line) <= MAX_TEXT]


def make_index(model: Model, images: str, *, cache: str = "", names: Sequence[str] = ()) -> Index:
    """Embed the images that are not in the cache, and return the index of all.

    Args:
      model: that embeds.
      images: a folder, or files as `xclip_jax.commands.embed` names them.
      cache: folder of caches; by default one in the cache folder.
      names: see `Index`.

    Raises:
      UserError: no images, or the cache cannot be used.
    """
    source = open_images(images)
    parent = pathlib.Path(cache).expanduser() if cache else cache_dir() / "search"
    return Index(model, source, embed(model, source, folder_of(model, images, parent)), names)


# The cache.


class _Row(NamedTuple):
    caption: str  # size and time of its file
    kind: str  # "image", or "bad" with the reason as text
    text: str
    embedding: np.ndarray


def folder_of(model: Model, pattern: str, parent: pathlib.Path) -> pathlib.Path:
    """Return the folder of the embeddings of these images by this model."""
    place = pattern if storage.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    key = json.dumps([model.fingerprint(), place])
    return parent / hashlib.sha256(key.encode()).hexdigest()[:16]


def embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    """Return the embeddings of images, of which those that `folder` lacks are computed and stored there.

    Raises:
      UserError: another process writes there; damaged files; no image can be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.beside(folder / _FILE, wait=False):
            embedded = _embed(model, source, folder)
            _delete_oldest(folder.parent)
            _return_memory()
    except file_lock.HeldError as error:
        raise UserError(
            f"{folder} is being written by another process; wait for it, or set another --cache."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--cache: {error.filename} is a file; name a folder.") from error
    return embedded


def _embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    files, known = sorted(folder.glob("*.npz")), {}
    for file in files:
        known.update(_rows(embeddings.read(file)))
    ids = list(_ids(source))
    if missing := [i for i, (image, _) in enumerate(ids) if image not in known]:
        log0(f"embedding {len(missing):,} of {len(ids):,} images")
        for n, columns in enumerate(_computed(model, source, missing, ids), len(files)):
            _write(folder / f"new-{n:06d}.npz", columns)
            known.update(_rows(columns))
    for i, (image, caption) in enumerate(ids):
        if known[image].caption != caption and known[image].kind == "image":
            with contextlib.suppress(BadSample):  # the image vanished since
                known[image] = known[image]._replace(caption=caption, text=source.read(i)[1])
                missing.append(i)
    if missing or len(files) != 1 or len(known) != len(ids):
        _write(folder / _FILE, _columns(ids, [known[image] for image, _ in ids]))
        for file in folder.glob("new-*.npz"):
            file.unlink()
    os.utime(folder / _FILE)
    good = [i for i, (image, _) in enumerate(ids) if known[image].kind == "image"]
    bad = [(source.name(i), known[image].text) for i, (image, _) in enumerate(ids) if known[image].kind == "bad"]
    _list_bad(bad, folder)
    if not good:
        raise UserError(f"no image can be read; the reasons are in {folder / _BAD}.")
    rows = [known[ids[i][0]] for i in good]
    return Embedded(good, [row.text for row in rows], np.stack([row.embedding for row in rows]))


def _return_memory() -> None:
    """Give memory that decoding has freed back to the system: glibc keeps it in a heap of each thread."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _ids(source: Images | Tars) -> Iterator[tuple[str, str]]:
    """(name, size and time of an image; size and time of its caption) of each image, all different."""
    counts: collections.Counter = collections.Counter()
    stamp = {}
    for i in range(len(source)):
        name = source.name(i)
        path = source.paths[i] if isinstance(source, Images) else source.source.describe(i)["tar"]
        if isinstance(source, Tars) and path not in stamp:
            stamp[path] = _stamp(path)
        caption = _stamp(os.path.splitext(path)[0] + ".txt") if isinstance(source, Images) else ""
        counts[name] += 1  # a tar may have a key several times
        yield f"{name}\t{counts[name]} {stamp.get(path) or _stamp(path)}", caption


def _stamp(path: str) -> str:
    """Size and time of a local file; "" for one that is missing, or in a bucket, where each costs a request."""
    try:
        return "" if storage.is_remote(path) else "{} {}".format(*storage.stat(path))
    except OSError:
        return ""


def _computed(
    model: Model, source: Images | Tars, missing: Sequence[int], ids: Sequence[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the columns of a part of the missing images at a time."""
    progress, bad = Progress("images", 0, len(missing)), 0
    for part in embed_images(model, lambda n: source.read(missing[n]), len(missing), _PART):
        own, rows = [ids[i] for i in missing[part.start : part.start + _PART]], []
        for n, ((_, caption), text, row) in enumerate(zip(own, part.texts, part.rows, strict=True)):
            error = part.bad.get(n)
            rows.append(_Row(caption, "bad", str(error), row) if error else _Row(caption, "image", text, row))
        yield _columns(own, rows)
        bad += len(part.bad)
        progress.after(part.start + len(own), bad)


def _columns(ids: Sequence[tuple[str, str]], rows: Sequence[_Row]) -> dict[str, Any]:
    """Columns of a file; a caption that could not be read again keeps its stamp."""
    return {
        "kind": [row.kind for row in rows],
        "id": [f"{image}\t{row.caption}" for (image, _), row in zip(ids, rows, strict=True)],
        "text": [row.text for row in rows],
        "embedding": np.stack([row.embedding for row in rows]),
    }


def _rows(columns: dict[str, Any]) -> Iterator[tuple[str, _Row]]:
    """Rows of a file by the ids of their images."""
    for id_, kind, text, row in zip(*(columns[key] for key in ("id", "kind", "text", "embedding")), strict=True):
        image, _, caption = id_.rpartition("\t")
        yield image, _Row(caption, kind, text, row)


def _write(path: pathlib.Path, columns: dict[str, Any]) -> None:
    """Write a file that is complete, or not there."""
    temporary = path.with_suffix(".tmp")
    embeddings.Npz().write(temporary, columns)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _list_bad(bad: Iterable[tuple[str, str]], folder: pathlib.Path) -> None:
    lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in bad]
    (folder / _BAD).write_text("".join(lines))
    if lines:
        log0(f"{len(lines):,} images cannot be read; they are listed in {folder / _BAD}")


def _delete_oldest(parent: pathlib.Path) -> None:
    """Delete caches but the `_KEPT` that were used last, and those in use."""
    caches = (file for file in parent.glob(f"*/{_FILE}") if _NAME.fullmatch(file.parent.name))
    used = {file.parent: file.stat().st_mtime for file in caches}
    for folder in sorted(used, key=used.__getitem__, reverse=True)[_KEPT:]:
        with contextlib.suppress(file_lock.HeldError), file_lock.beside(folder / _FILE, wait=False):
            shutil.rmtree(folder)
