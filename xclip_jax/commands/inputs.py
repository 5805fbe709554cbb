"""Inputs of embed and serve: images with optional captions, and lines of text."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.data import records, sources
from xclip_jax.data.base import Source, SourceOptions, clean_text, decode_utf8
from xclip_jax.evaluators.sets.custom import query_columns

CONTAINERS = (".tar", ".csv", ".tsv", ".parquet")
IMAGES = "a folder; files: globs, ranges {00..12}, lists; tars; or a source: csv:, parquet:, hf:, ..."  # for --help


def _readable(path: str) -> str:
    """Return a path in valid UTF-8, or an address without its secrets."""
    return redact(os.fsencode(path).decode("utf-8", "replace"))


class Images:
    """The images `numbers`, by default all, of a source, each with its first caption or ""."""

    def __init__(self, source: Source, spec: str, columns: Sequence[str] = ()) -> None:
        self.source = source
        self.spec = spec
        self._columns = columns
        self.numbers = range(len(source))

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """Return a file's path, TAR#KEY, FILE#LINE, or SPEC#ROW."""
        place = self.source.describe(self.numbers[index])
        if not place.keys() & {"tar", "file"}:
            return _readable(f"{self.spec}#{self.numbers[index]}")
        path, *parts = place.values()
        return "#".join([_readable(path), *parts])

    def read(self, index: int) -> tuple[bytes, str]:
        """Return image and caption, or raise `BadSample`."""
        try:
            record = self.source[self.numbers[index]]
        except OSError as error:  # of another package's source
            raise storage.unreadable(error) from error
        except Exception as error:
            raise records.as_bad_sample(error) from error
        return record["image"], next(iter(record["text"]), "")

    def places(self) -> list[str]:
        """Return the absolute paths, or the addresses, of the tables and of the first and the last image's files."""
        paths: list[str] = [*getattr(self.source, "tables", ())]
        for index in (0, len(self) - 1):
            place = self.source.describe(self.numbers[index])
            paths += [place[key] for key in ("tar", "file") if key in place]
        return [path if storage.is_remote(path) else os.path.abspath(path) for path in paths]

    @functools.cached_property
    def digest(self) -> str:
        """Columns, and a hash of names and sizes of images and captions, not of times, which change in copies."""
        return f"{self.source.fingerprint()['hash']} {self._columns}"


class Lines:
    """The lines `numbers`, by default all, of a local text file in UTF-8."""

    def __init__(self, path: str) -> None:
        self.path = path
        content = pathlib.Path(path).read_bytes()
        self._lines = content.removesuffix(b"\n").split(b"\n") if content else []
        self.numbers = range(len(self._lines))
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{_readable(self.path)}#{self.numbers[index] + 1}"

    def read(self, index: int) -> tuple[str, str]:
        text = clean_text(decode_utf8(self._lines[self.numbers[index]]))
        if not text:
            raise BadSample("line is empty")
        return text, text


class Captions(Lines):
    """The different captions of images, in the order of their first use."""

    def __init__(self, images: Images) -> None:
        """Read all captions; `UserError` if there are none."""
        self.path = images.spec
        places = ((images.source, index) for index in range(len(images)))
        read = records.read_each(places, lambda record: record["text"], threads=records.cores())
        texts = (text for captions in read if not isinstance(captions, BadSample) for text in captions)
        self._lines = [text.encode() for text in dict.fromkeys(texts)]
        self.numbers = range(len(self._lines))
        self.digest = hashlib.blake2b(b"\0".join(self._lines), digest_size=16).hexdigest()
        if not self._lines:
            remedy = f"name their column, {images.spec}?text=COLUMN"
            if images.spec.startswith("folder:"):
                remedy = "put each caption in a .txt file named like its image"
            raise UserError(f"{images.spec} has no caption; {remedy}.")


def open_images(pattern: str) -> Images:
    """Open the images of a source, a table, a folder or a pattern, see `storage.expand`; `UserError` if there are none.

    "?image=COLUMN&text=COLUMN" at the end of a table's name names its columns; without `text` it has no captions.
    """
    spec, columns = query_columns(pattern)
    container = os.path.isdir(os.path.expanduser(spec)) or redact(spec).lower().endswith(CONTAINERS)
    spec = sources.spec_from_path(spec) if container or sources.is_spec(spec) else f"folder:{pattern}"
    texts = columns.get("text", ["text"] if spec.startswith(("tar:", "folder:")) else [])
    options = SourceOptions(image_column=columns.get("image", ["image"])[0], text_columns=tuple(texts), captions=False)
    return Images(sources.open_pairs(spec, options), spec, (options.image_column, *texts))


Inputs = Images | Lines  # `read` returns content and text of an item
