"""Images and texts that embed and serve read: files, tars, tables, and lines of text."""

import errno
import functools
import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

from xclip_jax import model as inference
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, public
from xclip_jax.data import labelled, sources
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, SourceOptions, decode_text
from xclip_jax.data.readers.folder import file_size
from xclip_jax.data.readers.table import ColumnSource
from xclip_jax.data.readers.tar import TarSource
from xclip_jax.evaluators.sets.custom import query_columns

REFUSED = ("file cannot be read", "tar cannot be read")  # by a disk or store, whatever the content
IMAGES = "a folder; files: globs, ranges {00..12}, lists; tars; or a table: csv:, parquet:, hf:"  # for --help
_TABLES = ("csv:", "parquet:", "hf:")


def _readable(path: str) -> str:
    """Return a path as valid UTF-8, which a file system does not ask for, and an address without its secrets."""
    return public(os.fsencode(path).decode("utf-8", "replace"))


class Images:
    """Image files, each with the first line of a .txt file of the same name, if there is one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return _readable(self.paths[index])

    def read(self, index: int) -> tuple[bytes, str]:
        return inference.read(self.paths[index]), self.caption(index)

    def caption(self, index: int) -> str:
        """Return the first line of a caption; "" for a missing or unusable one, and for images in buckets.

        Raises:
          BadSample: the disk does not give it.
        """
        path = pathlib.Path(self.paths[index]).with_suffix(".txt")
        try:
            if storage.is_remote(self.paths[index]) or not path.is_file():
                return ""
            content = storage.read(str(path), MAX_BYTES["text"])
        except OSError as error:
            if error.errno == errno.EFBIG:
                return ""
            raise storage.unreadable(error) from error
        try:
            return decode_text(content).strip().partition("\n")[0].strip()
        except BadSample:
            return ""

    def stamp(self, index: int) -> str:
        """Return size and time of the local file of an image, by which a changed one is recognised."""
        return _stamp(self.paths[index])

    def digest(self) -> str:
        """Return a hash of names and sizes, also of captions; without times, which change when files are copied."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            files = path, pathlib.Path(path).with_suffix(".txt")
            sizes = (0, 0) if storage.is_remote(path) else map(file_size, files)
            digest.update(b"%s\n%d %d\n" % (os.fsencode(public(path)), *sizes))
        return digest.hexdigest()


class Tars:
    """Images in tars as img2dataset writes them, with their captions, if any."""

    def __init__(self, pattern: str) -> None:
        self.source = TarSource(pattern, captions=False)
        self._stamp = functools.cache(_stamp)  # of thousands of images in one file

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        tar, key = self.source.describe(index).values()
        return f"{_readable(tar)}#{key}"

    def read(self, index: int) -> tuple[bytes, str]:
        try:
            record = self.source[index]
        except BadSample as error:
            if error.reason in REFUSED:
                raise
            return self.source.image(index), ""
        return record["image"], record["text"][0]

    def stamp(self, index: int) -> str:
        return self._stamp(self.source.describe(index)["tar"])

    def digest(self) -> str:
        return self.source.fingerprint()["hash"]


class Rows:
    """Images in a table, `csv:`, `parquet:` or `hf:`, with captions if the spec names their column.

    `spec` is the table's, as in `parquet:/data/shop/test?image=photo&text=title`; images are in the column "image"
    unless the spec names another one.
    """

    def __init__(self, spec: str) -> None:
        self.spec, columns = query_columns(spec)
        options = SourceOptions(image_key=columns.get("image", ["image"])[0], text_keys=columns.get("text", ()))
        source = sources.open_pairs(sources.spec_from_path(self.spec), options)
        if not isinstance(source, ColumnSource):
            raise UserError(f"--images {spec!r} has no columns; name a table, csv:, parquet: or hf:.")
        self.source, self._digest = source, source.fingerprint()["hash"]

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return _readable(self.source.images.path(index) or f"{self.spec}#{index}")

    def read(self, index: int) -> tuple[bytes, str]:
        return self.source.images.read(index)[0], self.caption(index)

    def caption(self, index: int) -> str:
        """Return the first caption of a row; "" for a row without captions, or with unusable ones."""
        try:
            return next((text for column in self.source.texts(index) for text in column), "")
        except BadSample:
            return ""

    def digest(self) -> str:
        """Return the hash of the table, which also changes with its rows' captions."""
        return self._digest

    def stamp(self, index: int) -> str:
        return self._digest


class Lines:
    """The lines of a local text file in UTF-8."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            content = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--texts {path!r} cannot be read ({error}).") from error
        self._lines = content.removesuffix(b"\n").split(b"\n") if content else []
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return f"{_readable(self.path)}#{index + 1}"

    def read(self, index: int) -> tuple[str, str]:
        text = decode_text(self._lines[index]).strip()
        if not text:
            raise BadSample("line is empty")
        return text, text

    def digest(self) -> str:
        return self._digest


def open_images(pattern: str) -> Images | Tars | Rows:
    """Open the images of a folder or a table, or files that `storage.expand` lists: only tars, or no tars.

    Raises:
      UserError: no images.
    """
    if pattern.startswith(_TABLES) or query_columns(pattern)[0].lower().endswith((".csv", ".tsv", ".parquet")):
        return Rows(pattern)
    pattern = pattern if storage.is_remote(pattern) else os.path.expanduser(pattern)
    folder = os.path.isdir(pattern)
    files = labelled.images_in(pathlib.Path(pattern), (*IMAGE_SUFFIXES, ".tar")) if folder else storage.expand(pattern)
    paths = list(map(str, files))
    tars = sum(public(path).lower().endswith(".tar") for path in paths)
    if not paths:
        raise UserError(f"--images {pattern!r} contains no image ({', '.join(IMAGE_SUFFIXES)}); name a glob of files.")
    if 0 < tars < len(paths):
        raise UserError(f"--images {pattern!r} names {tars} tars among {len(paths)} files; embed them separately.")
    if folder and tars:
        pattern = os.path.join(re.sub("[{},]", "?", glob.escape(pattern)), "**", "*.[tT][aA][rR]")
    return Tars(pattern) if tars else Images(paths)


def _stamp(path: str) -> str:
    """Return size and time of a local file; "" for a missing one, and in buckets, where each costs a request."""
    try:
        return "" if storage.is_remote(path) else "{} {}".format(*storage.stat(path))
    except OSError:
        return ""


Inputs = Images | Tars | Rows | Lines  # `read` returns content and text of an item, or raises `BadSample`
