"""Files of checkpoints: their digest, the space that they need, and which process reads which part.

The digest has names, sizes and hashes of the files of a checkpoint, and shows damage before anything is restored.

digest.json is in the checkpoint's own folder: {"algorithm", "files": {name: [bytes, hash]}, "step", "digest"}, where
"digest" is the hash of all the rest. It is written before the folder gets its final name, so every checkpoint has one.

Files in buckets have no hash: reading them again would cost as much as writing them, and stores keep checksums of their
own, which their clients compare. What a store cannot notice is an object that is missing or another one, and names and
sizes show that.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from xclip_jax.config.schema import Config
from xclip_jax.core import storage
from xclip_jax.core.storage import is_remote, strict_json, write_json
from xclip_jax.train.state import TrainState

DIGEST_FILE = "digest.json"
# The fastest of hashlib on processors with instructions for it, which nearly all have.
_HASH = "sha256"
_THREADS = 4
# Orbax writes these two after the digest. They hold times and names, and nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_digest(folder: epath.Path, step: int) -> None:
    """Write the digest of a checkpoint whose files are complete, and make sure that they are on the disk.

    Args:
      folder: the checkpoint's, under its final or its temporary name.
      step: step of the checkpoint.

    Raises:
      OSError: a file cannot be read, or the digest cannot be written.
    """
    sizes = {name: size for name, size in sorted(_file_sizes(folder).items()) if name not in (*_LATER, DIGEST_FILE)}
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: None if is_remote(str(folder)) else _hash(folder / name, sync=True), sizes)
        files = {name: [sizes[name], value] for name, value in zip(sizes, hashes, strict=True)}
    content = {"algorithm": _HASH, "files": files, "step": step}
    write_json(folder / DIGEST_FILE, content | {"digest": _hash_of(content)})


def find_fault(folder: epath.Path, step: int) -> str | None:
    """Compare a checkpoint with its digest.

    Args:
      folder: the checkpoint's.
      step: expected step.

    Returns:
      The fault, beginning with the name of a file, or None if all files are as they were written.

    Raises:
      OSError: a file cannot be read for a reason that is not damage, such as missing permission.
    """
    if not (folder / DIGEST_FILE).exists():
        return f"{DIGEST_FILE} is missing"
    content = _parse_digest((folder / DIGEST_FILE).read_bytes())
    if content is None:
        return f"{DIGEST_FILE} is damaged"
    if content["step"] != step:
        return f"{DIGEST_FILE} belongs to step {content['step']}"
    # All sizes first, since they cost nothing.
    sizes = _file_sizes(folder)
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


def _file_sizes(folder: epath.Path) -> dict[str, int]:
    """{name: bytes} of all files below `folder`: in a bucket by one listing, where a request a file takes minutes."""
    if is_remote(str(folder)):
        system, root = storage.file_system(str(folder))
        with storage.os_errors(str(folder)):
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
        return hashlib.file_digest(file, _HASH).hexdigest()


def _hash_of(content: Any) -> str:
    return hashlib.new(_HASH, strict_json(content, sort_keys=True).encode()).hexdigest()


def _parse_digest(text: bytes) -> dict[str, Any] | None:
    """The content of a digest, or None if it is damaged."""
    try:
        content = json.loads(text)
        own = content.pop("digest")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return None
    return content if own == _hash_of(content) else None


def num_bytes(state: TrainState) -> int:
    """Return the bytes of a state on all devices together, which a checkpoint takes at most."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def free_bytes(path: epath.Path) -> int | None:
    """Return the free bytes on the disk of `path`, which need not exist; None for a bucket or a broken disk."""
    if is_remote(str(path)):
        return None
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def checkpoints_to_write(config: Config, saved: list[int]) -> int:
    """Return how many checkpoints a run has yet to write after the steps `saved`."""
    left, every = max(config.steps - max(saved, default=0), 0), config.checkpoint.every
    return -(-left // every) if every else min(left, 1)


def most_added(config: Config, saved: list[int]) -> int:
    """Return how many checkpoints a run keeps at most at a time, besides the steps `saved`.

    A new checkpoint is complete before the oldest is deleted, so that a run needs space for one more than it keeps.
    """
    settings, newest = config.checkpoint, max(saved, default=0)
    most = settings.keep + 1
    if every := settings.keep_every:
        most += config.steps // every - newest // every + sum(step % every == 0 for step in saved)
    return min(checkpoints_to_write(config, saved), max(most - len(saved), 1))


def bytes_of_interrupted_saves(checkpoints: epath.Path) -> int:
    """Bytes of unfinished checkpoints, which are deleted when the run opens the folder."""
    names = [root for root, _, _ in os.walk(checkpoints) if ".orbax-checkpoint-tmp" in root]
    return sum(entry.stat().st_size for name in names for entry in os.scandir(name) if entry.is_file())


_ELEMENTS = 1 << 14  # all processes read smaller arrays whole: a collective would cost more


def split_for_reading(abstract: Any) -> Any:
    """Return `abstract` arrays in the shardings in which they are read: large ones are split over all devices.

    Otherwise every host would read arrays that it has whole, and a bucket would serve the state once per host. The
    devices exchange their parts over their own network, which is faster.
    """
    layout = jax.tree.leaves(abstract)[0].sharding
    if not isinstance(layout, NamedSharding) or not _spans_processes(layout):
        return abstract
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_split(x, x.sharding)), abstract)


def gather_parts(arrays: Any, abstract: Any) -> Any:
    """Return `arrays` that were read as `split_for_reading(abstract)` in the shardings of `abstract`."""
    read, structure = jax.tree.flatten(arrays)
    layouts = [x.sharding for x in jax.tree.leaves(abstract)]
    split = [i for i, (x, layout) in enumerate(zip(read, layouts, strict=True)) if x.sharding != layout]
    if not split:
        return arrays
    with warnings.catch_warnings():
        # The parts are donated, as they might not fit next to the result; they are smaller than it.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        gather_parts = jax.jit(lambda x: x, out_shardings=[layouts[i] for i in split], donate_argnums=0)
        whole = gather_parts([read[i] for i in split])
    for i, x in zip(split, whole, strict=True):
        read[i] = x
    return structure.unflatten(read)


def _spans_processes(layout: NamedSharding) -> bool:
    return len({device.process_index for device in layout.mesh.devices.flat}) > 1


def _split(x: jax.ShapeDtypeStruct, layout: NamedSharding) -> NamedSharding:
    """`layout` split further, over all mesh axes that it does not use.

    Orbax writes copies of an array in parts, along the first dimension that their number divides, and it reads whole
    parts: along another dimension each process would read all of them.
    """
    spec = [_axes_of(part) for part in (*layout.spec, *[None] * (len(x.shape) - len(layout.spec)))]
    free = tuple(axis for axis in layout.mesh.axis_names if all(axis not in part for part in spec))
    copies = math.prod(layout.mesh.shape[axis] for axis in free)
    if copies == 1 or math.prod(x.shape) < _ELEMENTS:
        return layout
    for i, size in enumerate(layout.shard_shape(x.shape)):
        if size % copies == 0:
            spec[i] += free
            return NamedSharding(layout.mesh, PartitionSpec(*(part or None for part in spec)))
    return layout


def _axes_of(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())
