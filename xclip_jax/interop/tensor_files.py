"""Read files of weights as fp32 tensors by name, and write safetensors files."""

import collections
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from xclip_jax.core.console import command
from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.run_folder import is_run

Tensors = dict[str, np.ndarray]

# The first of these files in a folder is read.
NAMES = (
    "xclip_model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def find(path: str) -> epath.Path:
    """Return the file of weights at `path`, a file or a folder.

    Raises:
      UserError: no file of weights, or several without a standard name.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        if folder.exists() and (folder.suffix in SUFFIXES or folder.name in NAMES):
            return folder
        raise UserError(f"{path!r} is not a folder or a file of weights ({', '.join(SUFFIXES)}); name one that exists.")
    if is_run(path):
        raise UserError(f"{path!r} is a run directory; write its weights with {command('export')}.")
    for name in NAMES:
        if (folder / name).exists():
            return folder / name
    files = sorted((file for file in folder.iterdir() if file.suffix in SUFFIXES), key=lambda file: file.name)
    if len(files) == 1:
        return files[0]
    raise UserError(
        f"folder {path!r} contains {'no file' if not files else 'several files'} of weights ({', '.join(SUFFIXES)})"
        f"{': ' + ', '.join(file.name for file in files[:4]) if files else ''}; name the file itself."
    )


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: no such file, or other content.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download it again.")
    return content


def tensors(file: epath.Path) -> tuple[Tensors, str]:
    """Read all tensors of a file, or of the files of an index, in fp32.

    Returns:
      Tensors by name, and the form of the file: "safetensors", "script" (TorchScript), "checkpoint" (a dict with
      state_dict, or names that begin with "module.") or "pickle".
    """
    if file.name.endswith(".index.json"):
        merged: Tensors = {}
        for shard in _shards(file):
            if not (file.parent / shard).exists():
                raise UserError(f"{file} names {shard}, which does not exist; download it.")
            merged |= tensors(file.parent / shard)[0]
        return merged, "safetensors"
    if file.suffix == ".safetensors":
        try:
            content = safetensors.deserialize(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise UserError(f"{file} is a damaged or incomplete safetensors file: {error}.") from error
        return {name: _array(info, name, file) for name, info in content}, "safetensors"
    content, scripted = load_torch(file.read_bytes(), str(file))
    stored = "script" if scripted else "pickle"
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content, stored = content["state_dict"], "checkpoint"
    if not isinstance(content, dict) or not any(isinstance(x, np.ndarray) for x in content.values()):
        raise UserError(f"{file} contains no dict of tensors and none under 'state_dict'; name a file of weights.")
    by_name = {str(name): x.astype(np.float32) for name, x in content.items() if isinstance(x, np.ndarray)}
    for prefix in ("module.", "_orig_mod."):  # prefixes of distributed and compiled models
        if all(name.startswith(prefix) for name in by_name):
            by_name, stored = {name.removeprefix(prefix): x for name, x in by_name.items()}, "checkpoint"
    return by_name, stored


def files_of(file: epath.Path) -> list[str]:
    """Return the names of the files that hold the tensors of `file`: the shards of an index, or the file itself."""
    return _shards(file) if file.name.endswith(".index.json") else [file.name]


def _shards(index: epath.Path) -> list[str]:
    """Names of the files of weights in an index.json, all in its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no 'weight_map' of tensors and files; download it again.")
    for name in names.values():
        # Another index could name this one, in a circle.
        if not (isinstance(name, str) and name.endswith(SUFFIXES)) or "/" in name or "\\" in name:
            raise UserError(f"{index} names {name!r}, not a file of weights ({', '.join(SUFFIXES)}) in its folder.")
    return sorted(set(names.values()))


def _array(info: Mapping[str, Any], name: str, file: epath.Path) -> np.ndarray:
    if info["dtype"] not in _DTYPES:
        raise UserError(f"{file}: tensor {name} is of type {info['dtype']}; convert it to F32.")
    return np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"]).astype(np.float32)


def write(path: epath.Path, by_name: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, with the format "pt" in its metadata, which transformers requires."""
    contiguous = {name: np.asarray(x, order="C") for name, x in by_name.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


# --- files of torch

_STORAGES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# Limit of elements in all tensors for each byte of the file: tied weights are several views of one storage, and a few
# bytes of a pickle can make one more view of a large storage.
_MOST_VIEWS = 4
_MOST_DIMENSIONS = 32
# Limit of letters in all names of a TorchScript archive: in a chain of shared modules each link can double the names.
_MOST_LETTERS = 1 << 24
_SCALARS = (str, bytes, int, float, bool, type(None))
REMEDY = (
    "on a machine with torch and a file that you trust: safetensors.torch.save_file(tensors, 'weights.safetensors'), "
    "with tensors a dict of them by name"
)


class Scripted:
    """A module of a TorchScript archive: its attributes without its code."""

    attributes: Mapping[str, Any] = {}  # pickles do not call __init__

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Refused(Exception):
    """A name or object of the pickle that is not allowed."""


def load_torch(data: bytes, where: str) -> tuple[Any, bool]:
    """Read a file of `torch.save` or `torch.jit.save`, without torch and without running code in it.

    Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by name; this
    reader resolves only the names that build tensors, to functions of its own. Memory and time are proportional to the
    file's size, whatever numbers it contains.

    Returns:
      The saved object, with tensors as NumPy arrays in their own dtype, and whether it is a TorchScript archive, which
      becomes a flat dict of the tensors of its modules.

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
    except Exception as error:  # a damaged directory raises errors of any type
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
    except Exception as error:  # a damaged file raises errors of any type
        raise UserError(f"{where} is damaged: {first_line(error)}.") from error


class _Archive(zipfile.ZipFile):
    """A zip that reads no more bytes than it has: its directory may name one part many times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._unread = len(data)

    def stored(self, name: str) -> bytes:
        """Read an uncompressed member: torch does not compress its data, and compressed data may unpack to any size."""
        if self.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"compressed data, {name!r}")
        content = self.read(name)
        self._unread -= len(content)
        if self._unread < 0:
            raise _Refused("members that overlap")
        return content


def _flat(module: Any) -> dict[str, np.ndarray]:
    """Tensors of a module and of the modules inside it, by name."""
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


# Items of the stack that become keys of a dict or elements of a set, by instruction. Nested tuples take exponential
# time to hash if each occurs twice in the next, so a key may have one level of tuples.
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

    Functions are new for each file, since a pickle may change attributes of the objects that it gets. It derives from
    pickle's unpickler in Python: the memo of the one in C is a list as long as the largest index in the file.
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
        self._elements = elements  # number that further tensors may have
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
        if module == "torch" and name in _STORAGES:
            return name
        if f"{module}.{name}" in self._known:
            return self._known[f"{module}.{name}"]()
        if self._scripted and module.split(".")[0] == "__torch__":
            return type("Scripted", (Scripted,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read the storage ("storage", type, key, device, elements)."""
        tag, storage, key = pid[:3]
        if not (tag == "storage" and isinstance(storage, str) and storage in _STORAGES and isinstance(key, str)):
            raise _Refused(f"a storage of type {storage!r}" if isinstance(storage, str) else "a storage without a type")
        if key not in self._storages:
            content = self._archive.stored(f"{self._root}data/{key}")
            self._storages[key] = np.frombuffer(content, _STORAGES[storage])
        return self._storages[key]

    def _rebuild(self, *args: Any) -> np.ndarray:
        tensor = _tensor(*args)
        self._elements -= tensor.size
        if self._elements < 0:
            raise _Refused("the same storage too many times")
        return tensor


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """View a storage as a tensor. Bounds are checked, so that a file cannot make this process read other memory."""
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
