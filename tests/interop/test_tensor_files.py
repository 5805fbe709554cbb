"""Weights that are refused: other architectures, damaged files, and pickles with code."""

import io
import itertools
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from tests.helpers.foreign import MODELS, make_open_clip
from xclip_jax import interop
from xclip_jax.core.errors import UserError
from xclip_jax.interop import tensor_files


def saved(tmp_path, change, cfg=None, name="quick_b32"):
    """A folder of weights of open_clip after `change` of its tensors and config."""
    state = {key: x.contiguous() for key, x in make_open_clip(name).state_dict().items()}
    change(state)
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
    if cfg is not None:
        content = {"model_cfg": MODELS[name] | {"embed_dim": 48} | cfg}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, r"sets vision_cfg\.timm_model_name='vit_base'"),
        ({"vision_cfg": {"layers": [2, 2, 2, 2]}}, "value that cannot be used"),
        ({"vision_cfg": {"pool_type": "avg"}}, "sets vision_cfg.pool_type='avg'; expected 'tok'"),
        ({"text_cfg": {"no_causal_mask": True}}, r"text_cfg\.no_causal_mask=True"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "lower"}}}, r"text_cfg\.tokenizer_kwargs={'clean': 'lower'}\."),
        ({"text_cfg": {"vocab_size": 32000}}, "vocabulary of 32000 with end 31999, which is not CLIP's"),
    ],
)
def test_architectures_that_are_not_ours_are_named(cfg, message, tmp_path):
    with pytest.raises(UserError, match=message):
        interop.read(saved(tmp_path, lambda _: None, cfg))


@pytest.mark.parametrize(
    ("cfg", "tensor", "message"),
    [
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text.transformer.x", r"hf_model_name='roberta-base'"),
        ({"vision_cfg": {"attentional_pool": True}}, "visual.attn_pool.x", r"attentional_pool=True"),
        ({}, "visual.attn_pool.x", "has a ResNet or a tower of timm"),
    ],
)
def test_the_config_is_checked_before_the_tensors(cfg, tensor, message, tmp_path):
    def change(state):
        del state["token_embedding.weight"]
        state[tensor] = torch.zeros(1)

    with pytest.raises(UserError, match=message):
        interop.read(saved(tmp_path, change, cfg))


def test_values_of_open_clips_config_that_cannot_be_used(tmp_path):
    folder, whole = saved(tmp_path, lambda _: None), MODELS["quick_b32"] | {"embed_dim": 48, "quick_gelu": False}

    def changed(group, **values):
        return {"model_cfg": whole | {group: whole[group] | values}}

    for content in (
        {"model_cfg": None},
        {"model_cfg": whole, "preprocess_cfg": None},
        {"model_cfg": whole | {"vision_cfg": 3}},
        changed("vision_cfg", head_width=0),
        changed("vision_cfg", head_width=999),
        changed("vision_cfg", act_kwargs={"approximate": "foo"}),
        changed("text_cfg", heads=3),
        changed("text_cfg", width="wide"),
        changed("text_cfg", vocab_size=[1]),
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"open_clip_config\.json has a value that cannot be used"):
            interop.read(folder)


