"""Folders of images: pairs with captions in .txt files, or one sub-folder per class."""

import errno
import hashlib
import os
import pathlib
import re
from typing import Any

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.data import labelled
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, Record, Source, SourceKind, SourceOptions, decode_text
from xclip_jax.data.records import thread_pool


class FolderSource(Source):
    """Image files, each with a .txt file of the same name that contains one caption per line."""

    def __init__(self, place: str | pathlib.Path, *, captions: bool = True) -> None:
        """List the images in a folder and its sub-folders, or the files of a pattern, see `storage.expand`.

        Names that begin with a dot are skipped, since editors and systems write them. Raises `UserError` for missing
        files, a folder without images, or with `captions` a folder without captions.
        """
        folder = pathlib.Path(place).expanduser()
        self._captions = captions
        if folder.is_dir():
            self.images = list(map(str, sorted(labelled.images_in(folder))))
            self._root = len(str(folder / "x")) - 1
        else:
            self.images = storage.expand(str(place))
            self._root = os.path.commonprefix(self.images).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
        has_captions = not captions or any(map(os.path.isfile, map(_caption_file, self.images)))
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
        return {"image": image, "text": self.captions(index), "tags": [], "id": path}

    def captions(self, index: int) -> list[str]:
        """Return an image's captions without reading the image; raise `BadSample` if a required one is missing."""
        path = _caption_file(self.images[index])
        if storage.is_remote(path) and not self._captions:
            return []
        try:
            content = decode_text(storage.read(path, MAX_BYTES["text"]))
        except OSError as error:
            has_none = error.errno in (errno.ENOENT, errno.EFBIG, errno.EINVAL)  # EINVAL: a named pipe
            if self._captions or not has_none:
                raise storage.unreadable(error, "no caption file") from error
            return []
        except BadSample:
            if self._captions:
                raise
            return []
        # str.splitlines() would also cut at letters of damaged texts, such as U+0085.
        text = [line.strip() for line in re.split(r"[\r\n]+", content) if line.strip()]
        if self._captions and not text:
            raise BadSample("caption is empty", f"{path!r}")
        return text

    def describe(self, index: int) -> dict[str, str]:
        return {"file": self.images[index]}

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their relative paths and of image and caption sizes."""

        def sizes(image: str) -> tuple[int, int]:  # pathlib would take minutes for millions of files
            return labelled.file_size(image), labelled.file_size(_caption_file(image))

        digest = hashlib.blake2b(digest_size=16)
        with thread_pool(16) as threads:  # a mounted bucket takes tens of milliseconds per answer
            for image, both in zip(self.images, threads.imap(sizes, self.images, chunksize=256), strict=True):
                name = redact(image) if storage.is_remote(image) else image[self._root :]
                digest.update(f"{name}\0{both}\n".encode("utf-8", "surrogateescape"))
        return {"samples": len(self), "hash": digest.hexdigest()}


def _caption_file(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.txt"


class Folders(SourceKind):
    """`folder:PATH`."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> FolderSource:
        return FolderSource(rest, captions=options.captions)

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return labelled.open_files(f"folder:{rest}", rest)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        return (pathlib.Path(rest).expanduser() / split).is_dir()
