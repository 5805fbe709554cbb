"""Digest of a checkpoint: names, sizes and hashes of its files, by which damage is noticed before anything is restored.

digest.json is in the checkpoint's own folder: {"algorithm", "files": {name: [bytes, hash]}, "step", "digest"}, where
"digest" is the hash of all the rest. It is written before the folder gets its final name, so every checkpoint has one.

Files in buckets have no hash: reading them again would cost as much as writing them, and stores keep checksums of their
own, which their clients compare. What a store cannot notice is an object that is missing or another one, and names and
sizes show that.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from etils import epath

from xclip_jax.core import remote
from xclip_jax.core.storage import is_remote, strict_json, write_json

FILE = "digest.json"
# The fastest of hashlib where processors have instructions for it, as nearly all have.
_ALGORITHM = "sha256"
_THREADS = 4
# Orbax writes these two after the digest. They hold times and names, and nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: epath.Path, step: int) -> None:
    """Write the digest of a checkpoint whose files are complete, and make sure that they are on the disk.

    Args:
      folder: the checkpoint's, under its final or its temporary name.
      step: of the checkpoint.

    Raises:
      OSError: a file cannot be read, or the digest cannot be written.
    """
    sizes = {name: size for name, size in sorted(_sizes(folder).items()) if name not in (*_LATER, FILE)}
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: None if is_remote(str(folder)) else _hash(folder / name, sync=True), sizes)
        files = {name: [sizes[name], value] for name, value in zip(sizes, hashes, strict=True)}
    content = {"algorithm": _ALGORITHM, "files": files, "step": step}
    write_json(folder / FILE, content | {"digest": _hash_of(content)})


def find_fault(folder: epath.Path, step: int) -> str | None:
    """Compare a checkpoint with its digest.

    Args:
      folder: the checkpoint's.
      step: of which it should be.

    Returns:
      What is wrong, beginning with the name of a file, or None where all is as it was written.

    Raises:
      OSError: a file cannot be read for a reason that is not damage, such as missing permission.
    """
    if not (folder / FILE).exists():
        return f"{FILE} is missing"
    content = _parse((folder / FILE).read_bytes())
    if content is None:
        return f"{FILE} is damaged"
    if content["step"] != step:
        return f"{FILE} is that of step {content['step']}"
    # All sizes first, since they cost nothing.
    sizes = _sizes(folder)
    for name, (size, _) in content["files"].items():
        if name not in sizes:
            return f"{name} is {f'a folder, not {size:,} bytes' if (folder / name).is_dir() else 'missing'}"
        if sizes[name] != size:
            return f"{name} is {sizes[name]:,} bytes, not {size:,} bytes"
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda item: _content_fault(folder, *item), content["files"].items())
        return next(filter(None, faults), None)


def _content_fault(folder: epath.Path, name: str, entry: tuple[int, str | None]) -> str | None:
    _, expected = entry
    if expected is None or is_remote(str(folder)):
        return None
    try:
        same = _hash(folder / name) == expected
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name} cannot be read ({error.strerror})"
    return None if same else f"{name} has other bytes than were written"


def _sizes(folder: epath.Path) -> dict[str, int]:
    """{name: bytes} of all files below `folder`: in a bucket by one listing, where a request a file takes minutes."""
    if is_remote(str(folder)):
        system, root = remote.file_system(str(folder))
        with remote.os_errors(str(folder)):
            system.invalidate_cache()  # other clients write, too
            return {name[len(root) + 1 :]: info["size"] for name, info in system.find(root, detail=True).items()}

    def below(path: str) -> Iterator[tuple[str, int]]:
        for entry in os.scandir(path):
            if entry.is_dir():
                yield from below(entry.path)
            else:
                yield os.path.relpath(entry.path, folder), entry.stat().st_size

    return dict(below(os.fspath(folder)))


def _hash(path: epath.Path, *, sync: bool = False) -> str:
    with open(os.fspath(path), "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())  # Orbax leaves its JSON to the system, and a power cut would leave empty files
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()


def _hash_of(content: Any) -> str:
    return hashlib.new(_ALGORITHM, strict_json(content, sort_keys=True).encode()).hexdigest()


def _parse(text: bytes) -> dict[str, Any] | None:
    """The content of a digest, or None where it is damaged."""
    try:
        content = json.loads(text)
        own = content.pop("digest")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return None
    return content if own == _hash_of(content) else None
