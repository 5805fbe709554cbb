"""Folders of Hugging Face transformers: a CLIPModel to read and write, a SiglipModel to read."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.images import WHITE
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.interop import names, vocabulary
from xclip_jax.interop.names import Flat
from xclip_jax.interop.tensor_files import json_text, read_json
from xclip_jax.models.layers import STYLES

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_LEGACY_EOT = 2  # the end token in configs before 2023; CLIPModel then pools at the largest id
_BLOCKS: dict[str, str | tuple[str, ...]] = {
    f"{tower}/transformer/blocks/{ours}": tuple(prefix + x for x in theirs)
    for tower, prefix in (("img", "vision_model.encoder.layers.{}."), ("txt", "text_model.encoder.layers.{}."))
    for ours, theirs in (
        ("norm_1/norm", ("layer_norm1.",)), ("norm_2/norm", ("layer_norm2.",)),
        ("attention/qkv", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
        ("attention/out", ("self_attn.out_proj.",)), ("mlp/up", ("mlp.fc1.",)), ("mlp/down", ("mlp.fc2.",)),
    )
}  # fmt: skip
_CLIP = _BLOCKS | {
    "img/patches": "vision_model.embeddings.patch_embedding.",
    "img/positions": "vision_model.embeddings.position_embedding.weight",
    "img/cls": "vision_model.embeddings.class_embedding", "img/norm_pre/norm": "vision_model.pre_layrnorm.",
    "img/norm_post/norm": "vision_model.post_layernorm.",
    "txt/tokens": "text_model.embeddings.token_embedding.weight",
    "txt/positions": "text_model.embeddings.position_embedding.weight",
    "txt/norm_post/norm": "text_model.final_layer_norm.",
    "proj_img/linear": "visual_projection.", "proj_txt/linear": "text_projection.", "log_scale": "logit_scale",
}  # fmt: skip
_POOL = "vision_model.head."
_SIGLIP = _CLIP | {
    "img/pool_map/probe": f"{_POOL}probe", "img/pool_map/query": f"{_POOL}attention.q.",
    "img/pool_map/kv": f"{_POOL}attention.kv.", "img/pool_map/out": f"{_POOL}attention.out_proj.",
    "img/pool_map/norm/norm": f"{_POOL}layernorm.", "img/pool_map/mlp/up": f"{_POOL}mlp.fc1.",
    "img/pool_map/mlp/down": f"{_POOL}mlp.fc2.", "proj_txt/linear": "text_model.head.", "bias": "logit_bias",
}  # fmt: skip
_QKV = f"{_POOL}attention.in_proj_"  # queries, keys and values in one tensor; our q and kv are separate
HEADS = frozenset({"proj_img", "proj_txt", "log_scale"})  # heads of a CLIPModel
# Defaults of the config and processor classes, absent from files.
_TOWER: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip
_CLIP_TOWER: dict[str, Any] = _TOWER | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_TOWER: dict[str, Any] = _TOWER | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_DEFAULTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        _CLIP_TOWER | {"image_size": 224, "patch_size": 32},
        _CLIP_TOWER
        | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77,
           "vocab_size": vocabulary.CLIP_SIZE, "eos_token_id": vocabulary.CLIP_SIZE - 1},
    ),
    "siglip": (
        _SIGLIP_TOWER | {"image_size": 224, "patch_size": 16},
        _SIGLIP_TOWER | {"max_position_embeddings": 64, "vocab_size": 32000},
    ),
}  # fmt: skip
_SIGLIP_PROCESSOR: dict[str, Any] = {
    "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
}  # fmt: skip


def read(tensors: Mapping[str, np.ndarray], folder: epath.Path) -> tuple[dict[str, Any], Flat]:
    """Return config and flat parameters of a CLIPModel or a SiglipModel, from its tensors and the folder's config."""
    content = read_json(folder / CONFIG)
    kind = str(content.get("model_type"))
    check_choice("model_type", kind, _DEFAULTS)
    sigmoid = kind == "siglip"
    groups = []
    for known, modality in zip(_DEFAULTS[kind], ("vision", "text"), strict=True):
        group = content.get(f"{modality}_config_dict")  # in configs before 2023, with precedence
        group = (content.get(f"{modality}_config") or {}) if group is None else group
        groups.append(known | {key: value for key, value in group.items() if value is not None})
    cfg_img, cfg_txt = groups

    def tower(cfg: Mapping[str, Any]) -> dict[str, Any]:
        check_choice("hidden_act", cfg["hidden_act"], _ACTS)
        width = cfg["hidden_size"]
        return {
            "width": width, "depth": cfg["num_hidden_layers"], "heads": cfg["num_attention_heads"],
            "mlp_ratio": names.mlp_ratio(cfg["intermediate_size"], width),
            "style": names.find_style(_ACTS[cfg["hidden_act"]], cfg["layer_norm_eps"], siglip=sigmoid),
        }  # fmt: skip

    size = cfg_img["image_size"]
    img = tower(cfg_img) | {"image_size": size, "patch": cfg_img["patch_size"]}
    txt = tower(cfg_txt) | {"context_length": cfg_txt["max_position_embeddings"]}
    vocab: int = cfg_txt["vocab_size"]
    tensors = {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
    prepare = _preprocessing(folder, size, "Siglip" if sigmoid else "CLIP")
    if sigmoid:
        tensors = _split_qkv(tensors)
        embed = cfg_txt.get("projection_size") or txt["width"]
        img["pool"] = "map"
        txt |= {"causal": False, "pool": "last"}
        tokens = vocabulary.siglip(folder, vocab)
    else:
        eot: int = cfg_txt["eos_token_id"]
        tokens = vocabulary.identify(folder, vocab, None if eot == _LEGACY_EOT else eot)
        embed = content.get("projection_dim", 512)
    group = names.model(img, txt, embed)
    config = names.config(group, tokens, prepare, "hf", sigmoid=sigmoid)
    return config, names.read(tensors, group, vocab, _SIGLIP if sigmoid else _CLIP)


def _split_qkv(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split the joint tensors of the pooling head into queries, and keys with values."""
    split: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if name.startswith(_QKV) and x.ndim and len(x) % 3 == 0:
            end = name.removeprefix(_QKV)
            d = len(x) // 3
            split |= {f"{_POOL}attention.q.{end}": x[:d], f"{_POOL}attention.kv.{end}": x[d:]}
        else:
            split[name] = x
    return split


def _preprocessing(folder: epath.Path, size: int, family: str) -> Preprocessing:
    """Return the preprocessing by the folder's image processor, or by default `family`'s, "CLIP" or "Siglip"."""
    content: dict[str, Any] = {}
    for name in (PREPROCESSOR, PROCESSOR):  # like in transformers, the second one takes precedence
        if (folder / name).exists():
            stored = read_json(folder / name)
            stored = stored.get("image_processor") if name == PROCESSOR else stored
            content = content if stored is None else stored
    content = {key: value for key, value in content.items() if value is not None}
    if family == "Siglip":
        content = _SIGLIP_PROCESSOR | {"size": {"height": size, "width": size}} | content
    crops = content.get("do_center_crop", True)
    crop = _edges(content.get("crop_size", size), "height", "width")
    edges = _edges(content.get("size", size), "shortest_edge")
    side = next(iter(edges.values()), 0)
    square = edges == {"height": side, "width": side}
    fits = isinstance(side, int) and (square or edges == {"shortest_edge": side}) and side >= size
    resample = content.get("resample", 3)
    check_choice(f"{PREPROCESSOR}: resample", resample, _INTERPOLATIONS)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        check_choice(f"{PREPROCESSOR}: {key}", content.get(key, True), (True,))
    kind = str(content.get("image_processor_type", family))
    for key, allowed, expected in (
        ("image_processor_type", kind.startswith(family), f"'{family}ImageProcessor'"),
        ("crop_size", not crops or crop == {"height": size, "width": size}, f"{size}, the size of the tower's images"),
        ("size", fits, f"shortest_edge, or height and width that are equal, of at least {size}"),
        ("do_center_crop", crops or (square and side == size), f"true, or size with height and width {size}"),
        ("rescale_factor", math.isclose(content.get("rescale_factor", 1 / 255), 1 / 255), "1/255"),
    ):
        if not allowed:
            raise UserError(f"{PREPROCESSOR}: {key}={content.get(key)!r} is not supported; expected {expected}.")
    return names.preprocessing(
        PREPROCESSOR, size, content.get("image_mean"), content.get("image_std"),
        resize_mode="squash" if square else "shortest", resize_size=0 if side == size else side,
        interpolation=_INTERPOLATIONS[resample], background=WHITE,
    )  # fmt: skip


def _edges(value: Any, *names: str) -> dict[str, Any]:
    """Return a size as a dict of edges, which some files store as a number."""
    return dict(value) if isinstance(value, dict) else dict.fromkeys(names, value)


def write(config: Mapping[str, Any], params: Flat) -> tuple[Flat, dict[str, str]]:
    """Return tensors, and texts of files, of a model with CLIP's tokenizer as a CLIPModel.

    `params` are flat, of the towers and `HEADS`. `UserError` for resizing without support in CLIPImageProcessor.
    """
    model = config["model"]
    vocab = vocabulary.CLIP_SIZE
    length = model["txt"]["context_length"]
    prepare = Preprocessing.from_dict(config, model["img"]["image_size"])
    acts = {ours: theirs for theirs, ours in reversed(_ACTS.items())}

    def tower(group: Mapping[str, Any], modality: str) -> dict[str, Any]:
        style = STYLES[group["style"]]
        return {
            "model_type": f"clip_{modality}_model", "hidden_size": group["width"],
            "intermediate_size": int(group["mlp_ratio"] * group["width"]), "num_hidden_layers": group["depth"],
            "num_attention_heads": group["heads"], "hidden_act": acts[style.act], "layer_norm_eps": style.eps,
            "projection_dim": model["embed"],
        }  # fmt: skip

    content = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed"],
        "logit_scale_init_value": float(params["log_scale"]),
        "vision_config": tower(model["img"], "vision")
        | {"image_size": model["img"]["image_size"], "patch_size": model["img"]["patch"], "num_channels": 3},
        "text_config": tower(model["txt"], "text")
        | {"max_position_embeddings": length, "vocab_size": vocab, "eos_token_id": vocab - 1,
           "bos_token_id": vocab - 2, "pad_token_id": vocab - 1},
        "dtype": "float32",
    }  # fmt: skip
    size = prepare.size
    side = prepare.resize_size or size
    squash = prepare.resize_mode == "squash"
    resample = next(number for number, name in _INTERPOLATIONS.items() if name == prepare.interpolation)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": resample, "do_center_crop": not squash or side != size,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": prepare.mean, "image_std": prepare.std,
    }  # fmt: skip
    texts = vocabulary.clip_files(length) | {PREPROCESSOR: json_text(processor), CONFIG: json_text(content)}
    return names.write(params, model, vocab, _CLIP), texts
