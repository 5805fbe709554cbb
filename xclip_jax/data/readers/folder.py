"""Folders of images: pairs with captions in .txt files, or one sub-folder per class."""

import errno
import hashlib
import itertools
import os
import pathlib
import time
from typing import Any

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.data import labelled
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, Record, Source, SourceKind, SourceOptions, split_lines
from xclip_jax.data.records import thread_pool

_TIMED = 256  # images whose files show how fast the disk answers


class FolderSource(Source):
    """Image files, each with a .txt file of the same name that contains one caption per line."""

    def __init__(self, place: str | pathlib.Path, options: SourceOptions | None = None) -> None:
        """List the images in a folder and its sub-folders, or the files of a pattern, see `storage.expand`.

        Names that begin with a dot are skipped, since editors and systems write them. Raises `UserError` for missing
        files, a folder without images, or a folder without captions that `options` require.
        """
        folder = pathlib.Path(place).expanduser()
        self.options = options or SourceOptions()
        if folder.is_dir():
            self.images = sorted(labelled.images_in(folder), key=lambda path: path.split("/"))
            self._root = len(str(folder / "x")) - 1
        else:
            self.images = storage.expand(str(place))
            self._root = os.path.commonprefix(self.images).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
        has_captions = not self.options.captions or any(map(os.path.isfile, map(_caption_file, self.images)))
        if not self.images or not has_captions:
            remedy = "none has a caption, a .txt file of the same name; if a table has the captions, name it, csv:FILE"
            if not self.images:
                remedy = "name another folder"
            raise UserError(f"{str(place)!r} has {len(self.images)} images ({', '.join(IMAGE_SUFFIXES)}); {remedy}.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        path = self.images[index]
        try:
            image = storage.read(path, MAX_BYTES["image"])
        except OSError as error:
            raise storage.unreadable(error, "no image file") from error
        negatives = [text for name in self.options.negative_columns for text in self.captions(index, name)]
        return {"image": image, "text": self.captions(index), "negatives": negatives, "tags": [], "id": path}

    def captions(self, index: int, name: str = "") -> list[str]:
        """Return the lines of an image's text file without reading the image; `BadSample` for missing captions."""
        path = _caption_file(self.images[index], name)
        if storage.is_remote(path) and not self.options.captions:
            return []
        try:
            text = split_lines(storage.read(path, MAX_BYTES["text"]))
        except OSError as error:
            has_none = error.errno in (errno.ENOENT, errno.EFBIG, errno.EINVAL)  # EINVAL: a named pipe
            if not (isinstance(error, FileNotFoundError) if name else has_none and not self.options.captions):
                raise storage.unreadable(error, "no caption file") from error
            return []
        except BadSample:
            if self.options.captions:
                raise
            return []
        if self.options.captions and not name and not text:
            raise BadSample("caption is empty", f"{path!r}")
        return text

    def describe(self, index: int) -> dict[str, str]:
        return {"file": self.images[index]}

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their relative paths and of image and caption sizes."""

        def sizes(image: str) -> tuple[int, ...]:  # pathlib would take minutes for millions of files
            texts = (_caption_file(image, name) for name in ("", *self.options.negative_columns))
            return tuple(map(labelled.file_size, (image, *texts)))

        digest = hashlib.blake2b(digest_size=16)
        began = time.perf_counter()
        known = list(map(sizes, self.images[:_TIMED]))
        local = time.perf_counter() - began < _TIMED * 1e-4  # threads would treble a disk's 3 microseconds
        with thread_pool(1 if local else 16) as threads:  # a mounted bucket takes tens of milliseconds per answer
            rest = self.images[_TIMED:]
            all_sizes = itertools.chain(known, map(sizes, rest) if local else threads.imap(sizes, rest, chunksize=256))
            for image, both in zip(self.images, all_sizes, strict=True):
                name = redact(image) if storage.is_remote(image) else image[self._root :]
                digest.update(f"{name}\0{both}\n".encode("utf-8", "surrogateescape"))
        return {"samples": len(self), "hash": digest.hexdigest()}


def _caption_file(image: str, name: str = "") -> str:
    return ".".join(filter(None, [os.path.splitext(image)[0], name, "txt"]))


class Folders(SourceKind):
    """`folder:PATH`."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> FolderSource:
        return FolderSource(rest, options)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return labelled.open_files(f"folder:{rest}", rest)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        return (pathlib.Path(rest).expanduser() / split).is_dir()
