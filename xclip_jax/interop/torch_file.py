"""Reads tensors of files by `torch.save` and `torch.jit.save`, without torch and without running code in them.

Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by its name; this
reader resolves only the names that build tensors, to functions of its own.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from xclip_jax.errors import UserError

_DTYPES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
REMEDY = (
    "on a machine with torch and a file that you trust: safetensors.torch.save_file(tensors, 'weights.safetensors'), "
    "with tensors a dict of them by name"
)


class Scripted:
    """A module of a TorchScript archive: its attributes and no code."""

    attributes: Mapping[str, Any] = {}  # pickles do not call __init__

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Refused(Exception):
    """A name or object of the pickle that is not allowed."""


def load(data: bytes, where: str) -> tuple[Any, bool]:
    """Return the saved object, tensors as NumPy arrays in their own dtype, and whether it is a TorchScript archive.

    A TorchScript archive is returned as a flat dict of the tensors of its modules.

    Raises:
      UserError: another file, a damaged one, or one with other objects than tensors.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{where} is not a zip, as torch.save has written since version 1.6 ({error}); older files cannot be read "
            f"safely. Convert it: {REMEDY}."
        ) from error
    tops = (name.rpartition("/")[0] for name in names if name.endswith("/data.pkl"))
    root = next((f"{top}/" for top in tops if "/" not in top), None)
    if root is None:
        raise UserError(f"{where} is a zip without data.pkl, so torch did not write it; name a file of weights.")
    scripted = f"{root}constants.pkl" in names
    try:
        if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder") != b"little":
            raise _Refused("big-endian numbers")
        content = _Unpickler(archive, root, scripted).load()
        return (_flat(content, "") if scripted else content), scripted
    except _Refused as error:
        raise UserError(f"{where} contains more than tensors: it asks for {error}. Convert it: {REMEDY}.") from error
    except Exception as error:  # of any type, from a damaged file
        raise UserError(f"{where} is damaged: {type(error).__name__}: {error}.") from error


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an uncompressed member: torch does not compress its data, and compressed data may unpack to any size."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"compressed data, {name}")
    return archive.read(name)


def _flat(module: Any, prefix: str) -> dict[str, np.ndarray]:
    if not isinstance(module, Scripted):
        return {}
    tensors = {}
    for name, value in module.attributes.items():
        if isinstance(value, np.ndarray):
            tensors[prefix + name] = value
        else:
            tensors |= _flat(value, f"{prefix}{name}.")
    return tensors


class _Unpickler(pickle.Unpickler):
    """Resolves ordered dicts, storages, and functions that rebuild tensors.

    It makes new ones for each file, since a pickle may change attributes of the objects that it gets.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, scripted: bool) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{root}data.pkl")))
        self._archive, self._root, self._scripted = archive, root, scripted
        self._storages: dict[str, np.ndarray] = {}
        self._known: Mapping[str, Callable[[], Any]] = {
            "collections.OrderedDict": lambda: type("OrderedDict", (collections.OrderedDict,), {}),
            "torch._utils._rebuild_tensor_v2": lambda: lambda *args: _tensor(*args[:4]),
            "torch._utils._rebuild_parameter": lambda: lambda data, *_: data,
        }
        if scripted:
            lists = ("intlist", "doublelist", "boollist", "tensorlist")
            self._known = self._known | {f"torch.jit._pickle.build_{name}": lambda: lambda x: x for name in lists}
            self._known = self._known | {"torch.jit._pickle.restore_type_tag": lambda: lambda x, _: x}

    def find_class(self, module: str, name: str) -> Any:
        """Resolve module.name."""
        if module == "torch" and name in _DTYPES:
            return name
        if f"{module}.{name}" in self._known:
            return self._known[f"{module}.{name}"]()
        if self._scripted and module.split(".")[0] == "__torch__":
            return type("Scripted", (Scripted,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read the storage ("storage", type, key, device, elements)."""
        tag, storage, key = pid[:3]
        if tag != "storage" or storage not in _DTYPES:
            raise _Refused(f"a storage of type {storage!r}")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(_stored(self._archive, f"{self._root}data/{key}"), _DTYPES[storage])
        return self._storages[key]


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """View of a storage as a tensor. Bounds are checked: a file must not make this process read other memory."""
    if len(size) != len(stride) or min((0, offset, *size, *stride)) < 0:
        raise _Refused("a tensor of negative size")
    count = int(np.prod(size, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise _Refused("a tensor beyond its storage")
    if not count:
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