def test_weights_that_are_not_ours_are_named(tmp_path):
    def timm(state):
        state["visual.trunk.blocks.0.norm1.weight"] = torch.zeros(3)

    with pytest.raises(UserError, match="has a ResNet or a tower of timm"):
        interop.read(saved(tmp_path, timm))
    safetensors.torch.save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"not a supported CLIP: its tensors are named conv\.weight, \.\.\.; expected"):
        interop.read(str(tmp_path / "x.safetensors"))
    folder = tmp_path / "siglip"
    folder.mkdir()
    safetensors.torch.save_file({"vision_model.x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(UserError, match="model_type is 'siglip2'; it must be one of"):
        interop.read(str(folder))
    with pytest.raises(UserError, match="is not a folder or a file of weights"):
        interop.read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no file of weights"):
        interop.read(str(tmp_path / "empty"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="a damaged or incomplete safetensors file"):
        interop.read(str(tmp_path / "cut.safetensors"))


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
    with pytest.raises(UserError, match=r"contains more than tensors: it asks for (posix|nt)\.mkdir\. Convert it: "):
        interop.read(str(tmp_path / "evil.pt"))
    pickles = {"getattr": b"cbuiltins\ngetattr\n.", "eval": b"cbuiltins\neval\n.",
               "own": b"cxclip_jax.interop.tensor_files\nload_torch\n."}  # fmt: skip
    for name, content in pickles.items():
        with pytest.raises(UserError, match="it asks for"):
            tensor_files.load_torch(torch_zip(tmp_path / name, content), name)
    assert not os.path.exists(mark)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError, match="it asks for compressed data"):
        interop.read(str(tmp_path / "bomb.pt"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"is not a zip of torch.save, which has written such since version 1\.6"):
        interop.read(str(tmp_path / "old.pt"))
    torch.save({"x": torch.zeros(100)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.pt is incomplete or no file of torch\.save \(.*\); download it again"):
        interop.read(str(tmp_path / "cut.pt"))


def test_files_of_an_index_that_are_missing_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    tensor_files.write(epath.Path(tmp_path / "a.safetensors"), {"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"index\.json names b\.safetensors, not in its folder"):
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
        return tensor_files.load_torch(content, "x.pt")[0]["x"]

    np.testing.assert_array_equal(load(0, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    with pytest.raises(UserError, match=r"a tensor (beyond its storage|of negative size)"):
        load(offset, size, stride)
    with pytest.raises(UserError, match="a tensor of another tensor"):
        load(0, (4,), (1,), Pickled(3, (4,), (0,)))


def module(name, memo, links):
    """Pickled: a module of TorchScript whose attributes are modules of the memo, kept in the memo itself."""
    attributes = b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + b"h" + bytes([link]) for i, link in enumerate(links))
    return b"c__torch__\n" + name + b"\n)\x81}(" + attributes + b"ubq" + bytes([memo])


# Small pickles that took gigabytes or ages, by what is refused in them.
BOMBS = {
    "memo": (b"Nr\xff\xff\xff\x3f0N.", ""),  # keeps None at an index of a thousand million
    "bytearray": (b"\x96\0\0\0\0\x10\0\0\0.", "an array of bytes"),
    "hash of a key": (b"}K\x01" + b"2\x86" * 60 + b"Ns.", "a key that is neither"),
    "set": (b"\x8f(K\x01" + b"2\x86" * 60 + b"\x90.", "a set"),
    "key of a storage": (b"X\x07\0\0\0storagectorch\nFloatStorage\nK\x01" + b"2\x86" * 60 + b"\x87Q.", "a storage"),
    "type of a storage": (b"X\x07\0\0\0storageK\x01" + b"2\x86" * 60 + b"X\x01\0\0\x000\x87Q.", "a storage"),
    "argument of a dict": (b"ccollections\nOrderedDict\n](K\x01" + b"2\x86" * 60 + b"N\x86e\x85R.", "damaged"),
    "tensor of many dimensions": (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000tQ"
        + b"K\x00(" + b"J\xff\xff\xff\x7f" * 20000 + b"t(" + b"K\x00" * 20000 + b"ttR.", "too many dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little_memory_and_time(name, tmp_path):
    pickled, message = BOMBS[name]
    content = torch_zip(tmp_path / "x.pt", pickled, s0=bytes(16))
    tracemalloc.start()
    began = time.process_time()
    try:
        if message:
            with pytest.raises(UserError, match=message):
                tensor_files.load_torch(content, "x.pt")
        else:
            assert tensor_files.load_torch(content, "x.pt") == (None, False)
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
        return tensor_files.load_torch(path.read_bytes(), "x.pt")[0]

    assert sorted(load(3)) == ["a.a.a", "a.b.a", "b.a.a", "b.b.a"]
    np.testing.assert_array_equal(load(2)["b.a"], [1, 2, 3, 4])
    with pytest.raises(UserError, match="modules without end"):
        load(60)


def test_views_are_bounded_by_the_file(tmp_path):
    tensors = {str(i): torch.zeros(1000) for i in range(3)}
    torch.save(tensors | {"tied": tensors["0"], "again": tensors["0"]}, tmp_path / "x.pt")
    assert len(tensor_files.tensors(epath.Path(tmp_path / "x.pt"))) == 5
    large = torch.zeros(1 << 16)
    torch.save({str(i): large[i:] for i in range(30)}, tmp_path / "views.pt")
    with pytest.raises(UserError, match="the same numbers in too many tensors"):
        tensor_files.tensors(epath.Path(tmp_path / "views.pt"))


def test_a_damaged_directory_of_a_zip(tmp_path):
    content, refused = torch_zip(tmp_path / "x.pt", b"N.", s0=bytes(8)), 0
    start = content.index(b"PK\x01\x02")
    for at, value in itertools.product(range(0, 46, 2), (b"\xff\xff", b"\x00\x08", b"\x7f\x00")):
        damaged = content[: start + at] + value + content[start + at + 2 :]
        try:
            assert tensor_files.load_torch(damaged, "x.pt") == (None, False)
        except UserError as error:
            assert str(error).startswith("x.pt ") and "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_half_precision_becomes_fp32(tmp_path):
    state = make_open_clip("quick_b32").state_dict()
    for kind in (torch.bfloat16, torch.float16):
        half = {key: x.to(kind).contiguous() for key, x in state.items()}
        safetensors.torch.save_file(half, tmp_path / "x.safetensors")
        torch.save(half, tmp_path / "x.bin")
        for name in ("x.safetensors", "x.bin"):
            found = tensor_files.tensors(tensor_files.epath.Path(tmp_path / name))
            for key, x in half.items():
                assert found[key].dtype == np.float32
                np.testing.assert_array_equal(found[key], x.float().numpy())
