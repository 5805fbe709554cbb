"""Weights there and back: open_clip, OpenAI's archives, transformers, our own; features to 1e-5."""

import io
import json
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from flax.traverse_util import flatten_dict

from configs import common
from tests import tiny
from tests.util import jit, random_variables, two_towers
from xclip_jax import interop
from xclip_jax.data import tokenizer, transforms
from xclip_jax.errors import UserError
from xclip_jax.interop import tensor_files, torch_file
from xclip_jax.train import build

# Shapes of B/32 and B/16 in small: 7 x 7 patches and 14 x 14, heads of 64 where they must be inferred.
B32 = {"image_size": 28, "patch_size": 4, "width": 128, "head_width": 64, "layers": 2}
B16 = {"image_size": 28, "patch_size": 2, "width": 64, "head_width": 32, "layers": 1}
TEXT = {"context_length": 12, "width": 64, "heads": 1, "layers": 2}
TEXTS = ["a photo of a cat", "two dogs", "", "it's 3 o'clock, über alles gedacht: naïve"]


def shaken(model):
    """With no bias zero and no norm one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model.eval()


def images(size):
    return np.random.default_rng(0).normal(size=(len(TEXTS), size, size, 3)).astype(np.float32)


def ours(config, variables, pixels, tokens):
    """What our towers make of it: the model as a run would build it."""
    model, bias = config["model"], config["objective"]["name"] == "siglip"
    tokenized = tokenizer.load(config["data"]["tokenizer"])
    towers = two_towers(
        img=model["img"], txt=model["txt"] | {"vocab": tokenized.vocab_size, "eot_id": tokenized.eot_id},
        embed=model["embed"], bias_init=model["bias_init"] if bias else None,
    )  # fmt: skip
    out = jit(towers.apply)(variables, pixels, tokens)
    return {key: np.asarray(out[key]) for key in ("z_img", "z_txt", "scale", *(["bias"] if bias else []))}


def theirs_open_clip(model, pixels, tokens):
    with torch.no_grad():
        found = {
            "z_img": model.encode_image(torch.tensor(pixels).permute(0, 3, 1, 2), normalize=True),
            "z_txt": model.encode_text(torch.tensor(tokens), normalize=True),
            "scale": model.logit_scale.exp(),
        }  # fmt: skip
        if model.logit_bias is not None:
            found["bias"] = model.logit_bias
    return {key: x.detach().numpy().reshape(np.shape(x) if x.ndim > 1 else ()) for key, x in found.items()}


def theirs_hf(model, pixels, tokens):
    ids = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2))
    return {"z_img": out.image_embeds.numpy(), "z_txt": out.text_embeds.numpy(),
            "scale": model.logit_scale.exp().detach().numpy()}  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def clip_tokens(length):
    return tokenizer.load("clip")(TEXTS, length)


# --- open_clip

MODELS = {
    "quick_b32": {"vision_cfg": B32, "text_cfg": TEXT, "quick_gelu": True},
    "erf_b16": {"vision_cfg": B16, "text_cfg": TEXT},
    "no_ln_pre": {"vision_cfg": B16 | {"no_ln_pre": True, "mlp_ratio": 2.7}, "text_cfg": TEXT},
    "tanh_eps_bias_custom": {
        "vision_cfg": B16 | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "patch_dropout": 0.5},
        "text_cfg": TEXT | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-4}, "pool_type": "eos",
                            "eos_id": 49407, "proj_bias": True},
        "init_logit_bias": -9.5, "custom_text": True, "nonscalar_logit_scale": True,
    },
}  # fmt: skip


def make_open_clip(name):
    options = dict(MODELS[name])
    kind = open_clip.model.CustomTextCLIP if options.pop("custom_text", False) else open_clip.model.CLIP
    model = shaken(kind(48, **options))
    if name == "tanh_eps_bias_custom":
        model.text.text_projection.bias.data.zero_()
    return model


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quick_b32", "open_clip_model.safetensors"),
        ("erf_b16", "open_clip_pytorch_model.bin"),
        ("no_ln_pre", "epoch_1.pt"),
        ("tanh_eps_bias_custom", "open_clip_model.safetensors"),
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
    assert config["data"] == {"tokenizer": "clip", "normalization": "half", "resample": "bicubic"}
    pixels, tokens = images(28), clip_tokens(12)
    expected = theirs_open_clip(model, pixels, tokens)
    assert_same(ours(config, variables, pixels, tokens), expected)
    assert interop.write(variables, config, str(tmp_path / "back"), "open_clip") == []
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert_same(theirs_open_clip(loaded, pixels, tokens), expected)
    assert list(loaded.visual.preprocess_cfg["std"]) == [0.5] * 3
    again = interop.read(str(tmp_path / "back"))
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], variables)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True], ids=["state_dict", "torchscript"])
def test_openai_weights_need_no_config(scripted, tmp_path):
    options = {"vision_cfg": B32, "text_cfg": TEXT, "quick_gelu": True}
    model = shaken(open_clip.model.CLIP(48, **options))
    if scripted:
        torch.jit.save(torch.jit.script(model), tmp_path / "ViT.pt")
    else:
        sizes = {"input_resolution": 28, "context_length": 12, "vocab_size": 49408}
        torch.save(model.state_dict() | {key: torch.tensor(x) for key, x in sizes.items()}, tmp_path / "ViT.pt")
    config, variables = interop.read(str(tmp_path / "ViT.pt"))
    assert config["model"]["img"]["act"] == "quick_gelu" and config["source"]["notes"] == ()
    assert config["data"]["normalization"] == "clip"
    pixels, tokens = images(28), clip_tokens(12)
    assert_same(ours(config, variables, pixels, tokens), theirs_open_clip(model, pixels, tokens))


def test_half_precision_becomes_fp32(tmp_path):
    state = make_open_clip("quick_b32").state_dict()
    for kind in (torch.bfloat16, torch.float16):
        half = {key: x.to(kind).contiguous() for key, x in state.items()}
        safetensors.torch.save_file(half, tmp_path / "x.safetensors")
        torch.save(half, tmp_path / "x.bin")
        for name in ("x.safetensors", "x.bin"):
            found, _ = tensor_files.tensors(tensor_files.epath.Path(tmp_path / name))
            for key, x in half.items():
                assert found[key].dtype == np.float32
                np.testing.assert_array_equal(found[key], x.float().numpy())


# --- transformers


def make_hf(act, eps, eos, patch):
    tower = {"hidden_act": act, "layer_norm_eps": eps, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=tower | {"max_position_embeddings": 12, "eos_token_id": eos},
        vision_config=tower | {"image_size": 28, "patch_size": patch}, projection_dim=40,
    )  # fmt: skip
    return shaken(transformers.CLIPModel(config))


@pytest.mark.parametrize(
    ("act", "eps", "eos", "patch"),
    [("quick_gelu", 1e-5, 2, 4), ("gelu", 1e-3, 49407, 2), ("gelu_pytorch_tanh", 1e-5, 49407, 4)],
)
def test_transformers_there_and_back(act, eps, eos, patch, tmp_path):
    model, there = make_hf(act, eps, eos, patch), tmp_path / "there"
    model.save_pretrained(there, max_shard_size="4MB" if act == "gelu" else "1GB")
    if act == "gelu":
        assert (there / "model.safetensors.index.json").exists()
    if act == "quick_gelu":  # as configs of 2022 have it
        content = json.loads((there / "config.json").read_text())
        old = {"text_config": {"hidden_size": 9}, "text_config_dict": content["text_config"]}
        (there / "config.json").write_text(json.dumps(content | old))
    if act == "gelu_pytorch_tanh":
        (there / "model.safetensors").unlink()
        torch.save(model.state_dict(), there / "pytorch_model.bin")
    config, variables = interop.read(str(there))
    assert config["source"]["format"] == "hf"
    pixels, tokens = images(28), clip_tokens(12)
    expected = theirs_hf(model, pixels, tokens)
    assert_same(ours(config, variables, pixels, tokens), expected)
    assert interop.write(variables, config, str(tmp_path / "back"), "hf") == []
    loaded, report = transformers.CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(theirs_hf(loaded.eval(), pixels, tokens), expected)
    jax.tree.map(np.testing.assert_array_equal, interop.read(str(tmp_path / "back")), (config, variables))


def test_transformers_processor_reads_as_ours(tmp_path):
    """The folder that we write tokenizes and prepares images there as the model was trained."""
    model = make_hf("gelu", 1e-5, 49407, 4)
    model.save_pretrained(tmp_path / "there")
    config, variables = interop.read(str(tmp_path / "there"))
    config["data"]["normalization"] = "imagenet"
    interop.write(variables, config, str(tmp_path / "back"), "hf")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "back")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    found = processor(text=TEXTS, images=[pixels], padding="max_length", truncation=True, return_tensors="np")
    expected = clip_tokens(12)
    ends = np.argmax(expected == 49407, axis=1)
    for row, there, end in zip(expected, found["input_ids"], ends, strict=True):
        np.testing.assert_array_equal(there[: end + 1], row[: end + 1])
    prepared = transforms.normalize(transforms.resize_center_crop(pixels, 28)[None], *transforms.STATISTICS["imagenet"])
    np.testing.assert_allclose(found["pixel_values"].transpose(0, 2, 3, 1), prepared, atol=0.02)
    assert interop.read(str(tmp_path / "back"))[0]["data"]["normalization"] == "imagenet"


# --- ours


def our_model(objective, **changes):
    """A run's config and variables of its model, random."""
    c = tiny.config(objective, **{"data__tokenizer": "clip", "model__img__heads": 1, "model__txt__heads": 1} | changes)
    p = build.build(c, jax.devices()[:1])
    args = jnp.zeros((1, p.image_size, p.image_size, 3)), jnp.zeros((1, p.context_length), jnp.int32)
    return c.to_dict(), jax.device_get(random_variables(p.model, *args))


