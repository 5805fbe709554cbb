"""Weights that are refused: other architectures, damaged files, and pickles with code."""

import functools
import io
import json
import os
import pathlib
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from tests.helpers.foreign import MODELS, make_open_clip, save_open_clip
from xclip_jax import interop
from xclip_jax.core.errors import UserError
from xclip_jax.interop import tensor_files


@functools.cache
def tensors():
    return make_open_clip("quick_b32").state_dict()


def saved(folder, change):
    state = dict(tensors())
    change(state)
    return str(save_open_clip(folder, state, MODELS["quick_b32"]))


def write_config(folder, content):
    pathlib.Path(folder, "open_clip_config.json").write_text(json.dumps(content))


def test_architectures_that_are_not_ours_are_named(tmp_path):
    def change(state):
        del state["token_embedding.weight"]
        state |= {"visual.attn_pool.x": torch.zeros(1), "text.transformer.x": torch.zeros(1)}

    plain, other = saved(tmp_path / "plain", lambda _: None), saved(tmp_path / "other", change)
    for folder, group, options, named in (
        (plain, "vision_cfg", {"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name='vit_base'"),
        (plain, "vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre=True"),
        (plain, "vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type is 'avg'; it must be one of 'tok'"),
        (plain, "text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask=True"),
        (plain, "text_cfg", {"tokenizer_kwargs": {"clean": "lower"}}, "text_cfg.tokenizer_kwargs="),
        (plain, "text_cfg", {"vocab_size": 32000}, "32000 token ids"),
        (other, "text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),  # before the tensors
        (other, "text_cfg", {}, "has a ResNet or a tower of timm"),
    ):
        write_config(folder, {"model_cfg": MODELS["quick_b32"] | {"embed_dim": 48, group: options}})
        with pytest.raises(UserError, match=f"^{folder}/open_clip_model.safetensors: .*{re.escape(named)}"):
            interop.read(folder)


def test_values_of_open_clips_config_that_cannot_be_used(tmp_path):
    folder, whole = saved(tmp_path, lambda _: None), MODELS["quick_b32"] | {"embed_dim": 48, "quick_gelu": False}
    for group, value in (
        ("vision_cfg", {"layers": [2, 2]}), ("vision_cfg", {"head_width": 0}),
        ("vision_cfg", {"act_kwargs": {"approximate": "x"}}), ("text_cfg", {"heads": 3}),
    ):  # fmt: skip
        write_config(folder, {"model_cfg": whole | {group: whole[group] | value}})
        with pytest.raises(UserError, match=r"open_clip_config\.json has a value that cannot be used"):
            interop.read(folder)
    for content in ({"model_cfg": None}, {"model_cfg": whole, "preprocess_cfg": None}):
        write_config(folder, content)
        with pytest.raises(UserError, match=r"open_clip_config\.json has a value that cannot be used"):
            interop.read(folder)


def test_weights_that_are_not_ours_are_named(tmp_path):
    safetensors.torch.save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"not a supported CLIP: its tensors are named conv\.weight, \.\.\.; expected"):
        interop.read(str(tmp_path / "x.safetensors"))
    folder = tmp_path / "siglip"
    folder.mkdir()
    safetensors.torch.save_file({"vision_model.x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "siglip2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    for name, message in {
        "siglip": "model_type is 'siglip2'; it must be one of",
        "none": "none' is not a folder or a file of weights",
        "empty": "empty' has no file of weights",
        "cut.safetensors": r"cut\.safetensors cannot be read; .* \(SafetensorError",
    }.items():
        with pytest.raises(UserError, match=message):
            interop.read(str(tmp_path / name))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def torch_zip(path, pickled, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in storages.items():
            archive.writestr(f"archive/data/{name[1:]}", content)
    return path.read_bytes()


def test_a_pickle_that_asks_for_anything_else_is_refused(tmp_path):
    mark = str(tmp_path / "executed")
    torch.save({"x": Evil(mark)}, tmp_path / "evil.pt")
    torch_zip(tmp_path / "getattr.pt", b"cbuiltins\ngetattr\n.")
    torch_zip(tmp_path / "eval.pt", b"cbuiltins\neval\n.")
    torch_zip(tmp_path / "ours.pt", b"cxclip_jax.interop.tensor_files\nload_torch\n.")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    torch.save({"x": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.zeros(100)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-40])
    for name, reason in {
        "evil": r"it asks for (posix|nt)\.mkdir", "getattr": "it asks for builtins.getattr",
        "eval": "it asks for builtins.eval", "ours": "it asks for xclip_jax", "bomb": "it asks for compressed data",
        "old": "BadZipFile", "cut": "BadZipFile",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}\.pt cannot be read; .*, or convert it: .*{reason}"):
            interop.read(str(tmp_path / f"{name}.pt"))
    assert not os.path.exists(mark)


def test_files_of_an_index_that_are_missing_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    tensor_files.write(epath.Path(tmp_path / "a.safetensors"), {"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"b\.safetensors cannot be read"):
        tensor_files.tensors(epath.Path(index))
    tensor_files.write(epath.Path(tmp_path / "b.safetensors"), {"y": np.ones(2, np.float16)})
    found = tensor_files.tensors(epath.Path(index))
    assert {name: (x.dtype, x.tolist()) for name, x in found.items()} == {
        "x": (np.float32, [0, 0, 0]), "y": (np.float32, [1, 1])
    }  # fmt: skip


STORAGE = object()


class Pickled:
    """A tensor as torch pickles it, of a storage of four numbers."""

    def __init__(self, offset, size, stride, storage=STORAGE):
        self.args = (storage, offset, size, stride)


class Writer(pickle.Pickler):
    def persistent_id(self, x):
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if x is STORAGE else None

    def reducer_override(self, x):
        if isinstance(x, Pickled):
            return torch._utils._rebuild_tensor_v2, (*x.args, False, {})
        return NotImplemented


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 3)), (-1, (2,), (1,)),
                                   (0, (2,), (-1,)), (0, (1 << 40,), (0,)), (0, (2, 2), (1,))]
)  # fmt: skip
def test_tensors_stay_within_their_storage(offset, size, stride, tmp_path):
    def load(*args):
        buffer = io.BytesIO()
        Writer(buffer, protocol=2).dump({"x": Pickled(*args)})
        content = torch_zip(tmp_path / "x.pt", buffer.getvalue(), s0=struct.pack("<4f", 1, 2, 3, 4))
        return tensor_files.load_torch(content)["x"]

    np.testing.assert_array_equal(load(0, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    with pytest.raises(pickle.UnpicklingError, match="a tensor that does not fit its storage"):
        load(offset, size, stride)
    with pytest.raises(pickle.UnpicklingError, match="a tensor that does not fit its storage"):
        load(0, (4,), (1,), Pickled(3, (4,), (0,)))  # of another tensor


def module(name, memo, links):
    """Pickled: a module of TorchScript whose attributes are modules of the memo, kept in the memo itself."""
    attributes = b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + b"h" + bytes([link]) for i, link in enumerate(links))
    return b"c__torch__\n" + name + b"\n)\x81}(" + attributes + b"ubq" + bytes([memo])


NESTED = b"K\x01" + b"2\x86" * 60  # tuples of tuples, which take years to hash
# Small pickles that took gigabytes or ages.
BOMBS = {
    "set": b"\x8f(" + NESTED + b"\x90.",
    "key of a storage": b"X\x07\0\0\0storagectorch\nFloatStorage\n" + NESTED + b"\x87Q.",
    "type of a storage": b"X\x07\0\0\0storage" + NESTED + b"X\x01\0\0\x000\x87Q.",
    "argument of a dict": b"ccollections\nOrderedDict\n](" + NESTED + b"N\x86e\x85R.",
    "tensor of many dimensions":
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000tQ"
        + b"K\x00(" + b"J\xff\xff\xff\x7f" * 20000 + b"t(" + b"K\x00" * 20000 + b"ttR.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little_memory_and_time(name, tmp_path):
    torch_zip(tmp_path / "x.pt", BOMBS[name], s0=bytes(16))
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UserError, match=r"x\.pt cannot be read"):
            tensor_files.tensors(epath.Path(tmp_path / "x.pt"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24 and time.process_time() - began < 5
    finally:
        tracemalloc.stop()


def test_modules_that_share_modules_are_read_up_to_a_bound(tmp_path):
    def load(depth):
        storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000\x87Q"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x04\x85K\x01\x85tRq\0"
        modules = [module(b"M", 1, [0]), *(module(b"M", i + 1, [i, i]) for i in range(1, depth))]
        path = tmp_path / "x.pt"
        torch_zip(path, tensor + b"0".join(modules) + b".", s0=struct.pack("<4f", 1, 2, 3, 4))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/constants.pkl", b"N.")
        return tensor_files.load_torch(path.read_bytes())

    assert sorted(load(3)) == ["a.a.a", "a.b.a", "b.a.a", "b.b.a"]
    np.testing.assert_array_equal(load(2)["b.a"], [1, 2, 3, 4])
    with pytest.raises(pickle.UnpicklingError, match="modules without end"):
        load(60)


def test_views_are_bounded_by_the_file(tmp_path):
    tensors = {str(i): torch.zeros(1000) for i in range(3)}
    torch.save(tensors | {"tied": tensors["0"], "again": tensors["0"]}, tmp_path / "x.pt")
    assert len(tensor_files.tensors(epath.Path(tmp_path / "x.pt"))) == 5
    large = torch.zeros(1 << 16)
    torch.save({str(i): large[i:] for i in range(30)}, tmp_path / "views.pt")
    with pytest.raises(UserError, match="the same numbers in too many"):
        tensor_files.tensors(epath.Path(tmp_path / "views.pt"))


def test_half_precision_becomes_fp32(tmp_path):
    state = {"a": torch.linspace(-2, 2, 12).reshape(3, 4), "b": torch.tensor(0.3)}
    for kind in (torch.bfloat16, torch.float16):
        half = {key: x.to(kind).contiguous() for key, x in state.items()}
        safetensors.torch.save_file(half, tmp_path / "x.safetensors")
        torch.save(half, tmp_path / "x.bin")
        for name in ("x.safetensors", "x.bin"):
            found = tensor_files.tensors(epath.Path(tmp_path / name))
            for key, x in half.items():
                assert found[key].dtype == np.float32
                np.testing.assert_array_equal(found[key], x.float().numpy())
