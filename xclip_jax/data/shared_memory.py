"""A pool of shared memory through which worker processes hand over batches.

Grain allocates shared memory for each batch: a page fault for each 4 kB, which costs a fifteenth of the time in which
the images are decoded, and a copy. The memory of a pool is reused.
"""

import mmap
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from xclip_jax import ending
from xclip_jax.errors import UserError

_ALIGN = 4096
_FREE, _IN_USE = 0, 1

_pools: "weakref.WeakSet[SharedBatchPool]" = weakref.WeakSet()

Spec = Mapping[str, tuple[tuple[int, ...], Any]]


def _folder() -> str:
    """Folder of files in memory, or the temporary folder."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


class SharedBatchPool:
    """Memory for `depth` batches of each of `workers` processes. The reading process creates it, workers unpickle it.

    A worker acquires a free slot and fills it; the reader receives its arrays, and when the last reference to them is
    gone the slot is free again. A worker without a free slot has to send the batch in another way.
    """

    def __init__(self, spec: Spec, workers: int, depth: int) -> None:
        """Allocates the memory.

        Args:
          spec: shape and type of each array of a batch, by name.
          workers: number of processes, each with slots of its own.
          depth: number of slots of each.

        Raises:
          UserError: too little memory.
        """
        self.spec, self.depth = dict(spec), depth
        self._offsets, self._size = {}, _ALIGN  # a page for the flag
        for key, (shape, dtype) in self.spec.items():
            self._offsets[key] = self._size
            self._size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        required, free = workers * depth * self._size, shutil.disk_usage(_folder()).free
        if required > free:  # else a worker would be killed when it writes past the end
            raise UserError(
                f"{workers} workers need {required / 1e6:,.0f} MB in {_folder()}, which has {free / 1e6:,.0f} MB: make "
                "it larger (docker run --shm-size), or lower data.workers; 0 is threads, which need none."
            )
        self._paths = []
        for _ in range(workers):
            handle, path = tempfile.mkstemp(prefix="xclip_jax-", dir=_folder())
            os.ftruncate(handle, depth * self._size)
            os.close(handle)
            self._paths.append(path)
        self._maps: dict[int, mmap.mmap] = {worker: self._map(worker) for worker in range(workers)}
        self._remove = [weakref.finalize(self, pathlib.Path(path).unlink, missing_ok=True) for path in self._paths]
        _pools.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory: a worker maps its own part."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_maps", "_remove")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_maps": {}, "_remove": []}

    def _map(self, worker: int) -> mmap.mmap:
        with open(self._paths[worker], "r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    def _arrays(self, worker: int, slot: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return all bytes of a slot, and the arrays that are views of them."""
        whole = np.frombuffer(self._maps[worker], np.uint8, self._size, slot * self._size)
        arrays = {}
        for key, (shape, dtype) in self.spec.items():
            start, size = self._offsets[key], int(np.prod(shape)) * np.dtype(dtype).itemsize
            arrays[key] = whole[start : start + size].view(dtype).reshape(shape)
        return whole, arrays

    def acquire(self, worker: int) -> tuple[int, dict[str, np.ndarray]] | None:
        """In a worker: return the number of a free slot and its arrays, to write to; None where all are in use."""
        if worker not in self._maps:
            self._maps[worker] = self._map(worker)
        for slot in range(self.depth):
            if self._maps[worker][slot * self._size] == _FREE:
                self._maps[worker][slot * self._size] = _IN_USE
                return slot, self._arrays(worker, slot)[1]
        return None

    def receive(self, worker: int, slot: int) -> dict[str, np.ndarray]:
        """In the reader: return the arrays of a slot that a worker filled. It is free after their last reference."""
        if self._remove[worker].alive:
            self._remove[worker]()  # both have it open: without a name no file is left if they are killed
        whole, arrays = self._arrays(worker, slot)
        # All views keep `whole` alive, because its own base is not an array.
        weakref.finalize(whole, self._free, worker, slot).atexit = False
        return arrays

    def _free(self, worker: int, slot: int) -> None:
        self._maps[worker][slot * self._size] = _FREE

    def unlink(self) -> None:
        """Remove the names of the memory, which is free when the last process that uses it ends."""
        for remove in self._remove:
            remove()


def _unlink_all() -> None:
    """Remove the names of all pools: for a process that ends without its finalizers."""
    for pool in list(_pools):
        pool.unlink()


ending.last_acts.append(_unlink_all)
