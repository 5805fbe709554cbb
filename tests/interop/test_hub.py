"""Weights from and to the Hub, by the real client and against a stand-in of its server."""

import builtins
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import chex
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import xclip_jax
from examples import mix
from tests.helpers import hub_server, tiny
from tests.helpers.foreign import MODELS, make_hf, make_open_clip
from xclip_jax import interop
from xclip_jax.commands import evaluate, export, mteb
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer
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
    (root / "open_clip").mkdir()
    state = {key: x.contiguous() for key, x in make_open_clip("quick_b32").state_dict().items()}
    safetensors.torch.save_file(state, root / "open_clip" / "open_clip_model.safetensors")
    cfg = {"model_cfg": MODELS["quick_b32"] | {"embed_dim": 48}}
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps(cfg))
    (root / "open_clip" / "open_clip_pytorch_model.bin").write_bytes(b"another")
    return {"hf": root / "hf", "open_clip": root / "open_clip"}


def assert_same_weights(path, folder):
    config, variables = interop.read(path)
    expected = interop.read(str(folder))
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, variables, expected[1])


def test_only_files_that_are_read_are_fetched(server, folders):
    server.add("lab/hf", folders["hf"])
    server.add("lab/oc", folders["open_clip"])
    assert_same_weights("hf:lab/hf", folders["hf"])
    assert server.fetched() == ["config.json", "model.safetensors", "preprocessor_config.json"]
    server.requests.clear()
    assert_same_weights("hf:lab/oc", folders["open_clip"])
    assert server.fetched() == ["open_clip_config.json", "open_clip_model.safetensors"]
    server.requests.clear()
    interop.read("hf:lab/oc")
    assert server.fetched() == []


def test_shards_of_an_index(server, folders, tmp_path):
    make_hf("gelu", 1e-5, 2, 4).save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    shards = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    server.add("lab/sharded", tmp_path / "sharded")
    assert_same_weights("hf:lab/sharded", tmp_path / "sharded")
    assert len(shards) > 1 and set(server.fetched()) == shards | {"config.json", "model.safetensors.index.json"}


