"""Sources of `xclip_jax.commands.embed`: image files, tars and lines of a text file, by index.

A job that resumes compares their digests with the first start's.
"""

import glob
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from xclip_jax import model
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, public
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES
from xclip_jax.data.readers.folder import file_size
from xclip_jax.data.readers.tar import TarSource
from xclip_jax.data.text import decode_text


class Source(Protocol):
    """Items to embed: `read` returns content and text of an item, or raises `BadSample`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[Any, str]: ...

    def digest(self) -> str: ...


class Images:
    """Image files, each with the first line of a .txt file of the same name, if there is one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        # A name need not be UTF-8 to a file system.
        return public(os.fsencode(self.paths[index]).decode("utf-8", "replace"))

    def read(self, index: int) -> tuple[bytes, str]:
        return model.read(self.paths[index]), self.caption(index)

    def caption(self, index: int) -> str:
        """Return the first line of a caption; "" for a missing or unreadable one, and for images in buckets."""
        path = pathlib.Path(self.paths[index]).with_suffix(".txt")
        try:
            content = b"" if storage.is_remote(self.paths[index]) else storage.read(str(path), MAX_BYTES["text"])
            return decode_text(content).strip().partition("\n")[0].strip()
        except (OSError, BadSample):
            return ""

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
        self.source = TarSource(pattern)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        tar, key = self.source.describe(index).values()
        return f"{public(tar)}#{key}"

    def read(self, index: int) -> tuple[bytes, str]:
        try:
            record = self.source[index]
        except BadSample:
            return self.source.image(index), ""
        return record["image"], record["text"][0]

    def digest(self) -> str:
        return self.source.fingerprint()["hash"]


class Lines:
    """The lines of a text file in UTF-8; memory holds their offsets only."""

    def __init__(self, path: str) -> None:
        self.path, ends, offset, digest = path, [np.array([-1])], 0, hashlib.blake2b(digest_size=16)
        try:
            self._file = storage.File(path)
            self._file.read(0, 1)  # a server of whole files alone refuses this
            size, _ = storage.stat(path)
            while offset < size and (chunk := self._file.read(offset, min(1 << 24, size - offset))):
                ends.append(offset + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
                offset += len(chunk)
                digest.update(chunk)
        except OSError as error:
            raise UserError(f"--texts {path!r} cannot be read ({error}).") from error
        self._ends, self._digest = np.concatenate(ends), digest.hexdigest()
        if self._ends[-1] < offset - 1:  # the last line has no newline
            self._ends = np.append(self._ends, offset)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        return f"{self.path}#{index + 1}"

    def read(self, index: int) -> tuple[str, str]:
        start, end = int(self._ends[index]) + 1, int(self._ends[index + 1])
        text = decode_text(self._file.read(start, end - start)).strip()
        if not text:
            raise BadSample("line is empty")
        return text, text

    def digest(self) -> str:
        return self._digest


def open_images(pattern: str) -> Images | Tars:
    """Open the images of a folder, or files that `storage.expand` lists: only tars, or no tars.

    Raises:
      UserError: no images.
    """
    if not storage.is_remote(pattern):
        pattern = os.path.expanduser(pattern)
        if not os.path.exists(pattern) and not glob.has_magic(pattern) and not set(pattern) & set(",{"):
            raise UserError(f"--images {pattern!r} does not exist; name a folder, a file, or a glob as 'DIR/*.jpg'.")
    if os.path.isdir(pattern):
        root = pathlib.Path(pattern)
        visible = (x for x in root.rglob("*") if not any(part[0] == "." for part in x.relative_to(root).parts))
        files = sorted(map(str, visible))
        images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        if not images and any(path.endswith(".tar") for path in files):
            return Tars(pattern)
        if not images:
            raise UserError(
                f"--images {pattern!r} contains no image ({', '.join(IMAGE_SUFFIXES)}); name a glob of files."
            )
        return Images(images)
    if folders := [part for part in pattern.split(",") if os.path.isdir(part.removeprefix("folder:"))]:
        raise UserError(
            f"--images {pattern!r} names the folder {folders[0]!r} in a list; name one folder, or files, as in "
            "'A/*.jpg,B/*.jpg'."
        )
    paths = storage.expand(pattern)
    tars = sum(public(path).endswith(".tar") for path in paths)
    if tars and tars < len(paths):
        raise UserError(
            f"--images {pattern!r} names {tars} tars among {len(paths)} files; embed tars and files separately."
        )
    return Tars(pattern) if tars else Images(paths)
