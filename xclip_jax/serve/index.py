"""Images with their embeddings, which texts and other images are compared with."""

import collections
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.data import embeddings
from xclip_jax.data.assets import cache_dir
from xclip_jax.embed import EmbeddingJob
from xclip_jax.embed_sources import Source, open_images
from xclip_jax.errors import BadSample, UserError
from xclip_jax.inference import TEMPLATES, Model

MAX_NAMES = 500  # that an image is compared with
MAX_TEXT = 1000  # letters of a text, or of a name
_DEFAULT_NAMES = 100


class Match(NamedTuple):
    """An image of the folder: its number, path and caption, and its cosine with what was asked for."""

    image: int
    name: str
    text: str
    score: float


class Index:
    """A model, images, and their embeddings. Several threads may use it; they wait for one another.

    Attributes:
      names: that an image is compared with where a question has none.
    """

    def __init__(self, model: Model, source: Source, columns: dict, names: Sequence[str] = ()) -> None:
        """Make an index of what `xclip_jax.embed` wrote of the images of `source`.

        Args:
          model: of the embeddings.
          source: of the images.
          columns: of the file of embeddings, see `embeddings.read`.
          names: that images are compared with; by default their captions, or else the names of their folders.

        Raises:
          UserError: embeddings of images that `source` does not have.
        """
        self._model, self._source, self._lock = model, source, threading.Lock()
        self._ids, self._texts, self._rows = columns["id"], columns["text"], columns["embedding"]
        self._numbers = _numbers(source, self._ids, model.prepare)
        self.names = list(names) or _default_names(self._ids, self._texts)
        self._of_names: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))

    def __len__(self) -> int:
        return len(self._ids)

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
        best = np.argsort(-scores, kind="stable")[:count]
        return [Match(int(i), self._ids[i], self._texts[i], float(scores[i])) for i in best]

    def content(self, image: int) -> bytes:
        """Return the file of an image of the folder. Raises as `by_image`."""
        return self._source.read(self._numbers[self._checked(image)])[0]

    def _checked(self, image: int) -> int:
        if not 0 <= image < len(self):
            raise IndexError(f"there is no image {image}; there are {len(self)}, from 0 on")
        return image


def _numbers(source: Source, ids: Sequence[str], prepare: Callable[[bytes], np.ndarray]) -> list[int]:
    """Numbers in `source` of the images with these ids, in order.

    Samples of one key in a tar have one id. Where some of them have no embedding, those that can be read have one.
    """
    having = collections.defaultdict(list)
    for i in range(len(source)):
        having[source.name(i)].append(i)

    def readable(i: int) -> bool:
        try:
            prepare(source.read(i)[0])
        except BadSample:
            return False
        return True

    for name, count in collections.Counter(ids).items():
        if len(having[name]) > count:
            having[name] = list(filter(readable, having[name]))
        if len(having[name]) != count:
            raise UserError(
                f"--cache is of other images: it has {count} of {name!r}, and --images has {len(having[name])}; delete "
                "it to embed again, or set another --cache."
            )
    of_name = {name: iter(numbers) for name, numbers in having.items()}
    return [next(of_name[name]) for name in ids]


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
    """Embed images, unless a file of their embeddings is there, and return their index.

    Args:
      model: that embeds.
      images: a folder, or files as `xclip_jax.embed` names them.
      cache: .npz or .parquet file of the embeddings; by default one of these images and weights in the cache folder.
      names: see `Index`.

    Raises:
      UserError: no images, or a file of other embeddings or of images elsewhere.
    """
    source = open_images(images)
    if not cache:
        # The digest of tars is without their paths, which are part of the ids.
        key = hashlib.sha256(f"{model.fingerprint()} {source.digest()}".encode())
        for i in range(len(source)):
            key.update(f"\n{source.name(i)}".encode())
        folder = cache_dir() / "search"
        folder.mkdir(parents=True, exist_ok=True)
        cache = os.fspath(folder / f"{key.hexdigest()[:16]}.npz")
    EmbeddingJob(model, {"image": source}, cache, option="--cache").run()
    return Index(model, source, embeddings.read(cache), names)
