"""Read files of weights as fp32 tensors by name, and write safetensors files."""

import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.run_folder import RunReader

Tensors = dict[str, np.ndarray]

# Names of weights, of which the first in a folder or repository is read.
NAMES = (
    "xclip_model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "model.safetensors", "model.safetensors.index.json", "open_clip_pytorch_model.bin", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
OPENAI = "input_resolution"  # an entry of OpenAI's archives, which need no config; 0 for others of TorchScript
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
    if RunReader(path).is_run():
        raise UserError(f"{path!r} is a run directory; write its weights with xclip-jax export.")
    return folder / choose([file.name for file in folder.iterdir()], f"folder {path!r}")


def choose(names: Collection[str], where: str, remedy: str = "name one") -> str:
    """Choose the file of weights among the files of a folder or repository: by its standard name, else the only one.

    Raises:
      UserError: no file of weights, or several, with the `remedy` in the message.
    """
    files = sorted(name for name in names if name.endswith(SUFFIXES) and "/" not in name)
    standard = next((name for name in NAMES if name in names), None)
    if standard or len(files) == 1:
        return standard or files[0]
    listed = f"several: {', '.join(files[:4])}; {remedy}" if files else f"only {', '.join(sorted(names)[:6]) or 'none'}"
    raise UserError(f"{where} has no file of weights that can be read ({', '.join(SUFFIXES)}); its files are {listed}.")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: the file is missing or contains something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download it again.")
    return content


def tensors(file: epath.Path) -> Tensors:
    """Read all tensors of a file, or of the files of an index, in fp32, by name."""
    if file.name.endswith(".index.json"):
        shards = [file.parent / name for name in files_of(file)]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise UserError(f"{file} names {', '.join(missing[:4])}, not in its folder; download all of its files.")
        return {name: x for shard in shards for name, x in tensors(shard).items()}
    if file.suffix == ".safetensors":
        try:
            content = safetensors.deserialize(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise UserError(f"{file} is a damaged or incomplete safetensors file: {error}.") from error
        # Removed one by one, so that memory never holds all tensors in two dtypes.
        return {name: _array(info, name, file) for name, info in (content.pop() for _ in range(len(content)))}
    data = file.read_bytes()
    content, scripted = load_torch(data, str(file))
    size = len(data)
    del data
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not any(isinstance(x, np.ndarray) for x in content.values()):
        raise UserError(f"{file} contains no dict of tensors and none under 'state_dict'; name a file of weights.")
    arrays = {str(name): x for name, x in content.items() if isinstance(x, np.ndarray)}
    if sum(x.size for x in arrays.values()) > _MOST_VIEWS * size:
        raise UserError(f"{file} has the same numbers in too many tensors. Convert it: {REMEDY}.")
    del content
    by_name = {name: arrays.pop(name).astype(np.float32, copy=False) for name in list(arrays)}
    for prefix in ("module.", "_orig_mod.", "module."):  # prefixes of distributed and compiled models, in any order
        if all(name.startswith(prefix) for name in by_name):
            by_name = {name.removeprefix(prefix): x for name, x in by_name.items()}
    return ({OPENAI: np.zeros((), np.float32)} if scripted else {}) | by_name


def files_of(file: epath.Path) -> list[str]:
    """Return the names of the files of weights listed in the index `file`, all in its folder."""
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file} has no 'weight_map' of tensors and files; download it again.")
    for name in names.values():
        # Another index could name this one, in a circle.
        if not (isinstance(name, str) and name.endswith(SUFFIXES)) or "/" in name:
            raise UserError(f"{file} names {name!r}, not a file of weights ({', '.join(SUFFIXES)}) in its folder.")
    return sorted(set(names.values()))


def _array(info: Mapping[str, Any], name: str, file: epath.Path) -> np.ndarray:
    if info["dtype"] not in _DTYPES:
        raise UserError(f"{file}: tensor {name} is of type {info['dtype']}; convert it to F32.")
    return np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"]).astype(np.float32, copy=False)


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
# Limit on the elements of all tensors per byte of the file: tied weights are several views of one storage, and a few
# bytes of a pickle can make one more view of a large storage.
_MOST_VIEWS = 4
# Limit on the letters of all names in a TorchScript archive: in a chain of shared modules each link can double them.
_MOST_LETTERS = 1 << 24
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
    """The pickle contains a forbidden name or object."""


def load_torch(data: bytes, where: str) -> tuple[Any, bool]:
    """Read a file of `torch.save` or `torch.jit.save`, without torch and without running code in it.

    Such a file is a zip of raw storages and one pickle. A pickle is a program that may call any function by name; this
    reader resolves only the names that build tensors, to its own functions. Memory and time are proportional to the
    file's size, whatever numbers it contains.

    Returns:
      The saved object, with tensors as NumPy arrays of unchanged dtype, and whether it is a TorchScript archive, which
      becomes a flat dict of its modules' tensors.

    Raises:
      UserError: the file is of another kind, damaged, or contains other objects than tensors.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        scripted = f"{root}constants.pkl" in archive.namelist()
        content = _Unpickler(archive, root, scripted).load()
        return (_flat(content) if scripted else content), scripted
    except (zipfile.BadZipFile, StopIteration) as error:
        if data.startswith(b"PK\x03\x04"):
            raise UserError(f"{where} is incomplete or no file of torch.save ({error}); download it again.") from error
        raise UserError(
            f"{where} is not a zip of torch.save, which has written such since version 1.6; older files cannot be read "
            f"safely. Convert it: {REMEDY}."
        ) from error
    except _Refused as error:
        raise UserError(f"{where} contains more than tensors: it asks for {error}. Convert it: {REMEDY}.") from error
    except Exception as error:  # a damaged file raises errors of any type
        raise UserError(f"{where} is damaged: {first_line(error)}.") from error


def _flat(module: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a module and of the modules inside it, by name."""
    tensors: dict[str, np.ndarray] = {}
    modules = [("", module)]
    letters = 0
    for prefix, owner in modules:  # the loop appends to it
        for name, value in owner.attributes.items() if isinstance(owner, Scripted) else ():
            full = f"{prefix}{name}"
            letters += len(full) + 1
            if letters > _MOST_LETTERS:
                raise _Refused("modules without end")
            if isinstance(value, np.ndarray):
                tensors[full] = value
            modules.append((f"{full}.", value))
    return tensors


class _Dict(dict):
    """A dict with strings and numbers as keys: a few nested tuples can take years to hash."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float):
            raise _Refused("a key that is neither a string nor a number")
        super().__setitem__(key, value)


def _refuse(unpickler: "_Unpickler") -> None:
    raise _Refused("a set, an array of bytes of any length, or a dict of any keys")


class _Unpickler(pickle._Unpickler):
    """Resolves ordered dicts, storages, and functions that rebuild tensors.

    It derives from pickle's Python unpickler, since the memo of the C one is as long as the largest index in the file.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{code[0]: _refuse for code in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)},
        pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Dict()),
    }

    def __init__(self, archive: zipfile.ZipFile, root: str, scripted: bool) -> None:
        self._archive, self._root, self._scripted = archive, root, scripted
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
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"compressed data, {name!r}")
        return self._archive.read(info.filename)

    def find_class(self, module: str, name: str) -> Any:
        """Resolve module.name."""
        if module == "torch" and name in _STORAGES:
            return name
        if f"{module}.{name}" in self._known:
            return self._known[f"{module}.{name}"]
        if self._scripted and module.split(".")[0] == "__torch__":
            return type("Scripted", (Scripted,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read the storage ("storage", type, key, device, elements)."""
        _, storage, key = pid[:3]
        if not (isinstance(storage, str) and isinstance(key, str)):
            raise _Refused("a storage without a name")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._member(f"data/{key}"), _STORAGES[storage])
        return self._storages[key]


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """View a storage as a tensor, within its bounds, so that a file cannot make this process read other memory."""
    if not (isinstance(storage, np.ndarray) and isinstance(storage.base, bytes)):
        raise _Refused("a tensor of another tensor")  # whose length is not its memory
    if not len(size) == len(stride) <= 64 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise _Refused("a tensor of negative size, or too many dimensions")
    if not all(size):
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if max(last + 1, math.prod(size)) > len(storage):
        raise _Refused("a tensor beyond its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
