"""Pairs in WebDataset tars, as img2dataset writes them, at random access: nothing is converted or streamed.

Shuffling is then global and exact, a run resumes anywhere, and shards need not be spread over hosts.
"""

import bisect
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax import storage
from xclip_jax.data import tar_index
from xclip_jax.errors import BadSample, UserError

Record = dict[str, Any]

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_GAP = 1 << 16  # files of a sample that lie closer than this are read at once


def decode_text(data: bytes) -> str:
    """Text as it was meant: UTF-8 or, by its mark, UTF-16; else Windows' Latin letters, unless there are none.

    Raises:
      BadSample: the bytes are no text.
    """
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return data.decode("utf-16")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise BadSample("caption is no text", f"begins with {data[:8]!r}") from error
    if _CONTROL.search(text):
        raise BadSample("caption is no text", f"begins with {data[:8]!r}")
    return text


def json_strings(record: Any, key: str) -> list[str]:
    """The strings at `key` of a JSON object, '/' stepping into nested ones; [] for none.

    JSON may hold half of a surrogate pair, of a letter cut in two; it becomes U+FFFD, since no other code takes it.
    """
    for part in key.split("/"):
        record = record.get(part) if isinstance(record, dict) else None
    values = record if isinstance(record, list) else [record]
    return [text for value in values if isinstance(value, str) and (text := whole_letters(value.strip()))]


def whole_letters(text: str) -> str:
    """Return `text` with surrogate pairs joined and halves of them replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class TarSource:
    """Samples of tars: `{key}.jpg` (or another image), `{key}.txt`, `{key}.json`.

    A sample that is incomplete, and a part of a tar that cannot be read, keep a place of their own, and raise
    `BadSample` there.
    """

    def __init__(self, pattern: str, text_keys: Sequence[str] = ("text",), tags_key: str = "") -> None:
        """Indexes what has no index yet.

        Args:
          pattern: see `storage.expand`.
          text_keys: where captions are: "text" is the .txt file, all else a field of the .json file.
          tags_key: field of the .json file with keywords, or "".

        Raises:
          UserError: files that do not exist; no sample at all.
        """
        self.pattern, self.text_keys, self.tags_key = pattern, tuple(text_keys), tags_key
        fields = bool(tags_key) or any(key != "text" for key in self.text_keys)
        self._parts = ("image", *["text"] * ("text" in self.text_keys), *["json"] * fields)
        self.tars = storage.expand(pattern)
        self._open(tar_index.load(self.tars))
        if not any((rows["fault"] == tar_index.OK).any() for rows in self.rows):
            faults = sorted({tar_index.FAULTS[fault] for rows in self.rows for fault in np.unique(rows["fault"])})
            raise UserError(
                f"{pattern!r} names {len(self.tars)} tars and none holds a whole sample ({', '.join(faults)}); a "
                "sample is KEY.jpg and KEY.txt, as img2dataset writes them with --output_format webdataset."
            )

    def _open(self, places: Sequence[pathlib.Path]) -> None:
        self.places = list(places)
        # Mapped, so that all worker processes share one copy of what may be gigabytes.
        self.rows = [np.load(place, mmap_mode="r").view(np.ndarray) for place in places]
        self._ends = list(itertools.accumulate(map(len, self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the arrays: a worker process maps them again."""
        return {key: value for key, value in self.__dict__.items() if key not in ("rows", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open(self.places)

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> tuple[str, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._ends, index)
        rows = self.rows[shard]
        return self.tars[shard], rows[index - self._ends[shard] + len(rows)]

    def where(self, index: int) -> dict[str, str]:
        """Tar and key of a sample."""
        tar, row = self._row(index)
        return {"tar": tar, "key": row["key"].decode("utf-8", "replace")}

    def fault(self, index: int) -> str:
        """What the index knows to be wrong with a sample, or ""."""
        return tar_index.FAULTS[self._row(index)[1]["fault"]]

    def __getitem__(self, index: int) -> Record:
        tar, row = self._row(index)
        if row["fault"]:
            raise BadSample(tar_index.FAULTS[row["fault"]])
        parts = self._read(tar, row, self._parts)
        if not parts["image"]:
            raise BadSample("image file is empty")
        text, tags = self._captions(parts)
        name = f"{tar}#{row['key'].decode(errors='replace')}"
        return {"image": parts["image"], "text": text, "tags": tags, "id": name}

    def image(self, index: int) -> bytes:
        """The image alone, for those who can do without a caption. Raises `BadSample` where that is missing too."""
        tar, row = self._row(index)
        if row["fault"] not in (tar_index.OK, tar_index.NO_TEXT):
            raise BadSample(tar_index.FAULTS[row["fault"]])
        return self._read(tar, row, ("image",))["image"] or b""

    def _captions(self, parts: dict[str, bytes | None]) -> tuple[list[str], list[str]]:
        fields = {}
        if "json" in self._parts:
            try:
                fields = json.loads(parts["json"] or b"{}")
            except (ValueError, RecursionError) as error:
                raise BadSample("JSON file is damaged", str(error)) from error
        text = []
        for key in self.text_keys:
            if key != "text":
                text += json_strings(fields, key)
            elif parts["text"] is not None and (caption := decode_text(parts["text"]).strip()):
                text.append(caption)
        if not text:
            some = parts.get("text") is not None or "text" not in self.text_keys
            raise BadSample("caption is empty" if some else tar_index.FAULTS[tar_index.NO_TEXT])
        return text, json_strings(fields, self.tags_key) if self.tags_key else []

    def _read(self, tar: str, row: np.void, wanted: Sequence[str]) -> dict[str, bytes | None]:
        """The bytes of the files that are wanted, None for those that the sample lacks."""
        found: dict[str, bytes | None] = dict.fromkeys(wanted)
        spans = {part: (start, int(row[f"{part}_size"])) for part in wanted if (start := int(row[part]))}
        first, end = min(start for start, _ in spans.values()), max(start + size for start, size in spans.values())
        try:
            file = storage.open_file(tar)
            if end - first <= sum(size for _, size in spans.values()) + _GAP:
                whole = file.read(first, end - first)
                found |= {part: whole[start - first : start - first + size] for part, (start, size) in spans.items()}
            else:
                found |= {part: file.read(start, size) for part, (start, size) in spans.items()}
        except OSError as error:
            raise BadSample("tar cannot be read", str(error)) from error
        if any(len(found[part] or b"") < size for part, (_, size) in spans.items()):
            raise BadSample("tar cut off", "it is shorter than when it was indexed")
        return found

    def card(self) -> dict[str, Any]:
        """What was read, for the run's records: names and sizes of the tars, samples, and a hash of the index."""
        digest = hashlib.blake2b(digest_size=16)
        for rows in self.rows:
            digest.update(rows.tobytes())
        tars = [
            {"name": pathlib.PurePosixPath(tar).name, "bytes": storage.stat(tar)[0], "samples": len(rows)}
            for tar, rows in zip(self.tars, self.rows, strict=True)
        ]
        return {"samples": len(self), "hash": digest.hexdigest(), "tars": tars}
