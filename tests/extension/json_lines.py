"""Pairs in a file of JSON objects, one a line: {"image": a path or base64, "text": a caption or a list of them}."""

import base64
import itertools
import json
import pathlib

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import IMAGE_SUFFIXES, MAX_BYTES, Source, SourceKind, json_strings


class JsonLinesSource(Source):
    """Random access to the lines of a file, of which only the offsets are kept in memory."""

    def __init__(self, path, options):
        self.path, self.options = pathlib.Path(path).expanduser(), options
        if not self.path.is_file():
            raise UserError(f"{str(path)!r} does not exist; pass a file of JSON objects, one a line.")
        with self.path.open("rb") as file:
            self.offsets = np.fromiter(itertools.accumulate(map(len, file), initial=0), np.int64)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        start, end = map(int, self.offsets[index : index + 2])
        record = json.loads(storage.open_file(str(self.path)).read(start, end - start))
        text = [caption for key in self.options.text_columns for caption in json_strings(record, key)]
        if self.options.captions and not text:
            raise BadSample("caption is empty")
        image = record[self.options.image_column]
        if image.endswith(IMAGE_SUFFIXES):
            content = storage.read(str(self.path.parent / image), MAX_BYTES["image"])
        else:
            content = base64.b64decode(image)
        return {"image": content, "text": text, "tags": json_strings(record, "tags"), "id": str(index)}

    def describe(self, index):
        """File and line."""
        return {"file": str(self.path), "line": str(index + 1)}

    def fingerprint(self):
        """Number of lines and a hash of the file's content."""
        return {"samples": len(self), "hash": storage.fingerprint([str(self.path)], whole=1 << 40)}


class JsonLines(SourceKind):
    """The source `my_lab.json_lines:JsonLines:PATH`."""

    @classmethod
    def open(cls, rest, options):
        """Open the pairs of the file `rest`."""
        return JsonLinesSource(rest, options)