def test_own_form_is_bit_exact(tmp_path):
    config, variables = our_model("xclip", model__img__scan=True, model__img__depth=3, model__img__pool="map")
    assert variables["batch_stats"]
    assert interop.write(variables, config, str(tmp_path / "own")) == []
    for path in (tmp_path / "own", tmp_path / "own" / interop.WEIGHTS):
        again, found = interop.read(str(path))
        assert again["model"] == config["model"]
        assert again["objective"] == json.loads(json.dumps(config["objective"]))
        jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_own_form_brings_its_tokenizer(tmp_path):
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat": 2}
    model = tokenizer.tokenizers.Tokenizer(tokenizer.tokenizers.models.WordLevel(words, unk_token="cat"))
    model.save(str(tmp_path / "words.json"))
    config, variables = our_model("clip", data__tokenizer=str(tmp_path / "words.json"))
    interop.write(variables, config, str(tmp_path / "own"))
    os.remove(tmp_path / "words.json")
    again, _ = interop.read(str(tmp_path / "own"))
    assert tokenizer.load(again["data"]["tokenizer"])(["cat"], 4).tolist() == [[0, 2, 1, 0]]
    # Its end is not the largest id: open_clip pools at it by name.
    interop.write(variables, again, str(tmp_path / "open_clip"), "open_clip")
    there = tmp_path / "open_clip"
    assert interop.read(str(there))[0]["data"]["tokenizer"] == str(there / "tokenizer.json")
    loaded = open_clip.create_model(f"local-dir:{there}").eval()
    tokens, pixels = np.array([[0, 2, 2, 1], [0, 1, 0, 0]]), images(tiny.SIZE)[:2]
    tokens = np.pad(tokens, ((0, 0), (0, tiny.LENGTH - 4)))
    assert_same(theirs_open_clip(loaded, pixels, tokens), ours(again, variables, pixels, tokens))


