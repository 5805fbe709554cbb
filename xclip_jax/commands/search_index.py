"""Images with their embeddings, to compare with texts and other images; embeddings are kept by file.

New files are embedded, vanished ones forgotten. A cache is a folder with one file, `_FILE`, and while images are being
embedded one more for each `_PART` of them. A row is an image; its id is name, size and time of the image's file.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.commands.embed import Progress, embed_images, put_in_place
from xclip_jax.commands.embed_sources import Images, Source, Tars, open_images
from xclip_jax.core import locks, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import cache_dir
from xclip_jax.data import embeddings
from xclip_jax.model import TEMPLATES, Model

MAX_NAMES = 500  # of one question
MAX_TEXT = 1000  # letters of a text, or of a name
_DEFAULT_NAMES = 100
_FILE = "embeddings.npz"
_BAD = "bad.jsonl"  # images that cannot be read
_PART = 256  # images, which an interruption loses
_KEPT = 8  # caches
_NAME = re.compile(r"[0-9a-f]{16}")  # of a cache, see `folder_of`


class Match(NamedTuple):
    """An image of the folder: its number, path in the folder and caption, and its cosine with a question."""

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
      names: labels for questions that have none.
    """

    def __init__(self, model: Model, source: Source, embedded: Embedded, names: Sequence[str] = ()) -> None:
        """Make an index of images that are embedded.

        Args:
          model: of the embeddings.
          source: of the images.
          embedded: images of `source`, and their embeddings.
          names: labels; by default the images' captions, or else the names of their folders.
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
        """Return the best names of an image with their cosines, and the most similar images, best first.

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
        """Return embeddings (n, e) of names, which are kept until a question has other names."""
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
        except (OSError, UserError) as error:  # their messages name its path
            raise UserError(f"The file of image {image}, {self._names[image]!r}, can no longer be read.") from error

    def _checked(self, image: int) -> int:
        if not 0 <= image < len(self):
            raise IndexError(f"there is no image {image}; there are {len(self)}, from 0 on")
        return image


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    """Return paths relative to their common folder."""
    start = os.path.commonprefix(list(paths)).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
    return [path[start:] for path in paths]


