"""SigLIP's models: folders of transformers' SiglipModel, and of open_clip with an image tower of timm.

Towers are Transformers without a class token or a norm before the blocks. The image tower pools by attention and has no
projection; the text tower is not causal, pools at its last token, and its projection has a bias. SigLIP 2 of one
resolution is the same model with another tokenizer.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.interop import config_mapping, param_mapping, vocabulary
from xclip_jax.interop.param_mapping import Names, ParamMapping

HEADS = frozenset({"proj_img", "proj_txt", "log_scale", "bias"})
_HF = Names(
    img={
        "patches": "vision_model.embeddings.patch_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight", "norm_post": "vision_model.post_layernorm",
        "blocks": "vision_model.encoder.layers", "probe": "vision_model.head.probe",
        "query": "vision_model.head.attention.q", "kv": "vision_model.head.attention.kv",
        "out": "vision_model.head.attention.out_proj", "norm": "vision_model.head.layernorm",
        "up": "vision_model.head.mlp.fc1", "down": "vision_model.head.mlp.fc2",
    },
    txt=param_mapping.HF.txt,
    block=param_mapping.HF.block,
    heads={"proj_txt": "text_model.head", "log_scale": "logit_scale", "bias": "logit_bias"},
    linear=True,
)  # fmt: skip
# One tensor of queries, keys and values; the parameters here are that of queries and that of the two others.
_JOINED = "vision_model.head.attention.in_proj_"
_OPEN_CLIP = dataclasses.replace(
    param_mapping.open_clip("text.", linear=True),
    heads={"proj_txt": "text.text_projection", "log_scale": "logit_scale", "bias": "logit_bias"},
)
_TIMM = Names(
    img={
        "patches": "visual.trunk.patch_embed.proj", "positions": "visual.trunk.pos_embed",
        "norm_post": "visual.trunk.norm", "blocks": "visual.trunk.blocks", "probe": "visual.trunk.attn_pool.latent",
        "query": "visual.trunk.attn_pool.q", "kv": "visual.trunk.attn_pool.kv", "out": "visual.trunk.attn_pool.proj",
        "norm": "visual.trunk.attn_pool.norm", "up": "visual.trunk.attn_pool.mlp.fc1",
        "down": "visual.trunk.attn_pool.mlp.fc2",
    },
    txt={},
    block={"norm_1": "norm1", "qkv": ("attn.qkv.",), "out": "attn.proj", "norm_2": "norm2", "up": "mlp.fc1",
           "down": "mlp.fc2"},
    heads={},
    linear=True,
)  # fmt: skip
# timm's names of the image towers say how many heads they have, and these which of them have the tanh form of GELU.
_TIMM_NAME = r"vit_(base|large|so400m|giantopt)_patch\d+_siglip_\d+"
_TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
_TIMM_TANH = r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt_patch16).*"
# Defaults of SiglipConfig, which it does not write to the file.
_HF_TOWER: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                             "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh",
                             "layer_norm_eps": 1e-6}  # fmt: skip
HF_IMAGE = _HF_TOWER | {"num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True}
HF_TEXT = _HF_TOWER | {"max_position_embeddings": 64, "vocab_size": 32000}
# Defaults of SiglipImageProcessor.
HF_PROCESSOR: dict[str, Any] = {"do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


def read_hf(
    tensors: Mapping[str, np.ndarray],
    folder: epath.Path,
    towers: tuple[dict[str, Any], dict[str, Any]],
    sizes: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], str, param_mapping.Flat]:
    """Return config group `model`, tokenizer and flat parameters of a SiglipModel.

    Args:
      tensors: by their names.
      folder: of the tokenizer.
      towers: options of the image and the text tower, in the terms of this package.
      sizes: of the text: "vocab_size" and "projection_size".
      where: path of the weights, for errors.
    """
    split: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if name.startswith(_JOINED) and x.ndim and len(x) % 3 == 0:
            end, d = name.removeprefix(_JOINED), len(x) // 3
            split |= {f"{_HF.img['query']}.{end}": x[:d], f"{_HF.img['kv']}.{end}": x[d:]}
        elif not name.endswith("position_ids"):
            split[name] = x
    vocab: int = sizes["vocab_size"]
    model = _model(*towers, sizes["projection_size"] or towers[1]["width"], split, where)
    tokens = vocabulary.siglip(folder, vocab, "canonical", where)
    return model, tokens, param_mapping.read(split, _mappings(model, vocab, _HF, _HF), where)


def is_open_clip(content: Mapping[str, Any] | None) -> bool:
    """Whether an open_clip_config.json is of a SigLIP."""
    model = (content or {}).get("model_cfg", content)
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    return isinstance(vision, Mapping) and bool(re.fullmatch(_TIMM_NAME, str(vision.get("timm_model_name"))))


def read_open_clip(
    tensors: Mapping[str, np.ndarray],
    folder: epath.Path,
    vision: Mapping[str, Any],
    text: dict[str, Any],
    options: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], str, param_mapping.Flat]:
    """Return config group `model`, tokenizer and flat parameters of a SigLIP of open_clip.

    Args:
      tensors: by their names.
      folder: of the tokenizer.
      vision: group "vision_cfg" of the config.
      text: options of the text tower, in the terms of this package.
      options: group "text_cfg" of the config, and "embed_dim".
      where: path of the weights, for errors.
    """
    for key, given, right in (
        ("timm_pool", vision.get("timm_pool"), "map"), ("timm_proj", vision.get("timm_proj"), "none"),
        ("pool_type", options.get("pool_type"), "last"), ("no_causal_mask", options.get("no_causal_mask"), True),
        ("proj_bias", options.get("proj_bias"), True),
    ):  # fmt: skip
        if given != right:
            raise UserError(f"{where} is not supported: a SigLIP with {key}={given!r}; expected {right!r}.")
    names, name = _TIMM.img, vision["timm_model_name"]
    needed = (f"{names['patches']}.weight", f"{names['blocks']}.0.mlp.fc1.weight")
    if missing := [key for key, n in zip(needed, (4, 2), strict=True) if key not in tensors or tensors[key].ndim != n]:
        raise UserError(f"{where} is not the image tower {name!r}: it lacks {', '.join(missing)}.")
    patches, up = (tensors[key] for key in needed)
    size = re.search(r"siglip.*_(\d+)", name)
    img = {
        "width": len(patches), "patch": patches.shape[-1],
        "depth": len({key.split(".")[3] for key in tensors if key.startswith(f"{names['blocks']}.")}),
        "heads": _TIMM_HEADS[name.split("_")[1]], "mlp_ratio": config_mapping.mlp_ratio(len(up), len(patches)),
        "act": "gelu_tanh" if re.fullmatch(_TIMM_TANH, name) else "gelu", "eps": 1e-6,
        "image_size": config_mapping.square(
            vision.get("image_size") or int(size[1] if size else 0), "image_size", where
        ),
    }  # fmt: skip
    vocab = options["vocab_size"]
    model = _model(img, text, options["embed_dim"], tensors, where)
    clean = (options.get("tokenizer_kwargs") or {}).get("clean")
    if clean != "canonicalize":
        raise UserError(f"{where}: tokenizer_kwargs sets clean={clean!r}; expected 'canonicalize'.")
    tokens = vocabulary.siglip(folder, vocab, "canonical_spaces", where)
    return model, tokens, param_mapping.read(tensors, _mappings(model, vocab, _TIMM, _OPEN_CLIP), where)


def _model(
    img: Mapping[str, Any], txt: Mapping[str, Any], embed: int, tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    if missing := [name for name in ("logit_scale", "logit_bias") if name not in tensors or tensors[name].size != 1]:
        raise UserError(f"{where} is not a SigLIP with both towers: it lacks {', '.join(missing)}.")
    if embed != img["width"]:
        raise UserError(f"{where}: texts are projected to {embed} dimensions, and images have {img['width']}.")
    scale, bias = (float(tensors[name].reshape(())) for name in ("logit_scale", "logit_bias"))
    img = {"pre_norm": False, "pool": "map", "patch_bias": True, **img}
    txt = {"causal": False, "pool": "last", **txt}
    group = config_mapping.model(img, txt, embed, log_scale=scale, bias=bias)
    return group | {"project_img": False, "project_bias": True}


def _mappings(model: Mapping[str, Any], vocab: int, image: Names, text: Names) -> list[ParamMapping]:
    """Mappings of all parameters; `image` and `text` name those of each tower, `text` those of the heads too."""
    img, txt, embed, names = model["img"], model["txt"], model["embed"], image.img
    d, heads, tokens = img["width"], img["heads"], (img["image_size"] // img["patch"]) ** 2
    kv, hidden = d // heads, int(img["mlp_ratio"] * d)
    table = (1, tokens, d) if image is _TIMM else (tokens, d)
    pool = "img/pool_map"
    mappings = [
        param_mapping.patches(names["patches"] + ".weight", d, img["patch"]),
        ParamMapping("img/patches/bias", (f"{names['patches']}.bias",), (d,)),
        ParamMapping("img/positions", (names["positions"],), table, lambda x: x.reshape(tokens, d)),
        *param_mapping.norm("img/norm_post", names["norm_post"], d),
        ParamMapping(f"{pool}/probe", (names["probe"],), (1, 1, d)),
        ParamMapping(
            f"{pool}/query/kernel", (f"{names['query']}.weight",), (d, d), lambda x: x.T.reshape(d, heads, kv)
        ),
        ParamMapping(f"{pool}/query/bias", (f"{names['query']}.bias",), (d,), lambda x: x.reshape(heads, kv)),
        ParamMapping(
            f"{pool}/kv/kernel", (f"{names['kv']}.weight",), (2 * d, d), lambda x: x.T.reshape(d, 2, heads, kv)
        ),
        ParamMapping(f"{pool}/kv/bias", (f"{names['kv']}.bias",), (2 * d,), lambda x: x.reshape(2, heads, kv)),
        *param_mapping.linear(f"{pool}/out", names["out"], (d, d), heads=heads),
        *param_mapping.norm(f"{pool}/norm", names["norm"], d),
        *param_mapping.linear(f"{pool}/mlp/up", names["up"], (hidden, d)),
        *param_mapping.linear(f"{pool}/mlp/down", names["down"], (d, hidden)),
        ParamMapping("txt/tokens", (text.txt["tokens"],), (vocab, txt["width"])),
        ParamMapping("txt/positions", (text.txt["positions"],), (txt["context_length"], txt["width"])),
        *param_mapping.norm("txt/norm_post", text.txt["norm_post"], txt["width"]),
        *param_mapping.linear("proj_txt/linear", text.heads["proj_txt"], (embed, txt["width"])),
        *(ParamMapping(name, (text.heads[name],), ()) for name in ("log_scale", "bias")),
    ]
    for key, tower, naming in (("img", img, image), ("txt", txt, text)):
        blocks = (naming.img if key == "img" else naming.txt)["blocks"]
        for i in range(tower["depth"]):
            mappings += param_mapping.block(f"{key}/transformer/block_{i}", f"{blocks}.{i}", tower, naming)
    return mappings