def test_what_a_format_cannot_hold_is_said(tmp_path):
    config, variables = our_model("xclip", model__img__scan=True)
    (note,) = interop.write(variables, config, str(tmp_path / "hf"), "hf")
    assert note == "left out, since 'hf' has no place for them: clusters_img, clusters_txt"
    config, variables = our_model("siglip")
    (note,) = interop.write(variables, config, str(tmp_path / "hf"), "hf")
    assert "no place for it: bias" in note
    assert interop.write(variables, config, str(tmp_path / "oc"), "open_clip") == []
    assert interop.read(str(tmp_path / "oc"))[0]["objective"]["name"] == "siglip"


@pytest.mark.parametrize(
    ("objective", "changes", "to", "message"),
    [
        ("nclip", {}, "hf", "no projection to a shared space .*'nclip'.*'safetensors'"),
        ("clip", {"model__img__pool": "mean"}, "open_clip", r"model\.img\.pool is 'mean'"),
        ("clip", {"model__img__stem": "hmlp"}, "hf", r"model\.img\.stem is 'hmlp'"),
        ("clip", {"model__img__pre_norm": False}, "hf", "norm before the first block"),
        ("clip", {"model__img__act": "quick_gelu"}, "open_clip", "one kind of GELU for both towers"),
        ("clip", {"data__tokenizer": "bytes"}, "hf", "'bytes' has no files that 'hf' could read; .*'safetensors'"),
        ("clip", {"data__tokenizer": "bytes"}, "open_clip", "'bytes' has no files that 'open_clip' could read"),
        ("clip", {}, "onnx", "to is 'onnx'; it must be one of 'hf'"),
    ],
)
def test_models_that_a_format_does_not_have(objective, changes, to, message, tmp_path):
    config, variables = our_model(objective, **changes)
    with pytest.raises(UserError, match=message):
        interop.write(variables, config, str(tmp_path / "x"), to)
    assert not (tmp_path / "x").exists()


