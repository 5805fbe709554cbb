"""Folders of images: pairs, each image with a .txt file of its name, or classes, one sub-folder each."""

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
from xclip_jax.data.labelled import file_size
from xclip_jax.data.records import thread_pool


class FolderSource(Source):
    """Images in files, each with a .txt file of the same name: one caption per line."""

    def __init__(self, place: str | pathlib.Path, *, captions: bool = True) -> None:
        """List the images of a folder and its sub-folders, or the files that `place` names, see `storage.expand`.

        Files and folders whose names begin with a dot are left out, since editors and systems write them. Without
        `captions` an image needs none.

        Raises:
          UserError: no such folder or files, no image, or no caption.
        """
        folder = pathlib.Path(place).expanduser()
        self._captions = captions
        if folder.is_dir():
            self.images = list(map(str, sorted(labelled.images_in(folder))))
            self._root = len(str(folder / "x")) - 1
        else:
            self.images = storage.expand(str(place))
            self._root = os.path.commonprefix(self.images).rfind("/") + 1  # noqa: RUF071 commonpath changes gs://
        needed = not captions or any(map(os.path.isfile, map(_caption_file, self.images)))
        if not self.images or not needed:
            raise UserError(
                f"{str(place)!r} has {len(self.images)} images ({', '.join(IMAGE_SUFFIXES)})"
                f"{', and none has a caption, a .txt file of the same name' if captions else ''}; if a table has the "
                "captions, name it, csv:FILE."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        path = self.images[index]
        try:
            image = storage.read(path, MAX_BYTES["image"])
        except FileNotFoundError as error:
            raise BadSample("no image file") from error
        except OSError as error:
            raise storage.unreadable(error) from error
        return {"image": image, "text": self.captions(index), "tags": [], "id": path}

    def captions(self, index: int) -> list[str]:
        """Return the captions of an image, without reading it; [] for none where none is needed.

        Raises:
          BadSample: no caption, or a file that the disk refuses.
        """
        path = _caption_file(self.images[index])
        if storage.is_remote(path) and not self._captions:
            return []
        try:
            content = decode_text(storage.read(path, MAX_BYTES["text"]))
            # str.splitlines() would also cut at letters of damaged texts, such as U+0085.
            if text := [line.strip() for line in re.split(r"[\r\n]+", content) if line.strip()]:
                return text
            raise BadSample("caption is empty", f"{path!r}")
        except OSError as error:
            if self._captions and error.errno == errno.ENOENT:
                raise BadSample("no caption file") from error
            if self._captions or error.errno not in (errno.ENOENT, errno.EFBIG, errno.EINVAL):  # the last for a pipe
                raise storage.unreadable(error) from error
        except BadSample:
            if self._captions:
                raise
        return []

    def describe(self, index: int) -> dict[str, str]:
        return {"file": self.images[index]}

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their relative paths and the sizes of images and captions."""
        digest = hashlib.blake2b(digest_size=16)
        with thread_pool(16) as threads:  # a bucket that is mounted answers in tens of milliseconds
            for image, sizes in threads.imap(_sizes, self.images, chunksize=256):
                name = redact(image) if storage.is_remote(image) else image[self._root :]
                digest.update(f"{name}\0{sizes}\n".encode("utf-8", "surrogateescape"))
        return {"samples": len(self), "hash": digest.hexdigest()}


def _caption_file(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.txt"


def _sizes(image: str) -> tuple[str, tuple[int, int]]:
    """Return an image's path, and the sizes of image and caption; pathlib would take minutes for millions of files."""
    return image, (file_size(image), file_size(_caption_file(image)))


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
