"""Random access to pairs in WebDataset tars such as img2dataset's: nothing is converted or streamed.

The shuffle is global and exact, a run resumes anywhere, and shards need not be distributed over hosts.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import pathlib
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions, decode_utf8, json_values, pair
from xclip_jax.data.readers import tar_index

_GAP = 1 << 16  # bytes; one request reads all files of a sample if the gaps between them are at most this large


@functools.lru_cache(maxsize=2048)  # maps keep files open, and a process may open fewer files than a set has tars
def _mapped(index_path: pathlib.Path) -> np.ndarray:
    """Return the memory-mapped rows of an index: all processes of a machine share one copy of its gigabytes."""
    return np.load(index_path, mmap_mode="r").view(np.ndarray)


def read_span(tar: str, version: object, start: int, size: int) -> bytes:
    """Read bytes of a tar, see `storage.open_file`; raise `BadSample` if it is unreadable or shorter than before."""
    try:
        data = storage.open_file(tar, version).read(start, size)
    except OSError as error:
        raise BadSample("tar cannot be read", str(error)) from error
    if len(data) < size:
        raise BadSample("tar cut off", "it is shorter than when it was indexed")
    return data


class TarSource(Source):
    """Samples in tars: `{key}.jpg` (or another image), `{key}.txt`, `{key}.json`.

    Incomplete samples and unreadable parts of a tar are counted as records, and raise `BadSample` on access.
    """

    def __init__(self, pattern: str, options: SourceOptions | None = None) -> None:
        """Index the tars of a pattern, see `tar_index.find`, unless they are indexed.

        "text" in `text_columns` is the .txt file, and any other key of `options` is a field of the .json file.
        `UserError` if files do not exist, or contain no sample.
        """
        self.options = options = options or SourceOptions()
        fields = bool(options.tags_key or options.negative_columns or {*options.text_columns} - {"text"})
        self._parts = ("image", *["text"] * ("text" in options.text_columns), *["json"] * fields)
        self.tars = tar_index.find(pattern)
        self._index_paths = tar_index.load(self.tars)
        self._version = hash(tuple(map(str, self._index_paths)))  # the names contain sizes and times of the tars
        # Maps keep files open, and the soft limit of a process is often 1,024.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _mapped.cache_clear()  # an index may have been replaced
        indexes = [(len(rows), np.unique(rows["fault"]).tolist()) for rows in map(_mapped, self._index_paths)]
        self._ends = list(itertools.accumulate(size for size, _ in indexes))
        kinds = {kind for _, kinds in indexes for kind in kinds}
        if not kinds & {tar_index.OK, *([] if options.captions else [tar_index.NO_TEXT])}:
            faults = sorted(tar_index.FAULTS[kind] for kind in kinds)
            raise UserError(
                f"{pattern!r} names {len(self.tars)} tars and none contains a whole sample ({', '.join(faults)}); a "
                f"sample is KEY.jpg{' and KEY.txt' * options.captions}, as by img2dataset's --output_format webdataset."
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> tuple[str, np.void]:
        shard = bisect.bisect_right(self._ends, index)
        rows = _mapped(self._index_paths[shard])
        return self.tars[shard], rows[index - self._ends[shard] + len(rows)]

    def describe(self, index: int) -> dict[str, str]:
        tar, row = self._row(index)
        return {"tar": tar, "key": row["key"].decode("utf-8", "replace")}

    def __getitem__(self, index: int) -> Record:
        tar, row = self._row(index)
        if row["fault"] and (self.options.captions or row["fault"] != tar_index.NO_TEXT):
            raise BadSample(tar_index.FAULTS[row["fault"]])
        parts = self._read(tar, row, self._parts)
        if not parts["image"]:
            raise BadSample("image file is empty")

        @functools.cache
        def content() -> Any:
            text = decode_utf8(parts["json"] or b"{}")
            try:
                return json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadSample("JSON file is damaged", str(error)) from error

        def field(key: str) -> list[Any]:
            return json_values(content(), key)

        def caption(key: str) -> list[Any]:
            if key != "text":
                return field(key)
            if parts["text"] is None and len(self.options.text_columns) == 1:
                raise BadSample(tar_index.FAULTS[tar_index.NO_TEXT])
            return [decode_utf8(parts["text"] or b"")]

        name = f"{redact(tar)}#{row['key'].decode(errors='replace')}"
        return pair(parts["image"], name, self.options, caption, field)

    def _read(self, tar: str, row: np.void, parts: Sequence[str]) -> dict[str, bytes | None]:
        """Return the content of some files of a sample, None for missing ones."""
        spans = {part: (int(row[part]), int(row[f"{part}_size"])) for part in parts if row[part]}
        first = min(start for start, _ in spans.values())
        end = max(start + size for start, size in spans.values())
        if end - first <= sum(size for _, size in spans.values()) + _GAP:
            whole = read_span(tar, self._version, first, end - first)
            found = {part: whole[start - first : start - first + size] for part, (start, size) in spans.items()}
        else:
            found = {part: read_span(tar, self._version, *span) for part, span in spans.items()}
        return dict.fromkeys(parts) | found

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of samples, a hash of the indexes, and the tars' names and sizes."""
        digest = hashlib.blake2b(digest_size=16)
        tars = []
        for tar, path in zip(self.tars, self._index_paths, strict=True):
            rows = _mapped(path)
            digest.update(rows.tobytes())
            name = pathlib.PurePosixPath(redact(tar)).name
            tars.append({"name": name, "bytes": storage.stat(tar)[0], "samples": len(rows)})
        return {"samples": len(self), "hash": digest.hexdigest(), "tars": tars}


class Tars(SourceKind):
    """`tar:PATTERN`."""

    suffixes = (".tar",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TarSource:
        return TarSource(rest, options)
