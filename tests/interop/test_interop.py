"""Weights in both directions: open_clip, OpenAI's archives, transformers, our own; features to 1e-5."""

import json
import os

import jax
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from flax.traverse_util import flatten_dict

from tests.helpers.foreign import (
    B32,
    MODELS,
    TEXT,
    assert_same,
    clip_tokens,
    images,
    make_open_clip,
    model_of,
    our_model,
    ours,
    shaken,
    theirs_open_clip,
)
from tests.objectives.test_term import superclip
from xclip_jax import interop
from xclip_jax.config import recipes
from xclip_jax.core.errors import UserError
from xclip_jax.data import tokenizer, transforms
from xclip_jax.objectives import read_objective


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quick_b32", "open_clip_model.safetensors"),
        ("erf_b16", "epoch_1.pt"),
        ("tanh_bias_custom", "open_clip_pytorch_model.bin"),
    ],
)
def test_open_clip_there_and_back(name, file, tmp_path):
    model, there = make_open_clip(name), tmp_path / "there"
    there.mkdir()
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(state, there / file)
    elif file.endswith(".pt"):  # as open_clip's training leaves it
        wrapped = {f"module.{key}": x for key, x in state.items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": wrapped, "optimizer": {"state": {0: state}}}, there / file)
    else:
        torch.save(state, there / file)
    mean, std = transforms.STATISTICS["half"]
    (there / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": MODELS[name] | {"embed_dim": 48}, "preprocess_cfg": {"mean": mean, "std": std}}))  # fmt: skip
    config, variables = interop.read(str(there))
    assert config["data"] == {
        "tokenizer": "clip", "normalization": "half", "resample": "bicubic", "decoding": "open_clip",
    }  # fmt: skip
    pixels, tokens = images(28), clip_tokens(12)
    expected = theirs_open_clip(model, pixels, tokens)
    assert_same(ours(config, variables, pixels, tokens), expected)
    assert interop.write(variables, config, str(tmp_path / "back"), "open_clip") == []
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert_same(theirs_open_clip(loaded, pixels, tokens), expected)
    assert list(loaded.visual.preprocess_cfg["std"]) == [0.5] * 3
    jax.tree.map(np.testing.assert_array_equal, interop.read(str(tmp_path / "back")), (config, variables))


def test_layers_without_tensors_are_refused_at_once(tmp_path):
    state = {key: x.contiguous() for key, x in make_open_clip("erf_b16").state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
    whole = MODELS["erf_b16"]
    config = whole | {"embed_dim": 48, "vision_cfg": whole["vision_cfg"] | {"layers": 10**30}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match=r"more layers than the [0-9]+ tensors"):
        interop.read(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True], ids=["state_dict", "torchscript"])
def test_openai_weights_need_no_config(scripted, tmp_path):
    """A config beside them is of another model."""
    model = shaken(open_clip.model.CLIP(48, vision_cfg=B32, text_cfg=TEXT, quick_gelu=True))
    model.register_buffer("input_resolution", torch.tensor(28))
    if scripted:
        torch.jit.save(torch.jit.script(model), tmp_path / "ViT.pt")
    else:
        sizes = {"context_length": torch.tensor(12), "vocab_size": torch.tensor(49408)}
        torch.save(model.state_dict() | sizes, tmp_path / "ViT.pt")
    config, variables = interop.read(str(tmp_path / "ViT.pt"))
    assert config["model"]["img"]["style"] == "openai" and config["source"]["notes"] == ()
    assert config["data"]["normalization"] == "clip"
    pixels, tokens = images(28), clip_tokens(12)
    assert_same(ours(config, variables, pixels, tokens), theirs_open_clip(model, pixels, tokens))
    content = {"model_cfg": {"embed_dim": 48, "vision_cfg": B32, "text_cfg": TEXT, "quick_gelu": False}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    again, _ = interop.read(str(tmp_path / "ViT.pt"))
    assert again | {"source": config["source"]} == config
    assert "open_clip_config.json in its folder is ignored" in again["source"]["notes"][0]


def test_own_form_is_bit_exact_and_brings_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat": 2}
    model = tokenizer.tokenizers.Tokenizer(tokenizer.tokenizers.models.WordLevel(words, unk_token="cat"))
    model.save(str(tmp_path / "words.json"))
    parts = {"model__scan": True, "model__img__depth": 3, "model__img__pool": "map"}
    config, variables = our_model("xclip", data__tokenizer=str(tmp_path / "words.json"), **parts)
    assert variables["batch_stats"]
    assert interop.write(variables, config, "~/own") == []
    os.remove(tmp_path / "words.json")
    for path in (tmp_path / "own", tmp_path / "own" / interop.WEIGHTS):
        again, found = interop.read(str(path))
        assert again["model"] == config["model"]
        assert again["objective"] == json.loads(json.dumps(config["objective"]))
        assert tokenizer.load(again["data"]["tokenizer"])(["cat"], 4).tolist() == [[0, 2, 1, 0]]
        jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_notes_on_what_a_format_cannot_hold(tmp_path):
    config, variables = our_model("xclip", model__scan=True, data__decoding="transformers")
    notes = interop.write(variables, config, str(tmp_path / "clusters"), "hf")
    assert [note.rpartition(": ")[2] for note in notes] == ["clusters_img, clusters_txt"]
    config, variables = our_model("clip", data__decoding="open_clip")
    (note,) = interop.write(variables, config, str(tmp_path / "alpha"), "hf")
    assert ": data.decoding='open_clip'; drop the alpha channel, as Image.convert('RGB') does, before" in note
    assert interop.write(variables, config, str(tmp_path / "plain"), "open_clip") == []
    config, variables = our_model("siglip")
    rotate = "rotate images by their EXIF tag, as PIL.ImageOps.exif_transpose does, before they are resized"
    ours = [": bias", f": data.decoding='xclip'; {rotate}"]
    white = [f": data.decoding='xclip'; lay transparent images on white and {rotate}"]
    for to, expected in (("hf", ours), ("open_clip", white)):
        notes = interop.write(variables, config, str(tmp_path / to), to)
        assert len(notes) == len(expected)
        assert all(f"{to!r} has no field for it{part}" in note for note, part in zip(notes, expected, strict=True))
    assert interop.read(str(tmp_path / "open_clip"))[0]["objective"]["name"] == "siglip"


def test_heads_of_another_package_are_left_out_by_name(tmp_path):
    config, variables = model_of(superclip(data__tokenizer="clip", model__img__heads=1, model__txt__heads=1))
    note, *_ = interop.write(variables, config, str(tmp_path / "hf"), "hf")
    assert note.endswith(": tokens")
    assert interop.read(str(tmp_path / "hf"))[0]["objective"] == {"name": "clip"}
    assert interop.write(variables, config, str(tmp_path / "own")) == []
    again, params = interop.read(str(tmp_path / "own"))
    assert dict(read_objective(again["objective"]).weights) == {"clip": 1.0, "tokens": 0.5}
    jax.tree.map(np.testing.assert_array_equal, params, variables)


@pytest.mark.parametrize(
    ("objective", "changes", "to", "message"),
    [
        ("nclip", {}, "hf", "objective 'nclip' trains no shared embedding space.*'safetensors'"),
        ("xclip", {"objective__terms": {"clip": 0.0, "nclip": 1.0}}, "open_clip", "objective 'xclip' trains no shared"),
        ("clip", {"model__img__pool": "mean"}, "open_clip", r"model\.img\.pool is 'mean'"),
        ("siglip", {"model__txt__style": "siglip"}, "hf", r"model\.txt\.style is 'siglip'"),
        ("clip", {"model__img__style": "openai"}, "open_clip", "one kind of GELU for both towers"),
        ("clip", {"eval__resize_size": 20}, "open_clip", r"eval\.resize_size is 20"),
        ("clip", {}, "gguf", "to is 'gguf'; it must be one of 'hf'"),
    ],
)
def test_models_that_a_format_does_not_have(objective, changes, to, message, tmp_path):
    config, variables = our_model(objective, **changes)
    with pytest.raises(UserError, match=message):
        interop.write(variables, config, str(tmp_path / "x"), to)
    assert not (tmp_path / "x").exists()


def test_groups_have_the_keys_of_a_run(tmp_path):
    torch.save(make_open_clip("quick_b32").state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"has no open_clip_config\.json in its folder"):
        interop.read(str(tmp_path / "x.pt"))
    content = {"model_cfg": MODELS["quick_b32"] | {"embed_dim": 48}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    config, _ = interop.read(str(tmp_path / "x.pt"))
    run = recipes.base("clip", "B/16").to_dict()
    assert flatten_dict(config["model"]).keys() == flatten_dict(run["model"]).keys()
    assert config["model"]["cluster_head"] == run["model"]["cluster_head"]
    assert config["data"].keys() <= run["data"].keys()