def test_groups_have_the_keys_of_a_run(tmp_path):
    torch.save(make_open_clip("quick_b32").state_dict(), tmp_path / "x.pt")
    config, _ = interop.read(str(tmp_path / "x.pt"))
    run = common.base("clip", "B/16").to_dict()
    assert flatten_dict(config["model"]).keys() == flatten_dict(run["model"]).keys()
    assert config["model"]["cluster_head"] == run["model"]["cluster_head"]
    assert config["data"].keys() <= run["data"].keys()
    assert "heads are taken to be 64 wide and activations to be quick_gelu" in config["source"]["notes"][0]


# --- what is refused


def saved(tmp_path, change, cfg=None, name="quick_b32"):
    """A folder of weights of open_clip after `change` of its tensors and config."""
    state = {key: x.contiguous() for key, x in make_open_clip(name).state_dict().items()}
    change(state)
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
    if cfg is not None:
        content = {"model_cfg": MODELS[name] | {"embed_dim": 48} | cfg}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    return str(tmp_path)


def test_tensors_that_do_not_fit_are_listed_by_name(tmp_path):
    def change(state):
        del state["transformer.resblocks.1.ln_2.bias"]
        state["visual.extra"] = torch.zeros(1)
        state["ln_final.weight"] = torch.zeros(7)

    with pytest.raises(UserError) as error:
        interop.read(saved(tmp_path, change, {}))
    for part in ("missing are transformer.resblocks.1.ln_2.bias", "unknown are visual.extra",
                 "misshapen are ln_final.weight is (7,) and should be (64,)"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, r"sets vision_cfg\.timm_model_name='vit_base'"),
        ({"vision_cfg": {"layers": [2, 2, 2, 2]}}, "has a ResNet"),
        ({"vision_cfg": {"attentional_pool": True}}, r"vision_cfg\.attentional_pool=True"),
        ({"vision_cfg": {"pool_type": "avg"}}, "sets pool_type='avg'; it must be 'tok'"),
        ({"text_cfg": {"no_causal_mask": True}}, r"text_cfg\.no_causal_mask=True"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, r"text_cfg\.hf_model_name='roberta-base'"),
        ({"text_cfg": {"vocab_size": 32000}}, "vocabulary of 32000 with end 31999, which is not CLIP's"),
    ],
)
def test_architectures_that_are_not_ours_are_named(cfg, message, tmp_path):
    with pytest.raises(UserError, match=message):
        interop.read(saved(tmp_path, lambda _: None, cfg))


def test_weights_that_are_not_ours_are_named(tmp_path):
    def timm(state):
        state["visual.trunk.blocks.0.norm1.weight"] = torch.zeros(3)

    with pytest.raises(UserError, match="an image tower of timm, which is not supported"):
        interop.read(saved(tmp_path, timm))
    safetensors.torch.save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no CLIP that is known here: its tensors are called conv\.weight"):
        interop.read(str(tmp_path / "x.safetensors"))
    folder = tmp_path / "siglip"
    folder.mkdir()
    safetensors.torch.save_file({"vision_model.x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UserError, match="model of type 'siglip', which is not supported"):
        interop.read(str(folder))
    with pytest.raises(UserError, match="no folder and no file of weights"):
        interop.read(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file of weights"):
        interop.read(str(tmp_path / "empty"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="no whole safetensors file"):
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
    with pytest.raises(UserError, match=r"holds more than tensors: it asks for (posix|nt)\.mkdir\. Convert it: "):
        interop.read(str(tmp_path / "evil.pt"))
    pickles = {"getattr": b"cbuiltins\ngetattr\n.", "eval": b"cbuiltins\neval\n.",
               "own": b"cxclip_jax.interop.torch_file\nload\n."}  # fmt: skip
    for name, content in pickles.items():
        with pytest.raises(UserError, match="it asks for"):
            torch_file.load(torch_zip(tmp_path / name, content), name)
    assert not os.path.exists(mark)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError, match="it asks for compressed data"):
        interop.read(str(tmp_path / "bomb.pt"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"is no zip, as torch.save has written since version 1\.6"):
        interop.read(str(tmp_path / "old.pt"))


STORAGE = object()


class Pickled:
    """A tensor as torch pickles it, of a storage of four numbers."""

    def __init__(self, offset, size, stride):
        self.args = (offset, size, stride)


class Writer(pickle.Pickler):
    def persistent_id(self, x):
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if x is STORAGE else None

    def reducer_override(self, x):
        if isinstance(x, Pickled):
            return torch._utils._rebuild_tensor_v2, (STORAGE, *x.args, False, {})
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
        return torch_file.load(content, "x.pt")[0]["x"]

    np.testing.assert_array_equal(load(0, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    with pytest.raises(UserError, match=r"a tensor (beyond its storage|of negative size)"):
        load(offset, size, stride)
