"""Read files of weights as fp32 tensors by name, and write safetensors files."""

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import unreadable_as, write_whole

Tensors = dict[str, np.ndarray]

# Standard names of weights; the first one in a folder or repository is read.
NAMES = (
    "xclip_model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "model.safetensors", "model.safetensors.index.json", "open_clip_pytorch_model.bin", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
# An entry of OpenAI's archives, which need no config.
OPENAI = "input_resolution"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def find(path: str) -> epath.Path:
    """Return the file of weights at `path`, a file or a folder; raise `UserError` if there is none, see `choose`."""
    place = epath.Path(path)
    if place.is_dir():
        remedy = "name one (for a run's weights, its xclip-jax export)"
        return place / choose([file.name for file in place.iterdir()], f"folder {path!r}", remedy)
    if place.exists() and (place.suffix in SUFFIXES or place.name in NAMES):
        return place
    raise UserError(f"{path!r} is not a folder or a file of weights ({', '.join(SUFFIXES)}); name an existing one.")


def choose(names: Collection[str], where: str, remedy: str) -> str:
    """Choose a folder's or repository's file of weights: by its standard name, else the only one.

    A `UserError` about no or several such files contains `where` and `remedy`.
    """
    files = sorted(name for name in names if name.endswith(SUFFIXES) and "/" not in name)
    standard = next((name for name in NAMES if name in names), None)
    if standard or len(files) == 1:
        return standard or files[0]
    listed = ", ".join(files[:4] or sorted(names)[:6]) or "none"
    raise UserError(f"{where} has no file of weights ({', '.join(SUFFIXES)}), or several: {listed}; {remedy}.")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read a JSON object; raise `UserError` if the file is missing or contains something else."""
    with unreadable_as(f"{path} cannot be read as a JSON object"):
        return {**json.loads(path.read_text())}


def json_text(content: Any) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def files_of(file: epath.Path) -> list[str]:
    """Return the names of the files of weights listed in the index `file`, all in its folder."""
    stored = read_json(file).get("weight_map")
    names = list(stored.values()) if isinstance(stored, dict) else []
    # Another index could name this one, in a circle.
    if not names or not all(isinstance(name, str) and name.endswith(SUFFIXES) and "/" not in name for name in names):
        raise UserError(
            f"{file} has no 'weight_map' of tensors to files ({', '.join(SUFFIXES)}) in its folder; download it again."
        )
    return sorted(set(names))


def tensors(file: epath.Path) -> Tensors:
    """Read all tensors in a file, or in the files of an index, as fp32 by name; raise `UserError` if one is damaged."""
    if file.name.endswith(".index.json"):
        return {name: x for shard in files_of(file) for name, x in tensors(file.parent / shard).items()}
    with unreadable_as(f"{file} cannot be read; download it again, or convert it: {REMEDY}"):
        if file.suffix != ".safetensors":
            return _torch_tensors(file.read_bytes())
        content = safetensors.deserialize(file.read_bytes())
        # Removed one by one, so that memory never holds all tensors in two dtypes.
        return {name: _array(info) for name, info in (content.pop() for _ in range(len(content)))}


def _array(info: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"]).astype(np.float32, copy=False)


def write(path: epath.Path, by_name: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically, with the format "pt" in its metadata, which transformers requires."""
    contiguous = {name: np.asarray(x, order="C") for name, x in by_name.items()}
    write_whole(path, safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


_STORAGES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# Limit on the elements of all tensors per byte of the file: tied weights are several views of one storage, and a few
# bytes of a pickle can add another view of a large storage.
_MOST_VIEWS = 4
# Limit on the letters of all names in a TorchScript archive: in a chain of shared modules each link can double them.
_MOST_LETTERS = 1 << 24
REMEDY = (
    "on a machine with torch and a trusted file, safetensors.torch.save_file(tensors, 'weights.safetensors') with a "
    "dict of tensors by name"
)


class Scripted:
    """A module of a TorchScript archive: its attributes without its code."""

    attributes: Mapping[str, Any] = {}  # pickles do not call __init__

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(fault)


def _torch_tensors(data: bytes) -> Tensors:
    content = load_torch(data)
    content = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    arrays = {str(name): x for name, x in content.items() if isinstance(x, np.ndarray)}
    size = sum(x.size for x in arrays.values())
    _require(0 < size <= _MOST_VIEWS * len(data), "it contains no tensors, or the same numbers in too many of them")
    del content, data
    by_name = {name: arrays.pop(name).astype(np.float32, copy=False) for name in list(arrays)}
    # Without the prefixes of distributed and compiled models.
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in by_name.items()}


def load_torch(data: bytes) -> Any:
    """Read a file of `torch.save` (since 1.6) or `torch.jit.save`, without torch and without running code in it.

    Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by name; this
    reader resolves only the names that build tensors, to its own functions. Memory and time are proportional to the
    file's size, whatever numbers it contains. Other objects and damaged files raise errors of any type.

    Returns:
      The saved object, with tensors as NumPy arrays of unchanged dtype; a flat dict of a TorchScript archive's tensors.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    scripted = f"{roots[0]}constants.pkl" in archive.namelist()
    content = _Unpickler(archive, roots[0], scripted).load()
    return _flat(content) if scripted else content


def _flat(module: Any) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    modules = [("", module)]
    letters = 0
    for prefix, owner in modules:  # the loop appends to it
        for name, value in owner.attributes.items() if isinstance(owner, Scripted) else ():
            full = f"{prefix}{name}"
            letters += len(full) + 1
            _require(letters <= _MOST_LETTERS, "it contains modules without end")
            if isinstance(value, np.ndarray):
                tensors[full] = value
            modules.append((f"{full}.", value))
    return tensors


def _plain(key: Any) -> Any:
    """Return a string or a number: a few nested tuples as a key can take years to hash."""
    _require(isinstance(key, str | int | float), "it asks for a key that is neither a string nor a number")
    return key


class _Dict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_plain(key), value)


# Sets and dicts with any keys, and arrays of bytes with any length.
_REFUSED = {code[0] for code in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)}


class _Unpickler(pickle._Unpickler):
    """Resolves ordered dicts, storages, and functions that rebuild tensors.

    It derives from pickle's Python unpickler, since the memo of the C one is as long as the largest index in the file.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: read for code, read in pickle._Unpickler.dispatch.items() if code not in _REFUSED},
        pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Dict()),
    }

    def __init__(self, archive: zipfile.ZipFile, root: str, scripted: bool) -> None:
        self._archive = archive
        self._root = root
        self._scripted = scripted
        super().__init__(io.BytesIO(self._member("data.pkl")))
        self._storages: dict[str, np.ndarray] = {}
        # New for each file, since a pickle may change attributes of the objects that it receives.
        self._known: dict[str, Any] = {
            "collections.OrderedDict": lambda: _Dict(),
            "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(*args[:4]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        if scripted:
            lists = ("intlist", "doublelist", "boollist", "tensorlist")
            self._known |= {f"torch.jit._pickle.build_{name}": lambda x: x for name in lists}
            self._known["torch.jit._pickle.restore_type_tag"] = lambda x, _: x

    def _member(self, name: str) -> bytes:
        """Read an uncompressed file of the zip, like torch's: compressed data may unpack to any size."""
        info = self._archive.getinfo(self._root + name)
        _require(info.compress_type == zipfile.ZIP_STORED, f"it asks for compressed data, {name!r}")
        return self._archive.read(info.filename)

    def find_class(self, module: str, name: str) -> Any:
        """Resolve module.name."""
        if module == "torch" and name in _STORAGES:
            return name
        if f"{module}.{name}" in self._known:
            return self._known[f"{module}.{name}"]
        is_module = self._scripted and module.split(".")[0] == "__torch__"
        _require(is_module, f"it asks for {module}.{name}, more than tensors")
        return type("Scripted", (Scripted,), {})

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read the storage ("storage", type, key, device, elements)."""
        storage = _plain(pid[1])
        key = _plain(pid[2])
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._member(f"data/{key}"), _STORAGES[storage])
        return self._storages[key]


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """View a storage as a tensor, within its bounds, so that a file cannot make this process read other memory."""
    fits = isinstance(storage, np.ndarray) and isinstance(storage.base, bytes)  # a tensor's length is not its memory
    fits = fits and len(size) == len(stride) <= 64
    fits = fits and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    if fits and all(size):
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        fits = max(last + 1, math.prod(size)) <= len(storage)
    _require(fits, "it asks for a tensor that does not fit its storage")
    if not all(size):
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
