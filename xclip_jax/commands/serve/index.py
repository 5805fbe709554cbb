"""Images with their embeddings, which texts and other images are compared with."""

import os
import pathlib
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.commands.embed_sources import Source, open_images
from xclip_jax.commands.serve.cache import Embedded, embed, folder_of
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import cache_dir
from xclip_jax.model import TEMPLATES, Model

MAX_NAMES = 500  # that an image is compared with
MAX_TEXT = 1000  # letters of a text, or of a name
_DEFAULT_NAMES = 100


class Match(NamedTuple):
    """An image of the folder: its number, path in the folder and caption, and its cosine with what was asked for."""

    image: int
    name: str
    text: str
    score: float


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
