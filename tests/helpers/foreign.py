"""Small models of open_clip and transformers, and of this package, with random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import safetensors.torch
import torch
import transformers

from tests.helpers import tiny
from tests.helpers.util import jit, random_variables, two_towers
from xclip_jax.data import tokenizer
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
    """Outputs of our towers, with the model as a run builds it."""
    model, bias = config["model"], config["objective"]["name"] == "siglip"
    tokenized = tokenizer.load(config["data"]["tokenizer"])
    towers = two_towers(
        img=model["img"], txt=model["txt"] | {"vocab": tokenized.vocab_size, "eot_id": tokenized.eot_id},
        embed=model["embed"], bias=bias,
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
    scalars = {"scale": model.logit_scale.exp()}
    if hasattr(model, "logit_bias"):
        scalars["bias"] = model.logit_bias
    scalars = {key: x.detach().numpy().reshape(()) for key, x in scalars.items()}
    return {"z_img": out.image_embeds.numpy(), "z_txt": out.text_embeds.numpy(), **scalars}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def clip_tokens(length):
    return tokenizer.load("clip")(TEXTS, length)


MODELS = {
    "quick_b32": {"vision_cfg": B32, "text_cfg": TEXT, "quick_gelu": True},
    "erf_b16": {"vision_cfg": B16, "text_cfg": TEXT},
    "tanh_bias_custom": {
        "vision_cfg": B16 | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-5}, "patch_dropout": 0.5,
                             "mlp_ratio": 2.7},
        "text_cfg": TEXT | {"act_kwargs": {"approximate": "tanh"}, "pool_type": "eos", "eos_id": 49407},
        "init_logit_bias": -9.5, "custom_text": True, "nonscalar_logit_scale": True,
    },
}  # fmt: skip


def make_open_clip(name):
    options = dict(MODELS[name])
    kind = open_clip.model.CustomTextCLIP if options.pop("custom_text", False) else open_clip.model.CLIP
    return shaken(kind(48, **options))


def save_open_clip(folder, state, options):
    """Writes tensors, and `options` of open_clip's CLIP beside `embed_dim`, as open_clip does; returns the folder."""
    folder.mkdir(exist_ok=True)
    state = {key: x.contiguous() for key, x in state.items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    content = {"model_cfg": {"embed_dim": 48} | options}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def make_hf(act, eps, eos, patch):
    tower = {"hidden_act": act, "layer_norm_eps": eps, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=tower | {"max_position_embeddings": 12, "eos_token_id": eos},
        vision_config=tower | {"image_size": 28, "patch_size": patch}, projection_dim=40,
    )  # fmt: skip
    return shaken(transformers.CLIPModel(config))


def our_model(objective, **changes):
    """A run's config and variables of its model, random."""
    return model_of(
        tiny.config(objective, **{"data__tokenizer": "clip", "model__img__heads": 1, "model__txt__heads": 1} | changes)
    )


def model_of(config):
    """A config as a dict, and random variables of its model."""
    p = build.build(config, jax.devices()[:1])
    size, length = config.model.img.image_size, config.model.txt.context_length
    args = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32)
    return config.to_dict(), jax.device_get(random_variables(p.model, *args))
