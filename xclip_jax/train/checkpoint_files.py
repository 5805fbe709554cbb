"""Files of checkpoints: their digest, and the space that they need.

A digest lists names, sizes and hashes of a checkpoint's files, and shows damage before anything is restored. Orbax
restores a file of weights with a flipped bit as other values, without an error.

digest.json is in the checkpoint's folder: {"algorithm", "files": {name: [bytes, hash]}, "step", "digest"}, with the
hash of all the rest as "digest". It is written before the folder gets its final name, so every checkpoint has one.

Files in buckets have no hash: reading them again would cost as much as writing them, and stores compare their own
checksums. A store cannot notice a missing or exchanged object, but names and sizes show it.
"""

import hashlib
import json
import os
import pathlib
import shutil
from concurrent import futures
from typing import Any

import jax
from etils import epath

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import is_remote, strict_json, write_json
from xclip_jax.train.state import TrainState

STORES = ("gs",)  # that Orbax writes to and reads from; it takes other addresses for local paths
DIGEST_FILE = "digest.json"
_HASH = "sha256"  # the fastest of hashlib on processors with instructions for it
_THREADS = 4
# Orbax writes these after the digest; nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def check_store(folder: str | epath.Path) -> None:
    """Raise `UserError` if `folder` cannot hold checkpoints."""
    if storage.scheme(str(folder)) not in ("", *STORES):
        raise UserError(f"{str(folder)!r} cannot hold checkpoints, which Orbax keeps on a disk or at gs://; use these.")
    if "[" in (str(folder) if is_remote(str(folder)) else os.path.abspath(folder)):  # Orbax would take it for a pattern
        raise UserError(f"{str(folder)!r} cannot hold checkpoints, since its path contains '['; name another folder.")


def write_digest(folder: epath.Path, step: int) -> None:
    """Write the digest of a checkpoint with complete files, and flush the files to the disk."""
    sizes = {name: size for name, size in sorted(_file_sizes(folder).items()) if name not in (*_LATER, DIGEST_FILE)}
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: None if is_remote(str(folder)) else _hash(folder / name, sync=True), sizes)
        files = {name: [sizes[name], value] for name, value in zip(sizes, hashes, strict=True)}
    content = {"algorithm": _HASH, "files": files, "step": step}
    write_json(folder / DIGEST_FILE, content | {"digest": _hash_of(content)})


def find_fault(folder: epath.Path, step: int) -> str | None:
    """Return the fault of the checkpoint of `step`, beginning with the name of a file, or None if it is whole."""
    if not (folder / DIGEST_FILE).exists():
        return f"{DIGEST_FILE} is missing"
    try:
        content = json.loads((folder / DIGEST_FILE).read_bytes())
        whole = content.pop("digest") == _hash_of(content) and content["step"] == step
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        return f"{DIGEST_FILE} is damaged, or belongs to another step"
    # All sizes first, since they cost nothing.
    sizes = _file_sizes(folder)
    for name, (size, _) in content["files"].items():
        if sizes.get(name) != size:
            return f"{name} is missing, or has another size"
    hashes = {} if is_remote(str(folder)) else {name: value for name, (_, value) in content["files"].items() if value}
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        for name, value in zip(hashes, pool.map(lambda name: _hash(folder / name), hashes), strict=True):
            if value != hashes[name]:
                return f"{name} has other bytes than were written"
    return None


def _file_sizes(folder: epath.Path) -> dict[str, int]:
    """Return {name: bytes} of all files below `folder`, in a bucket from one listing, as requests are slow."""
    if is_remote(str(folder)):
        system, root = storage.file_system(str(folder))
        with storage.os_errors(str(folder)):
            system.invalidate_cache()  # other clients write, too
            return {name[len(root) + 1 :]: info["size"] for name, info in system.find(root, detail=True).items()}
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _hash(path: epath.Path, *, sync: bool = False) -> str:
    with open(os.fspath(path), "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())  # Orbax leaves its JSON to the system, and a power cut would leave empty files
        return hashlib.file_digest(file, _HASH).hexdigest()


def _hash_of(content: Any) -> str:
    return hashlib.new(_HASH, strict_json(content, sort_keys=True).encode()).hexdigest()


def num_bytes(state: TrainState) -> int:
    """Return the bytes of a state on all devices together, an upper bound for a checkpoint."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def free_bytes(path: epath.Path) -> int | None:
    """Return the free bytes on the disk of `path`, which need not exist; None for a bucket."""
    if is_remote(str(path)):
        return None
    folder = pathlib.Path(path).absolute()
    existing = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    return shutil.disk_usage(existing).free
