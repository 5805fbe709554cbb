"""Weights from and to the Hub, by the real client and against a stand-in of its server."""

import json
import re
import sys
import traceback

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import xclip_jax
from examples import mix
from tests.helpers import hub_server, tiny
from tests.helpers.foreign import MODELS, make_hf, make_open_clip, save_open_clip
from xclip_jax import interop
from xclip_jax.commands import export, mteb
from xclip_jax.core.errors import UserError
from xclip_jax.interop import hub
from xclip_jax.train import build, weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of weights: {"hf": of transformers with more files than are read, "open_clip": of open_clip}."""
    root = tmp_path_factory.mktemp("folders")
    make_hf("quick_gelu", 1e-5, 2, 4).save_pretrained(root / "hf")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "README.md", "training_args.bin"):
        (root / "hf" / name).write_bytes(name.encode())
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                 "size": 28, "crop_size": 28}  # fmt: skip
    (root / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    save_open_clip(root / "open_clip", make_open_clip("quick_b32").state_dict(), MODELS["quick_b32"])
    (root / "open_clip" / "open_clip_pytorch_model.bin").write_bytes(b"another")
    return {"hf": root / "hf", "open_clip": root / "open_clip"}


def test_only_files_that_are_read_are_fetched(server, folders):
    server.add("lab/hf", folders["hf"])
    server.add("lab/oc", folders["open_clip"])
    jax.tree.map(np.testing.assert_array_equal, interop.read("hf:lab/hf"), interop.read(str(folders["hf"])))
    assert server.fetched() == ["config.json", "model.safetensors", "preprocessor_config.json"]
    server.requests.clear()
    assert hub.locate("hf:lab/oc").path.read_bytes() == (folders["open_clip"] / interop.open_clip.WEIGHTS).read_bytes()
    assert server.fetched() == ["open_clip_config.json", "open_clip_model.safetensors"]
    server.requests.clear()
    hub.locate("hf:lab/oc")
    assert server.fetched() == []
    # Pickles where there are no safetensors.
    server.add("lab/old", {"pytorch_model.bin": b"x", "flax_model.msgpack": b"x", "config.json": b"{}"})
    assert hub.locate("hf:lab/old").path.name == "pytorch_model.bin"
    assert server.fetched() == ["config.json", "pytorch_model.bin"]


def test_shards_of_an_index(server, tmp_path, monkeypatch):
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors", "z": "model-2.safetensors"}}
    names = ("config.json", "other.safetensors", "model-1.safetensors", "model-2.safetensors")
    index_file = {"model.safetensors.index.json": json.dumps(index).encode()}
    server.add("lab/x", {name: name.encode() for name in names} | index_file)
    path = hub.locate("hf:lab/x").path
    assert path.name == "model.safetensors.index.json"
    assert server.fetched() == sorted({"config.json", path.name, "model-1.safetensors", "model-2.safetensors"})
    # An incomplete cache is not used.
    (path.parent / "model-1.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache"):
        hub.locate("hf:lab/x")


def test_a_revision_is_a_branch_a_tag_or_a_commit(server):
    first, last, tagged = ({"x.safetensors": name} for name in (b"first", b"last", b"tagged"))
    commit = server.add("lab/x", first)
    server.add("lab/x", last)
    server.add("lab/x", tagged, branch="v1.0")
    for revision, files in (("", last), ("@v1.0", tagged), (f"@{commit}", first)):
        assert hub.locate(f"hf:lab/x{revision}").path.read_bytes() == files["x.safetensors"]
    place = hub.locate("hf:lab/x@v1.0")
    assert str(place) == f"hf:lab/x@{place.commit}" and hub.locate(place) is place
    assert hub.results_file("hf:lab/x@v1").name == "lab--x@v1.evaluation.json"
    assert mteb._name("hf:lab/x@v1") == "lab/x"
    with pytest.raises(UserError, match=r"hf:lab/x@v2: lab/x has no revision 'v2'; name a branch, tag or commit"):
        hub.locate("hf:lab/x@v2")


def test_weights_and_classes_are_of_one_commit(server, folders, tmp_path, monkeypatch, capsys):
    """A command resolves the branch once; what it writes names the commit."""
    first = server.add("lab/x", folders["hf"])
    loading = weights.load

    def then_commit(*args):
        loaded = loading(*args)
        server.add("lab/x", folders["open_clip"])
        return loaded

    monkeypatch.setattr(weights, "load", then_commit)
    export.export("hf:lab/x", str(tmp_path / "out"), to="hf")
    assert f"hf:lab/x is commit {first}\n" in capsys.readouterr().out
    assert f"Converted from `hf:lab/x@{first}`" in (tmp_path / "out" / "README.md").read_text()
    assert len({request.partition("/resolve/")[2].partition("/")[0] for request in server.requests
                if "/resolve/" in request}) == 1  # fmt: skip


def test_the_cache_is_enough_without_a_connection(server, folders, monkeypatch):
    server.add("lab/x", folders["hf"])
    server.add("lab/own", {"mine.safetensors": (folders["hf"] / "model.safetensors").read_bytes(), "README.md": b"x"})
    path = hub.locate("hf:lab/x")
    own = hub.locate("hf:lab/own")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert hub.locate("hf:lab/x") == path and server.requests == []
    assert hub.locate("hf:lab/own") == own and own.path.name == "mine.safetensors"
    with pytest.raises(UserError, match=r"hf:lab/other: it is not in the cache, .* cannot be reached") as error:
        xclip_jax.load("hf:lab/other")
    assert "".join(traceback.format_exception(error.value)).count("Traceback") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.locate("hf:lab/x") == path
    with pytest.raises(UserError, match=r"not in the cache, .* and the Hub cannot be reached") as error:
        hub.locate("hf:lab/other")
    assert "\n" not in str(error.value)


def test_what_the_hub_refuses(server, folders, monkeypatch):
    server.add("lab/gated", folders["hf"], gated=True)
    server.add("lab/other", {"README.md": b"", "model.gguf": b""})
    server.add("lab/several", {"a.pt": b"", "b.pt": b""})
    for path, message in {
        "hf:lab/none": "hf:lab/none: the Hub has no repository lab/none, or it is private; check the name, or log in",
        "hf:lab/gated": f"access to lab/gated is restricted; ask for it at {server.url}/lab/gated and log in with",
        "hf:lab/other": r"has no file of weights .*: README\.md, model\.gguf; download one with its",
        "hf:lab/several": r"has no file of weights .* or several: a\.pt, b\.pt; download one with its",
        "hf:a/b/c": "'hf:a/b/c' names no repository of the Hub; expected hf:ORG/NAME or hf:ORG/NAME@REVISION",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            weights.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"does not exist; .* or hf:ORG/NAME of the Hub"):
        weights.load("lab/hf")


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^hf:lab/x needs huggingface_hub: pip install 'xclip_jax\[hub\]'\.$"):
        hub.locate("hf:lab/x")
    with pytest.raises(UserError, match=r"^--push lab/x needs huggingface_hub"):
        hub.check_push("lab/x")
    assert str(hub.locate("runs/x").path) == "runs/x"


@pytest.mark.slow
def test_training_starts_from_the_hub(server, folders, tmp_path, capsys):
    commit = server.add("lab/x", folders["hf"])
    model = {f"model__{key}": value for key, value in interop.read("hf:lab/x")[0]["model"].items()}
    changes = {"data__tokenizer": "clip", "init__weights": "hf:lab/x"} | model
    p = build.build(tiny.config("clip", **changes))
    tensors, origin = weights.read_initial(p.config, p.abstract)
    assert "starting from hf:lab/x, step 0" in capsys.readouterr().out
    positions = interop.read(str(folders["hf"]))[1]["params"]["txt"]["positions"]
    np.testing.assert_array_equal(tensors["params/txt/positions"], positions)
    # A mix is of the weights that the run began with, wherever the branch is now.
    server.add("lab/x", {"config.json": b"{}"})
    run = tiny.untrained(tmp_path / "run", "clip", origin=origin, **changes)
    content = json.loads((run / "config.json").read_text())
    assert content["init_commit"] == commit
    mix.mix(str(run), 0, str(tmp_path / "mixed"))
    mixed = interop.read(str(tmp_path / "mixed"))[1]
    np.testing.assert_array_equal(mixed["params"]["txt"]["positions"], positions)


def push(run, out, *flags):
    export.main(["--checkpoint", str(run), str(out), "--push", "lab/mine", *flags])


def test_an_export_is_uploaded_and_read_again(folders, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push(folders["hf"], tmp_path / "out", "--to", "safetensors")
    assert f"uploaded: {server.url}/lab/mine" in capsys.readouterr().out
    made = server.repositories["lab/mine"]
    files = made["commits"][made["refs"]["main"]]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == local | {".gitattributes": b""}
    assert b'xclip_jax.load("hf:lab/mine")' in files["README.md"]
    _, variables = interop.read("hf:lab/mine")
    jax.tree.map(np.testing.assert_array_equal, variables, interop.read(str(folders["hf"]))[1])
    # Another format takes its place; what others added stays.
    server.add("lab/mine", files | {"picture.png": b"png"})
    push(folders["hf"], tmp_path / "again", "--to", "open_clip")
    files = made["commits"][made["refs"]["main"]]
    assert files.keys() == {".gitattributes", "picture.png", "README.md", "open_clip_config.json",
                            "open_clip_model.safetensors"}  # fmt: skip
    assert b'open_clip.get_tokenizer("hf-hub:lab/mine")' in files["README.md"]


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (["--push", "lab/mine"], "", "--push lab/mine: no account of the Hub is known; log in with `hf auth login`"),
        (["--push", "lab/mine"], "wrong", "--push lab/mine: the Hub answers .*; log in with"),
        (["--push", "them/mine"], hub_server.TOKEN, "--push them/mine: expected ORG/NAME .* access: me, lab"),
        (["--push", "mine"], hub_server.TOKEN, "--push mine: expected ORG/NAME"),
        (["--push", "lab/mine", "--step", "9"], hub_server.TOKEN, "no checkpoint of step 9"),
        (["--push", "lab/mine", "--to", "gguf"], hub_server.TOKEN, "--to is 'gguf'"),
    ],
)
def test_nothing_is_uploaded_before_all_is_checked(flags, token, message, run, server, tmp_path, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as stopped:
        export.main(["--checkpoint", str(run), str(tmp_path / "out"), *flags])
    assert re.search(message, str(stopped.value)) and "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()
    assert not [request for request in server.requests if not request.startswith(("GET", "HEAD"))]


def test_an_upload_that_fails_leaves_the_export(folders, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    routes = [route for route in hub_server._ROUTES if "preupload" not in route[1]]
    monkeypatch.setattr(hub_server, "_ROUTES", routes)
    with pytest.raises(SystemExit, match=r"--push lab/mine: .*/out is written: the Hub answers") as stopped:
        push(folders["hf"], tmp_path / "out")
    assert "\n" not in str(stopped.value)
    assert (tmp_path / "out" / "README.md").exists()
    assert list(server.repositories["lab/mine"]["commits"].values()) == [{".gitattributes": b""}]
