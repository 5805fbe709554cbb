"""Folders of images: pairs, each image with a .txt file of its name, or classes, one sub-folder each."""

import hashlib
import os
import pathlib
import re
from typing import Any, ClassVar

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import labelled
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, Form, Record, Source, SourceKind, SourceOptions, decode_text
from xclip_jax.data.labelled import file_size
from xclip_jax.data.records import thread_pool


class FolderSource(Source):
    """A folder of images, including sub-folders, each with a .txt file of the same name: one caption a line.

    Files and folders whose names begin with a dot are left out, since editors and systems write them.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path).expanduser()
        self.images = sorted(labelled.images_in(self.path))
        if not self.path.is_dir():
            raise UserError(f"data folder {str(path)!r} does not exist.")
        if not any(p.with_suffix(".txt").is_file() for p in self.images):
            raise UserError(
                f"data folder {str(path)!r} and its sub-folders contain {len(self.images)} images "
                f"({', '.join(IMAGE_SUFFIXES)}), and none has a caption, a .txt file of the same name; if a table has "
                "the captions, name it, csv:FILE."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        path = self.images[index]
        try:
            image = storage.read(str(path), MAX_BYTES["image"])
            caption = storage.read(str(path.with_suffix(".txt")), MAX_BYTES["text"])
        except FileNotFoundError as error:
            raise BadSample("no caption file" if path.exists() else "no image file") from error
        except OSError as error:
            raise storage.unreadable(error) from error
        # str.splitlines() would also cut at letters of damaged texts, such as U+0085.
        text = [line.strip() for line in re.split(r"[\r\n]+", decode_text(caption)) if line.strip()]
        if not text:
            raise BadSample("caption is empty", f"{str(path.with_suffix('.txt'))!r}")
        return {"image": image, "text": text, "tags": [], "id": str(path)}

    def describe(self, index: int) -> dict[str, str]:
        return {"file": str(self.images[index])}

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their relative paths and the sizes of images and captions."""
        digest = hashlib.blake2b(digest_size=16)
        root = len(str(self.path / "x")) - 1
        with thread_pool(16) as threads:  # a bucket that is mounted answers in tens of milliseconds
            for image, sizes in threads.imap(_sizes, map(str, self.images), chunksize=256):
                digest.update(f"{image[root:]}\0{sizes}\n".encode("utf-8", "surrogateescape"))
        return {"samples": len(self), "hash": digest.hexdigest()}


def _sizes(image: str) -> tuple[str, tuple[int, int]]:
    """Return an image's path, and the sizes of image and caption; pathlib would take minutes for millions of files."""
    return image, (file_size(image), file_size(f"{os.path.splitext(image)[0]}.txt"))


class Folders(SourceKind):
    """`folder:PATH`."""

    forms: ClassVar = {
        "folder:PATH": Form(
            pairs="images, sub-folders too, each with a .txt file of the same name: one caption a line",
            labels="images, one sub-folder a class",
            splits="images, one sub-folder a split, in it one a class",
        )
    }

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> Source:
        return labelled.open_files(f"folder:{rest}", rest) if labels else FolderSource(rest)

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        return (pathlib.Path(rest).expanduser() / split).is_dir()

    @classmethod
    def reads(cls, path: str) -> bool:
        return os.path.isdir(path)
