"""Reads files of weights as tensors by name, in fp32, and writes safetensors files."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from xclip_jax.core.console import command
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import is_run
from xclip_jax.interop import torch_file

Tensors = dict[str, np.ndarray]

# Of a folder's files the first of these is read.
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
      UserError: none, or several without a standard name.
    """
    place = epath.Path(path)
    if not place.is_dir():
        if place.exists() and (place.suffix in SUFFIXES or place.name in NAMES):
            return place
        raise UserError(f"{path!r} is not a folder or a file of weights ({', '.join(SUFFIXES)}); name one that exists.")
    if is_run(path):
        raise UserError(f"{path!r} is a run directory; write its weights with {command('export')}.")
    for name in NAMES:
        if (place / name).exists():
            return place / name
    files = sorted((file for file in place.iterdir() if file.suffix in SUFFIXES), key=lambda file: file.name)
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
    content, scripted = torch_file.load(file.read_bytes(), str(file))
    stored = "script" if scripted else "pickle"
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content, stored = content["state_dict"], "checkpoint"
    if not isinstance(content, dict) or not any(isinstance(x, np.ndarray) for x in content.values()):
        raise UserError(f"{file} contains no dict of tensors and none under 'state_dict'; name a file of weights.")
    by_name = {str(name): x.astype(np.float32) for name, x in content.items() if isinstance(x, np.ndarray)}
    for prefix in ("module.", "_orig_mod."):  # of distributed and of compiled models
        if all(name.startswith(prefix) for name in by_name):
            by_name, stored = {name.removeprefix(prefix): x for name, x in by_name.items()}, "checkpoint"
    return by_name, stored


def files_of(file: epath.Path) -> list[str]:
    """Return the names of the files, all of one folder, that hold the tensors of `file`: of an index its shards."""
    return _shards(file) if file.name.endswith(".index.json") else [file.name]


def _shards(index: epath.Path) -> list[str]:
    """Names of the files of weights in an index.json, all of its own folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no 'weight_map' of tensors and files; download it again.")
    for name in names.values():
        # Another index could name this one, in a circle.
        if not (isinstance(name, str) and name.endswith(SUFFIXES)) or "/" in name or "\\" in name:
            raise UserError(f"{index} names {name!r}, not a file of weights ({', '.join(SUFFIXES)}) beside it.")
    return sorted(set(names.values()))


def _array(info: Mapping[str, Any], name: str, file: epath.Path) -> np.ndarray:
    if info["dtype"] not in _DTYPES:
        raise UserError(f"{file}: tensor {name} is of type {info['dtype']}; convert it to F32.")
    return np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"]).astype(np.float32)


def write(path: epath.Path, by_name: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, with the format "pt" in its metadata, which transformers requires."""
    contiguous = {name: np.asarray(x, order="C") for name, x in by_name.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))