def test_pickles_where_there_are_no_safetensors(server, folders, tmp_path):
    state = safetensors.torch.load_file(folders["hf"] / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    files = {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(), "flax_model.msgpack": b"x",
             "config.json": (folders["hf"] / "config.json").read_bytes()}  # fmt: skip
    server.add("lab/old", files)
    _, variables = interop.read("hf:lab/old")
    jax.tree.map(np.testing.assert_array_equal, variables, interop.read(str(folders["hf"]))[1])
    assert server.fetched() == ["config.json", "pytorch_model.bin"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, folders):
    first = server.add("lab/x", folders["hf"])
    server.add("lab/x", folders["open_clip"])
    server.add("lab/x", folders["hf"], branch="v1.0")
    assert interop.read("hf:lab/x")[0]["source"]["format"] == "open_clip"
    for revision in ("v1.0", first):
        assert interop.read(f"hf:lab/x@{revision}")[0]["source"]["format"] == "hf"
    with pytest.raises(UserError, match=r"hf:lab/x@v2: lab/x has no revision 'v2'; name a branch, tag or commit"):
        interop.read("hf:lab/x@v2")


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
    server.broken = True
    assert hub.locate("hf:lab/x") == path
    with pytest.raises(UserError, match=r"not in the cache, .* and the Hub cannot be reached"):
        hub.locate("hf:lab/other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.locate("hf:lab/x") == path
    with pytest.raises(UserError, match=r"not in the cache, .* and the Hub cannot be reached") as error:
        hub.locate("hf:lab/other")
    assert "\n" not in str(error.value)


def test_an_incomplete_cache_is_not_used(server, folders, tmp_path, monkeypatch):
    make_hf("gelu", 1e-5, 2, 4).save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    server.add("lab/x", tmp_path / "sharded")
    path = hub.locate("hf:lab/x").path
    next(path.parent.glob("model-*.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache"):
        hub.locate("hf:lab/x")


def test_what_the_hub_refuses(server, folders, monkeypatch):
    server.add("lab/gated", folders["hf"], gated=True)
    server.add("lab/other", {"README.md": b"", "model.gguf": b""})
    server.add("lab/several", {"a.pt": b"", "b.pt": b""})
    for path, message in {
        "hf:lab/none": "hf:lab/none: the Hub has no repository lab/none, or it is private; check the name, or log in",
        "hf:lab/gated": f"access to lab/gated is restricted; ask for it at {server.url}/lab/gated and log in with",
        "hf:lab/other": r"has no file of weights that can be read .*; its files are only README\.md, model",
        "hf:lab/several": r"has no file of weights .*; its files are several: a\.pt, b\.pt; download one with its",
        "hf:lab": "'hf:lab' names no repository of the Hub; expected hf:ORG/NAME or hf:ORG/NAME@REVISION",
        "hf:a/b/c": "'hf:a/b/c' names no repository of the Hub",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            weights.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"does not exist; .* or hf:ORG/NAME of the Hub"):
        weights.load("lab/hf")


def test_names_of_open_clip_are_repositories(server, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.add("lab/x", folders["open_clip"], branch="v1")
    there, same = hub.locate("hf-hub:lab/x@v1"), hub.locate("hf:lab/x@v1")
    assert there.path == same.path and str(there) == str(same) == f"hf:lab/x@{same.commit}"
    assert hub.results_file("hf-hub:lab/x@v1").name == "lab--x@v1.evaluation.json"
    assert mteb._name("hf-hub:lab/x@v1") == mteb._name("hf:lab/x") == "lab/x"


def test_without_the_extra_the_error_names_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^hf:lab/x needs huggingface_hub: pip install 'xclip_jax\[hub\]'\.$"):
        hub.locate("hf:lab/x")
    with pytest.raises(UserError, match=r"^--push lab/x needs huggingface_hub"):
        hub.check_push("lab/x")
    assert str(hub.locate("runs/x").path) == "runs/x"


def test_a_command_reads_the_endpoint_of_its_environment(server, folders, tmp_path):
    """And huggingface_hub is imported where it is needed alone."""
    server.add("lab/x", folders["hf"])
    code = """
import sys
from xclip_jax.interop import hub
assert "huggingface_hub" not in sys.modules
print(hub.locate("hf:lab/x").path)
"""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "mine")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path = pathlib.Path(done.stdout.splitlines()[-1])
    assert path.is_relative_to(tmp_path / "mine") and path.read_bytes() == (folders["hf"] / path.name).read_bytes()


@pytest.mark.slow
def test_training_starts_from_the_hub(server, folders, tmp_path, capsys):
    commit = server.add("lab/x", folders["hf"])
    model = {f"model__{key}": value for key, value in interop.read("hf:lab/x")[0]["model"].items()}
    changes = {"data__tokenizer": "clip", "init__weights": "hf:lab/x"} | model
    p = build.build(tiny.config("clip", **changes))
    tensors, _ = weights.read_initial(p.config, p.abstract)
    assert "starting from hf:lab/x, step 0" in capsys.readouterr().out
    positions = interop.read(str(folders["hf"]))[1]["params"]["txt"]["positions"]
    np.testing.assert_array_equal(tensors["params/txt/positions"], positions)
    run = tiny.untrained(tmp_path / "run", "clip", **changes)
    content = json.loads((run / "config.json").read_text())
    assert content["init_commit"] == commit
    # A mix is of the weights that the run began with, wherever the branch is now.
    server.add("lab/x", {"config.json": b"{}"})
    mix.mix(str(run), 0, str(tmp_path / "mixed"))
    mixed = interop.read(str(tmp_path / "mixed"))[1]
    np.testing.assert_array_equal(mixed["params"]["txt"]["positions"], positions)


def test_evaluation_of_a_repository(server, folders, tmp_path, monkeypatch):
    server.add("lab/x", folders["hf"])
    for label in ("cat", "dog"):
        tiny.folder(tmp_path / "classes" / label, 4)
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--checkpoint", "hf:lab/x", "--suite", f"folder:{tmp_path / 'classes'}"])
    content = json.loads((tmp_path / "lab--x.evaluation.json").read_text())
    assert {entry["checkpoint"] for entry in content["results"]} == {"hf:lab/x"}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """What a run of CLIP leaves, with a tokenizer that all formats have."""
    return tiny.untrained(tmp_path_factory.mktemp("runs") / "clip", "clip", data__tokenizer="clip")


def push(run, out, *flags):
    export.main(["--checkpoint", str(run), str(out), "--push", "lab/mine", *flags])


def test_an_export_is_uploaded_and_read_again(clip_run, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push(clip_run, tmp_path / "out", "--to", "safetensors", "--private")
    assert f"uploaded: {server.url}/lab/mine" in capsys.readouterr().out
    made = server.repositories["lab/mine"]
    assert made["visibility"] == "private"
    files = made["commits"][made["refs"]["main"]]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == local | {".gitattributes": b""}
    assert b'xclip_jax.load("hf:lab/mine")' in files["README.md"]
    chex.assert_trees_all_equal(*(jax.device_get(weights.load(path)[2]) for path in ("hf:lab/mine", str(clip_run))))
    # Another format takes its place; what others added stays.
    server.add("lab/mine", files | {"picture.png": b"png"})
    push(clip_run, tmp_path / "again", "--to", "open_clip")
    files = made["commits"][made["refs"]["main"]]
    assert files.keys() == {".gitattributes", "picture.png", "README.md", "open_clip_config.json",
                            "open_clip_model.safetensors"}  # fmt: skip
    assert b'open_clip.get_tokenizer("hf-hub:lab/mine")' in files["README.md"]


def test_a_tokenizer_of_its_own_is_named_by_the_repository(server, tmp_path, monkeypatch):
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat": 2}
    model = tokenizer.tokenizers.Tokenizer(tokenizer.tokenizers.models.WordLevel(words, unk_token="cat"))
    model.save(str(tmp_path / "words.json"))
    run = tiny.untrained(tmp_path / "run", "clip", data__tokenizer=str(tmp_path / "words.json"))
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push(run, tmp_path / "out", "--to", "open_clip")
    made = server.repositories["lab/mine"]
    content = json.loads(made["commits"][made["refs"]["main"]]["open_clip_config.json"])
    assert content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "lab/mine"


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (["--push", "lab/mine"], "", "--push lab/mine: no account of the Hub is known; log in with `hf auth login`"),
        (["--push", "lab/mine"], "wrong", "--push lab/mine: the Hub answers .*; log in with"),
        (["--push", "them/mine"], hub_server.TOKEN, "--push them/mine: expected ORG/NAME .* access: me, lab"),
        (["--push", "mine"], hub_server.TOKEN, "--push mine: expected ORG/NAME"),
        (["--push", "lab/mine", "--step", "9"], hub_server.TOKEN, "no checkpoint of step 9"),
        (["--push", "lab/mine", "--to", "onnx"], hub_server.TOKEN, "--to is 'onnx'"),
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


def test_an_upload_that_fails_leaves_the_export(clip_run, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    routes = [route for route in hub_server._ROUTES if "preupload" not in route[1]]
    monkeypatch.setattr(hub_server, "_ROUTES", routes)
    with pytest.raises(SystemExit, match=r"--push lab/mine: .*/out is written: the Hub answers") as stopped:
        push(clip_run, tmp_path / "out")
    assert "\n" not in str(stopped.value)
    assert (tmp_path / "out" / "README.md").exists()
    assert list(server.repositories["lab/mine"]["commits"].values()) == [{".gitattributes": b""}]
