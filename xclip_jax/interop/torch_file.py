"""Tensors of files that `torch.save` and `torch.jit.save` wrote, without torch and without running what is in them.

Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by its name; here
it finds none but those that put tensors together, and these are ours.
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
    """What the pickle asked for and is not given."""


def load(content: bytes, where: str) -> tuple[Any, bool]:
    """What was saved, tensors as NumPy arrays in their own dtype; and whether it is a TorchScript archive.

    A TorchScript archive comes as a flat dict of the tensors of its modules.

    Raises:
      UserError: no such file, a damaged one, or one that asks for anything but tensors.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{where} is no zip, as torch.save has written since version 1.6 ({error}); older files cannot be read "
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
        found = _Unpickler(archive, root, scripted).load()
        return (_flat(found, "") if scripted else found), scripted
    except _Refused as error:
        raise UserError(f"{where} holds more than tensors: it asks for {error}. Convert it: {REMEDY}.") from error
    except Exception as error:  # whatever a damaged file provokes
        raise UserError(f"{where} is damaged: {type(error).__name__}: {error}.") from error


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member as it lies there: torch does not compress its data, and a file may unpack to any size."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"compressed data, {name}")
    return archive.read(name)


def _flat(module: Any, prefix: str) -> dict[str, np.ndarray]:
    if not isinstance(module, Scripted):
        return {}
    found = {}
    for name, value in module.attributes.items():
        if isinstance(value, np.ndarray):
            found[prefix + name] = value
        else:
            found |= _flat(value, f"{prefix}{name}.")
    return found


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, storages, and functions that rebuild tensors.

    What it hands out is made anew for each file, since a pickle may change attributes of what it is given.
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
            kinds = ("intlist", "doublelist", "boollist", "tensorlist")
            self._known = self._known | {f"torch.jit._pickle.build_{kind}": lambda: lambda x: x for kind in kinds}
            self._known = self._known | {"torch.jit._pickle.restore_type_tag": lambda: lambda x, _: x}

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle calls module.name."""
        if module == "torch" and name in _DTYPES:
            return name
        if f"{module}.{name}" in self._known:
            return self._known[f"{module}.{name}"]()
        if self._scripted and module.split(".")[0] == "__torch__":
            return type("Scripted", (Scripted,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage ("storage", kind, key, device, elements)."""
        kind, storage, key = pid[:3]
        if kind != "storage" or storage not in _DTYPES:
            raise _Refused(f"a storage of kind {storage!r}")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(_stored(self._archive, f"{self._root}data/{key}"), _DTYPES[storage])
        return self._storages[key]


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """The part of a storage that a tensor shows. Bounds are checked: a file must not make us read other memory."""
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
