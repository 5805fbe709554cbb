"""Reads tensors of files by `torch.save` and `torch.jit.save`, without torch and without running code in them.

Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by its name; this
reader resolves only the names that build tensors, to functions of its own. Memory and time are in proportion to the
file's size, whatever its numbers say.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from xclip_jax.core.errors import UserError, first_line

_DTYPES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# Elements of all tensors over the file's bytes: weights that are tied are several views of one storage, and a few
# bytes could name another view of a large one.
_MOST_VIEWS = 4
_MOST_DIMENSIONS = 32
# Letters of all names of a TorchScript archive: modules may be shared, and each link of a chain double their number.
_MOST_LETTERS = 1 << 24
_SCALARS = (str, bytes, int, float, bool, type(None))
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
        archive = _Archive(data)
        names = set(archive.namelist())
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{where} is not a zip, as torch.save has written since version 1.6 ({error}); older files cannot be read "
            f"safely. Convert it: {REMEDY}."
        ) from error
    except Exception as error:  # of a damaged directory, of any type
        raise UserError(f"{where} is damaged: {first_line(error)}.") from error
    tops = (name.rpartition("/")[0] for name in archive.namelist() if name.endswith("/data.pkl"))
    root = next((f"{top}/" for top in tops if "/" not in top), None)
    if root is None:
        raise UserError(f"{where} is a zip without data.pkl, so torch did not write it; name a file of weights.")
    scripted = f"{root}constants.pkl" in names
    try:
        if f"{root}byteorder" in names and archive.stored(f"{root}byteorder") != b"little":
            raise _Refused("big-endian numbers")
        content = _Unpickler(archive, root, scripted, _MOST_VIEWS * len(data)).load()
        return (_flat(content) if scripted else content), scripted
    except _Refused as error:
        raise UserError(f"{where} contains more than tensors: it asks for {error}. Convert it: {REMEDY}.") from error
    except Exception as error:  # of any type, from a damaged file
        raise UserError(f"{where} is damaged: {first_line(error)}.") from error


class _Archive(zipfile.ZipFile):
    """The zip, of which no more is read than it has bytes: its directory may name one part many times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._left = len(data)

    def stored(self, name: str) -> bytes:
        """Read an uncompressed member: torch does not compress its data, and compressed data may unpack to any size."""
        if self.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"compressed data, {name!r}")
        content = self.read(name)
        self._left -= len(content)
        if self._left < 0:
            raise _Refused("members that overlap")
        return content


def _flat(module: Any) -> dict[str, np.ndarray]:
    """Tensors of a module and of those in it, by name."""
    tensors: dict[str, np.ndarray] = {}
    modules, letters = [("", module)], 0
    for prefix, owner in modules:  # which grows
        for name, value in owner.attributes.items() if isinstance(owner, Scripted) else ():
            full = f"{prefix}{name}"
            letters += len(full) + 1
            if letters > _MOST_LETTERS:
                raise _Refused("modules without end")
            if isinstance(value, np.ndarray):
                tensors[full] = value
            elif isinstance(value, Scripted):
                modules.append((f"{full}.", value))
    return tensors


class _OrderedDict(collections.OrderedDict):
    def __init__(self) -> None:
        """Empty: keys are set, and checked, one by one."""
        super().__init__()


# What of the stack becomes a key of a dict or an element of a set, by instruction. Tuples in tuples, each twice in the
# next, take exponential time to hash: a key may have one level of them.
_KEYS = {
    pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: slice(0, None, 2), pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None), pickle.FROZENSET: slice(None),
}  # fmt: skip


def _checked(instruction: bytes, keys: slice) -> Callable[[Any], None]:
    load: Any = pickle._Unpickler.dispatch[instruction[0]]

    def check_and_load(unpickler: "_Unpickler") -> None:
        for key in unpickler.stack[keys]:
            if not all(isinstance(part, _SCALARS) for part in (key if isinstance(key, tuple) else (key,))):
                raise _Refused("a key that is neither a string nor a number")
        load(unpickler)

    return check_and_load


def _refuse_bytearray(unpickler: "_Unpickler") -> None:
    raise _Refused("an array of bytes, which may have any length")


class _Unpickler(pickle._Unpickler):
    """Resolves ordered dicts, storages, and functions that rebuild tensors.

    It makes new ones for each file, since a pickle may change attributes of the objects that it gets. Of pickle's two
    unpicklers it is the one in Python: the other's memo is a list as long as the largest index in the file.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{instruction[0]: _checked(instruction, keys) for instruction, keys in _KEYS.items()},
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }
    stack: list[Any]

    def __init__(self, archive: _Archive, root: str, scripted: bool, elements: int) -> None:
        super().__init__(io.BytesIO(archive.stored(f"{root}data.pkl")))
        self._archive, self._root, self._scripted = archive, root, scripted
        self._elements = elements  # of tensors that may still be made
        self._storages: dict[str, np.ndarray] = {}
        self._known: Mapping[str, Callable[[], Any]] = {
            "collections.OrderedDict": lambda: type("OrderedDict", (_OrderedDict,), {}),
            "torch._utils._rebuild_tensor_v2": lambda: lambda *args: self._rebuild(*args[:4]),
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
        if not (tag == "storage" and isinstance(storage, str) and storage in _DTYPES and isinstance(key, str)):
            raise _Refused(f"a storage of type {storage!r}" if isinstance(storage, str) else "a storage without a type")
        if key not in self._storages:
            content = self._archive.stored(f"{self._root}data/{key}")
            self._storages[key] = np.frombuffer(content, _DTYPES[storage])
        return self._storages[key]

    def _rebuild(self, *args: Any) -> np.ndarray:
        tensor = _tensor(*args)
        self._elements -= tensor.size
        if self._elements < 0:
            raise _Refused("the same storage too many times")
        return tensor


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """View of a storage as a tensor. Bounds are checked: a file must not make this process read other memory."""
    numbers = (offset, *size, *stride)
    if not len(size) == len(stride) <= _MOST_DIMENSIONS or any(type(n) is not int or n >> 48 for n in numbers):
        raise _Refused("a tensor of negative size, or too large")
    count = int(np.prod(size, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage) or (count and last >= len(storage)):
        raise _Refused("a tensor beyond its storage")
    if not count:
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
