"""Images with their embeddings, to compare with texts and other images; a file keeps the embeddings.

New files are embedded, vanished ones forgotten. A row of the file is an image; its id is name, size and time of the
image's file.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.commands.embed import Images, Progress, Source, Tars, embed_images, open_images, put_in_place
from xclip_jax.core import storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.data import embeddings
from xclip_jax.model import TEMPLATES, Model

_DEFAULT_NAMES = 100
_PART = 256  # images between two lines of progress


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
      names: labels for questions that have none: the images' captions, or else the names of their folders.
    """

    def __init__(self, model: Model, source: Source, embedded: Embedded) -> None:
        self._model, self._source, self._lock = model, source, threading.Lock()
        self._numbers, self._texts, self._rows = embedded
        paths = [source.name(i) for i in self._numbers]
        start = os.path.commonprefix(paths).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
        self._names = [path[start:] for path in paths]
        captions = [text.strip().partition("\n")[0].strip() for text in self._texts]
        folders = {pathlib.PurePath(path).parent.name.replace("_", " ") for path in paths}
        labels = dict.fromkeys(filter(None, captions)) or (sorted(folders) if len(folders) > 1 else [])
        self.names = list(labels)[:_DEFAULT_NAMES]

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
          UserError: content that is not an image.
          IndexError: no image of that number.
        """
        names = list(names or self.names)
        prepared = None if isinstance(image, int) else self._model.prepare(image)
        with self._lock:
            row = self._rows[image] if prepared is None else self._model.encode_prepared([prepared])[0]
            rows = self._model.encode_text([TEMPLATES[0].replace("{}", name) for name in names]) if names else None
        scores = np.empty(0) if rows is None else rows @ row
        best = [(names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:count]]
        return best, [match for match in self._nearest(row, count + 1) if match.image != image][:count]

    def _nearest(self, row: np.ndarray, count: int) -> list[Match]:
        scores = self._rows @ row
        best = np.argsort(-scores, kind="stable")[:count]
        return [Match(int(i), self._names[i], self._texts[i], float(scores[i])) for i in best]

    def content(self, image: int) -> bytes:
        """Return the file of an image of the folder; raise `IndexError` if there is none, `UserError` if it is gone."""
        number = self._numbers[image]
        try:
            return self._source.read(number)[0]
        except (OSError, UserError) as error:  # their messages name its path
            raise UserError(f"The file of image {image}, {self._names[image]!r}, can no longer be read.") from error


def make_index(model: Model, images: str, *, cache: str = "") -> Index:
    """Embed the images that are not in the cache, and return the index of all.

    Args:
      model: embeds the images.
      images: a folder, or files as `xclip_jax.commands.embed` names them.
      cache: folder with a file for each model and `images`; by default one in the cache folder.

    Raises:
      UserError: no images, or the cache cannot be used.
    """
    source = open_images(images)
    folder = pathlib.Path(cache).expanduser() if cache else storage.cache_dir() / "search"
    place = images if storage.is_remote(images) else os.path.abspath(os.path.expanduser(images))
    key = hashlib.sha256(json.dumps([model.fingerprint(), place]).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return Index(model, source, embed(model, source, folder / f"{key}.npz"))


class _Row(NamedTuple):
    kind: str  # "image", or "bad" with the reason as text
    text: str
    embedding: np.ndarray


def embed(model: Model, source: Images | Tars, file: pathlib.Path) -> Embedded:
    """Return the embeddings of images; compute the ones that `file` lacks, and store all.

    Raises:
      UserError: a damaged file; no image can be read.
    """
    known: dict[str, _Row] = {}
    if file.exists():
        columns = embeddings.read(file)
        rows = map(_Row, columns["kind"], columns["text"], columns["embedding"])
        known = dict(zip(columns["id"], rows, strict=True))
    ids = list(_ids(source))
    missing = [i for i, image in enumerate(ids) if image not in known]
    try:
        _compute(model, source, missing, ids, known)
    finally:  # also of Ctrl-C
        if missing and known:
            _write(file, {image: known[image] for image in ids if image in known})
    ordered = [known[image] for image in ids]
    bad = [f"{source.name(i)}: {row.text}" for i, row in enumerate(ordered) if row.kind == "bad"]
    if bad:
        log0(f"{len(bad):,} images cannot be read; the first is {bad[0]}")
    good = {i: row for i, row in enumerate(ordered) if row.kind == "image"}
    if not good:
        raise UserError(f"no image can be read; the first is {bad[0]}.")
    # Captions of files are read at each start; in a tar they change with the tar.
    texts = [source.caption(i) if isinstance(source, Images) else row.text for i, row in good.items()]
    return Embedded(list(good), texts, np.stack([row.embedding for row in good.values()]))


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


def _compute(
    model: Model, source: Images | Tars, missing: Sequence[int], ids: Sequence[str], known: dict[str, _Row]
) -> None:
    """Add the rows of the missing images to `known`."""
    progress, done = Progress("images", 0, len(missing)), 0
    for part in embed_images(model, lambda n: source.read(missing[n]), len(missing), _PART):
        for n, (text, embedding) in enumerate(zip(part.texts, part.rows, strict=True)):
            kind, text = ("bad", str(part.bad[n])) if n in part.bad else ("image", text)
            known[ids[missing[done + n]]] = _Row(kind, text, embedding)
        done += len(part.rows)
        progress.after(done, len(part.bad))


def _write(path: pathlib.Path, rows: Mapping[str, _Row]) -> None:
    """Write a file of rows by the ids of their images, completely or not at all."""
    kinds, texts, embedded = zip(*rows.values(), strict=True)
    columns = {"kind": kinds, "id": list(rows), "text": texts, "embedding": np.stack(embedded)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    embeddings.Npz().write(temporary, columns)
    put_in_place(temporary, path)
