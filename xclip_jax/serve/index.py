"""Images with their embeddings, which texts and other images are compared with."""

import functools
import hashlib
import io
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from xclip_jax.data import embeddings
from xclip_jax.data.assets import cache_dir
from xclip_jax.data.transforms import decode
from xclip_jax.embed import Job
from xclip_jax.embed_sources import Source, open_images
from xclip_jax.errors import UserError
from xclip_jax.inference import TEMPLATES, Model

THUMBNAIL = 280  # longest side, pixels
MAX_NAMES = 500  # that an image is compared with
_DEFAULT_NAMES = 100
_THUMBNAILS = 1024  # that are kept in memory


class Match(NamedTuple):
    """An image of the folder: its number, path and caption, and its cosine with what was asked for."""

    image: int
    name: str
    text: str
    score: float


class Index:
    """A model, images, and their embeddings. Several threads may ask; they wait for one another.

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
        """
        self._model, self._source, self._lock = model, source, threading.Lock()
        self._ids, self._texts, self._rows = columns["id"], columns["text"], columns["embedding"]
        number = {source.name(i): i for i in range(len(source))}
        self._numbers = [number[name] for name in self._ids]
        self.names = list(names) or _default_names(self._ids, self._texts)
        self._of_names: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))
        self.thumbnail = functools.lru_cache(_THUMBNAILS)(self._thumbnail)

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

    def _thumbnail(self, image: int) -> bytes:
        """WebP of an image of the folder, at most `THUMBNAIL` pixels wide and high. Raises as `by_image`."""
        content, _ = self._source.read(self._numbers[self._checked(image)])
        picture = Image.fromarray(decode(content))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=85)
        return data.getvalue()

    def _checked(self, image: int) -> int:
        if not 0 <= image < len(self):
            raise IndexError(f"there is no image {image}; there are {len(self)}, from 0 on")
        return image


def _default_names(ids: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Captions of the images, or else the names of their folders where there are several; at most `_DEFAULT_NAMES`."""
    folders = dict.fromkeys(pathlib.PurePath(name).parent.name.replace("_", " ") for name in ids)
    captions = dict.fromkeys(filter(None, texts))
    names = list(captions if captions else folders if len(folders) > 1 else ())
    return names[:_DEFAULT_NAMES]


def make_index(model: Model, images: str, *, cache: str = "", names: Sequence[str] = ()) -> Index:
    """Embed images, unless a file of their embeddings is there, and return their index.

    Args:
      model: that embeds.
      images: a folder, or files as `xclip_jax.embed` names them.
      cache: .npz or .parquet file of the embeddings; by default one of these images and weights in the cache folder.
      names: see `Index`.

    Raises:
      UserError: no images, or a file of other embeddings.
    """
    source = open_images(images)
    if not cache:
        key = hashlib.sha256(f"{model.fingerprint()} {source.digest()}".encode()).hexdigest()[:16]
        folder = cache_dir() / "search"
        folder.mkdir(parents=True, exist_ok=True)
        cache = os.fspath(folder / f"{key}.npz")
    Job(model, {"image": source}, cache, option="--cache").run()
    return Index(model, source, embeddings.read(cache), names)
