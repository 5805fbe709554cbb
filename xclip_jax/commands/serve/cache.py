"""Embeddings of images that are kept by file: new files are embedded, vanished ones forgotten.

A cache is a folder with one file, `_FILE`, and while images are being embedded one more for each `_PART` of them. A row
is an image with its id: name, size and time of the image's file; and size and time of its caption's.
"""

import collections
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xclip_jax.commands.embed import Progress
from xclip_jax.commands.embed_sources import Images, Tars
from xclip_jax.core import locks, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import embeddings
from xclip_jax.data.records import ThreadPrefetcher
from xclip_jax.model import Model

_FILE = "embeddings.npz"
_BAD = "bad.jsonl"  # images that cannot be read
_PART = 256  # images, which an interruption loses
_KEPT = 8  # caches
_NAME = re.compile(r"[0-9a-f]{16}")  # of a cache, see `folder_of`


class Embedded(NamedTuple):
    """The images that could be embedded: their numbers in the source, captions, and embeddings fp32 (n, e)."""

    numbers: list[int]
    texts: list[str]
    rows: np.ndarray


class _Row(NamedTuple):
    caption: str  # size and time of its file
    kind: str  # "image", or "bad" with the reason as text
    text: str
    embedding: np.ndarray


def folder_of(model: Model, pattern: str, parent: pathlib.Path) -> pathlib.Path:
    """Return the folder of the embeddings of these images by this model."""
    place = pattern if storage.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    key = json.dumps([model.fingerprint(), place])
    return parent / hashlib.sha256(key.encode()).hexdigest()[:16]


def embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    """Return the embeddings of images, of which those that `folder` lacks are computed and stored there.

    Raises:
      UserError: another process writes there; damaged files; no image can be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locks.lock(folder / _FILE, blocking=False):
            embedded = _embed(model, source, folder)
            _delete_oldest(folder.parent)
            _return_memory()
    except locks.HeldError as error:
        raise UserError(
            f"{folder} is being written by another process; wait for it, or set another --cache."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--cache: {error.filename} is a file; name a folder.") from error
    return embedded


def _embed(model: Model, source: Images | Tars, folder: pathlib.Path) -> Embedded:
    files, known = sorted(folder.glob("*.npz")), {}
    for file in files:
        known.update(_rows(embeddings.read(file)))
    ids = list(_ids(source))
    if missing := [i for i, (image, _) in enumerate(ids) if image not in known]:
        log0(f"embedding {len(missing):,} of {len(ids):,} images")
        for start, columns in _computed(model, source, missing, ids):
            _write(folder / f"new-{len(files) + start // _PART:06d}.npz", columns)
            known.update(_rows(columns))
    for i, (image, caption) in enumerate(ids):
        if known[image].caption != caption and known[image].kind == "image":
            with contextlib.suppress(BadSample):  # the image vanished since
                known[image] = known[image]._replace(caption=caption, text=source.read(i)[1])
                missing.append(i)
    if missing or len(files) != 1 or len(known) != len(ids):
        _write(folder / _FILE, _columns(ids, [known[image] for image, _ in ids]))
        for file in folder.glob("new-*.npz"):
            file.unlink()
    os.utime(folder / _FILE)
    good = [i for i, (image, _) in enumerate(ids) if known[image].kind == "image"]
    bad = [(source.name(i), known[image].text) for i, (image, _) in enumerate(ids) if known[image].kind == "bad"]
    _list_bad(bad, folder)
    if not good:
        raise UserError(f"no image can be read; the reasons are in {folder / _BAD}.")
    rows = [known[ids[i][0]] for i in good]
    return Embedded(good, [row.text for row in rows], np.stack([row.embedding for row in rows]))


def _return_memory() -> None:
    """Give memory that decoding has freed back to the system: glibc keeps it in a heap of each thread."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _ids(source: Images | Tars) -> Iterator[tuple[str, str]]:
    """(name, size and time of an image; size and time of its caption) of each image, all different."""
    counts: collections.Counter = collections.Counter()
    stamp = {}
    for i in range(len(source)):
        name = source.name(i)
        path = source.paths[i] if isinstance(source, Images) else source.source.describe(i)["tar"]
        if isinstance(source, Tars) and path not in stamp:
            stamp[path] = _stamp(path)
        caption = _stamp(os.path.splitext(path)[0] + ".txt") if isinstance(source, Images) else ""
        counts[name] += 1  # a tar may have a key several times
        yield f"{name}\t{counts[name]} {stamp.get(path) or _stamp(path)}", caption