def _default_names(ids: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the first lines of the captions, or else the names of the folders if they are several.

    At most `_DEFAULT_NAMES`, none longer than `MAX_TEXT`.
    """
    folders = _lines(pathlib.PurePath(name).parent.name.replace("_", " ") for name in ids)
    names = _lines(texts) or (folders if len(folders) > 1 else [])
    return names[:_DEFAULT_NAMES]


def _lines(texts: Iterable[str]) -> list[str]:
    """Return the first lines of texts, each once, without empty ones and ones longer than `MAX_TEXT`."""
    lines = dict.fromkeys("".join(text.strip().splitlines()[:1]).strip() for text in texts)
    return [line for line in lines if 0 < len(line) <= MAX_TEXT]


def make_index(model: Model, images: str, *, cache: str = "", names: Sequence[str] = ()) -> Index:
    """Embed the images that are not in the cache, and return the index of all.

    Args:
      model: embeds the images.
      images: a folder, or files as `xclip_jax.commands.embed` names them.
      cache: folder of caches; by default one in the cache folder.
      names: labels, see `Index`.

    Raises:
      UserError: no images, or the cache cannot be used.
    """
    source = open_images(images)
    parent = pathlib.Path(cache).expanduser() if cache else cache_dir() / "search"
    return Index(model, source, embed(model, source, folder_of(model, images, parent)), names)


# The cache.


class _Row(NamedTuple):
    kind: str  # "image", or "bad" with the reason as text
    text: str
    embedding: np.ndarray


def folder_of(model: Model, pattern: str, parent: pathlib.Path) -> pathlib.Path:
    """Return the folder of the embeddings of these images by this model."""
    place = pattern if storage.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    key = json.dumps([model.fingerprint(), place])
    return parent / hashlib.sha256(key.encode()).hexdigest()[:16]


def embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    """Return the embeddings of images; compute and store the ones that `folder` lacks.

    Raises:
      UserError: another process writes there; damaged files; no image can be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locks.lock(folder / _FILE, blocking=False):
            embedded = _embed(model, source, folder)
            _delete_oldest(folder.parent)
            _return_memory()
    except locks.HeldError as error:
        raise UserError(
            f"{folder} is being written by another process; wait for it, or set another --cache."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--cache: {error.filename} is a file; name a folder.") from error
    return embedded


def _embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    files, known, ids = sorted(folder.glob("*.npz")), {}, list(_ids(source))
    for file in files:
        columns = embeddings.read(file)
        rows = map(_Row, columns["kind"], columns["text"], columns["embedding"])
        known |= dict(zip(columns["id"], rows, strict=True))
    vanished = len(known.keys() - set(ids))
    missing = [i for i, image in enumerate(ids) if image not in known]
    if missing:
        log0(f"embedding {len(missing):,} of {len(ids):,} images")
        for n, rows in enumerate(_computed(model, source, missing), len(files)):
            part = {ids[i]: row for i, row in rows.items()}
            _write(folder / f"new-{n:06d}.npz", part)
            known |= part
    ordered = [known[image] for image in ids]
    if missing or vanished or len(files) != 1:
        _write(folder / _FILE, dict(zip(ids, ordered, strict=True)))
        for file in folder.glob("new-*.npz"):
            file.unlink()
    os.utime(folder / _FILE)
    bad = [(source.name(i), row.text) for i, row in enumerate(ordered) if row.kind == "bad"]
    (folder / _BAD).write_text("".join(json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in bad))
    if bad:
        log0(f"{len(bad):,} images cannot be read; they are listed in {folder / _BAD}")
    good = {i: row for i, row in enumerate(ordered) if row.kind == "image"}
    if not good:
        raise UserError(f"no image can be read; the reasons are in {folder / _BAD}.")
    # Captions of files are read at each start; in a tar they change with the tar.
    texts = [source.caption(i) if isinstance(source, Images) else row.text for i, row in good.items()]
    return Embedded(list(good), texts, np.stack([row.embedding for row in good.values()]))


def _return_memory() -> None:
    """Give memory that decoding has freed back to the system: glibc keeps it in a heap of each thread."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _ids(source: Images | Tars) -> Iterator[str]:
    """Yield name, size and time of the file of each image, all different."""
    counts: collections.Counter = collections.Counter()
    stamp = functools.cache(_stamp)
    for i in range(len(source)):
        name = source.name(i)
        counts[name] += 1  # a tar may have a key several times
        path = source.paths[i] if isinstance(source, Images) else source.source.describe(i)["tar"]
        yield f"{name}\t{counts[name]} {stamp(path)}"


def _stamp(path: str) -> str:
    """Return size and time of a local file; "" for a missing one, and in buckets, where each costs a request."""
    try:
        return "" if storage.is_remote(path) else "{} {}".format(*storage.stat(path))
    except OSError:
        return ""


def _computed(model: Model, source: Images | Tars, missing: Sequence[int]) -> Iterator[dict[int, _Row]]:
    """Yield the rows of the missing images by their numbers, a part at a time."""
    progress, bad = Progress("images", 0, len(missing)), 0
    for part in embed_images(model, lambda n: source.read(missing[n]), len(missing), _PART):
        rows = {}
        for n, (text, embedding) in enumerate(zip(part.texts, part.rows, strict=True)):
            error = part.bad.get(n)
            row = _Row("bad", str(error), embedding) if error else _Row("image", text, embedding)
            rows[missing[part.start + n]] = row
        yield rows
        bad += len(part.bad)
        progress.after(part.start + len(rows), bad)


def _write(path: pathlib.Path, rows: Mapping[str, _Row]) -> None:
    """Write a file of rows by the ids of their images, completely or not at all."""
    kinds, texts, embedded = zip(*rows.values(), strict=True)
    columns = {"kind": kinds, "id": list(rows), "text": texts, "embedding": np.stack(embedded)}
    embeddings.Npz().write(path.with_suffix(".tmp"), columns)
    put_in_place(path.with_suffix(".tmp"), path)


def _delete_oldest(parent: pathlib.Path) -> None:
    """Delete all caches but the `_KEPT` that were used last and the ones in use."""
    caches = (file for file in parent.glob(f"*/{_FILE}") if _NAME.fullmatch(file.parent.name))
    used = {file.parent: file.stat().st_mtime for file in caches}
    for folder in sorted(used, key=used.__getitem__, reverse=True)[_KEPT:]:
        with contextlib.suppress(locks.HeldError), locks.lock(folder / _FILE, blocking=False):
            shutil.rmtree(folder)