def _stamp(path: str) -> str:
    """Size and time of a local file; "" for one that is missing, or in a bucket, where each costs a request."""
    try:
        return "" if storage.is_remote(path) else "{} {}".format(*storage.stat(path))
    except OSError:
        return ""


def _computed(
    model: Model, source: Images | Tars, missing: Sequence[int], ids: Sequence[tuple[str, str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Embed images in parts: (number of the first of `missing`, columns)."""
    black = np.zeros((model.size, model.size, 3), np.uint8)

    def make(n: int) -> tuple[np.ndarray, str, str]:
        try:
            data, text = source.read(missing[n])
            return model.prepare(data), "image", text
        except BadSample as error:
            return black, "bad", str(error)

    progress, bad = Progress("images", 0, len(missing)), 0
    with ThreadPrefetcher(make, len(missing), window=_PART) as ahead:
        for start in range(0, len(missing), _PART):
            stop = min(start + _PART, len(missing))
            images, kinds, texts = zip(*[ahead[n] for n in range(start, stop)], strict=True)
            rows = model.encode_prepared(images)
            made = [
                _Row(ids[i][1], kind, text, row)
                for i, kind, text, row in zip(missing[start:stop], kinds, texts, rows, strict=True)
            ]
            yield start, _columns([ids[i] for i in missing[start:stop]], made)
            bad += kinds.count("bad")
            progress.after(stop, bad)


def _columns(ids: Sequence[tuple[str, str]], rows: Sequence[_Row]) -> dict[str, Any]:
    """Columns of a file; a caption that could not be read again keeps its stamp."""
    return {
        "kind": [row.kind for row in rows],
        "id": [f"{image}\t{row.caption}" for (image, _), row in zip(ids, rows, strict=True)],
        "text": [row.text for row in rows],
        "embedding": np.stack([row.embedding for row in rows]),
    }


def _rows(columns: dict[str, Any]) -> Iterator[tuple[str, _Row]]:
    """Rows of a file by the ids of their images."""
    for id_, kind, text, row in zip(*(columns[key] for key in ("id", "kind", "text", "embedding")), strict=True):
        image, _, caption = id_.rpartition("\t")
        yield image, _Row(caption, kind, text, row)


def _write(path: pathlib.Path, columns: dict[str, Any]) -> None:
    """Write a file that is complete, or not there."""
    temporary = path.with_suffix(".tmp")
    embeddings.Npz().write(temporary, columns)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _list_bad(bad: Iterable[tuple[str, str]], folder: pathlib.Path) -> None:
    lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in bad]
    (folder / _BAD).write_text("".join(lines))
    if lines:
        log0(f"{len(lines):,} images cannot be read; they are listed in {folder / _BAD}")


def _delete_oldest(parent: pathlib.Path) -> None:
    """Delete caches but the `_KEPT` that were used last, and those in use."""
    caches = (file for file in parent.glob(f"*/{_FILE}") if _NAME.fullmatch(file.parent.name))
    used = {file.parent: file.stat().st_mtime for file in caches}
    for folder in sorted(used, key=used.__getitem__, reverse=True)[_KEPT:]:
        with contextlib.suppress(locks.HeldError), locks.lock(folder / _FILE, blocking=False):
            shutil.rmtree(folder)
