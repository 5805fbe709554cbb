"""Hugging Face transformers: folders of a CLIPModel, and of a SiglipModel to read."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.interop import config_mapping, param_mapping, siglip, vocabulary
from xclip_jax.interop.tensor_files import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEADS = frozenset(param_mapping.HF.heads)  # that a CLIPModel has
PREPROCESSOR = "preprocessor_config.json"
_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_LEGACY_EOT = 2  # of configs before 2023; CLIPModel then pools at the largest id
# Defaults of CLIPConfig, which it does not write to the file.
_IMAGE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "vocab_size": vocabulary.CLIP_SIZE, "eos_token_id": vocabulary.CLIP_SIZE - 1,
}  # fmt: skip
_TOWER: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def read(
    tensors: Mapping[str, np.ndarray], folder: epath.Path, content: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], param_mapping.Flat]:
    """Return config and flat parameters of the tensors and config.json of a CLIPModel or a SiglipModel."""
    kind = content.get("model_type")
    if kind not in ("clip", "siglip"):
        raise UserError(f"{where} is a model of type {kind!r}, which is not supported; 'clip' and 'siglip' are.")
    defaults = (_IMAGE | _TOWER, _TEXT | _TOWER) if kind == "clip" else (siglip.HF_IMAGE, siglip.HF_TEXT)
    cfg_img, cfg_txt = (
        known | {key: value for key, value in _given(content, modality).items() if value is not None}
        for known, modality in zip(defaults, ("vision", "text"), strict=True)
    )
    if cfg_img["num_channels"] != 3:
        raise UserError(f"{where} takes images of {cfg_img['num_channels']} channels; expected 3.")

    def tower(cfg: Mapping[str, Any]) -> dict[str, Any]:
        if cfg["hidden_act"] not in _ACTS:
            raise UserError(f"{where}: hidden_act {cfg['hidden_act']!r} is not supported; {', '.join(_ACTS)} are.")
        width = cfg["hidden_size"]
        return {
            "width": width, "depth": cfg["num_hidden_layers"], "heads": cfg["num_attention_heads"],
            "mlp_ratio": config_mapping.mlp_ratio(cfg["intermediate_size"], width), "act": _ACTS[cfg["hidden_act"]],
            "eps": cfg["layer_norm_eps"],
        }  # fmt: skip

    size, patch = (
        config_mapping.square(cfg_img[key], f"vision_config.{key}", where) for key in ("image_size", "patch_size")
    )
    img = tower(cfg_img) | {"image_size": size, "patch": patch}
    txt = tower(cfg_txt) | {"context_length": cfg_txt["max_position_embeddings"]}
    if kind == "siglip":
        if not cfg_img["vision_use_head"]:
            raise UserError(f"{where}: vision_use_head is false; SigLIPs with a pooling head are supported.")
        sizes = {"vocab_size": cfg_txt["vocab_size"], "projection_size": cfg_txt.get("projection_size")}
        model, tokens, flat = siglip.read_hf(tensors, folder, (img, txt), sizes, where)
        prepare = _preprocessing(folder, size, "Siglip")
        return config_mapping.config(model, tokens, prepare, (), "hf", siglip.HEADS), flat
    eot: int = cfg_txt["eos_token_id"]
    vocab: int = cfg_txt["vocab_size"]
    tokens = vocabulary.identify(folder, vocab, None if eot == _LEGACY_EOT else eot, where)
    tensors = {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
    log_scale = float(tensors["logit_scale"].reshape(())) if "logit_scale" in tensors else 0.0
    img["pre_norm"] = True
    model = config_mapping.model(img, txt, content.get("projection_dim", 512), log_scale=log_scale, bias=None)
    mappings = param_mapping.param_mappings(model, vocab, param_mapping.HF, HEADS)
    flat = param_mapping.read(tensors, mappings, where)
    return config_mapping.config(model, tokens, _preprocessing(folder, size), (), "hf", HEADS), flat


def _given(content: Mapping[str, Any], modality: str) -> Mapping[str, Any]:
    # Configs of 2022 have a second group, which takes precedence.
    second = content.get(f"{modality}_config_dict")
    return (content.get(f"{modality}_config") or {}) if second is None else second


def _preprocessing(folder: epath.Path, size: int, family: str = "CLIP") -> Preprocessing:
    """Preprocessing of the folder's image processor, for images of `size` pixels; the family's without such a file."""
    for name, key in ((PREPROCESSOR, None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            content = read_json(folder / name)
            return _processor(content.get(key) or {} if key else content, size, str(folder / name), family)
    return _processor({}, size, str(folder), family)


def _processor(content: Mapping[str, Any], size: int, where: str, family: str) -> Preprocessing:
    defaults: dict[str, Any] = {}
    if family == "Siglip":
        defaults = siglip.HF_PROCESSOR | {"size": {"height": size, "width": size}}
    content = defaults | {key: value for key, value in content.items() if value is not None}

    def refuse(key: str, right: str) -> UserError:
        return UserError(f"{where}: {key}={content.get(key)!r} is not supported; expected {right}.")

    for key in ("image_processor_type", "feature_extractor_type"):
        if not str(content.get(key) or family).startswith(family):
            raise refuse(key, f"'{family}ImageProcessor'")
    if not content.get("do_resize", True):
        raise refuse("do_resize", "true")
    if content.get("resample", 3) not in _INTERPOLATIONS:
        raise refuse("resample", "2 (bilinear) or 3 (bicubic)")
    crops, crop = content.get("do_center_crop", True), _edges(content.get("crop_size", size), "height", "width")
    if crops and crop != {"height": size, "width": size}:
        raise refuse("crop_size", f"{size}, the size of the tower's images")
    edges = _edges(content.get("size", size), "shortest_edge")
    side = next(iter(edges.values()), 0)
    square = edges == {"height": side, "width": side}
    if not isinstance(side, int) or not (square or edges == {"shortest_edge": side}) or side < size:
        raise refuse("size", f"shortest_edge, or height and width that are equal, of at least {size}")
    if not crops and not (square and side == size):
        raise refuse("do_center_crop", f"true, or size with height and width {size}")
    # Ours normalises x / 255; another factor is another mean and deviation.
    factor = 255 * (content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0)
    mean, std = content.get("image_mean"), content.get("image_std")
    if not content.get("do_normalize", True):
        mean, std = 0.0, 1.0
    prepare = config_mapping.preprocessing(
        size, mean, std, where, resize_mode="squash" if square else "shortest",
        resize_size=0 if side == size else side, interpolation=_INTERPOLATIONS[content.get("resample", 3)],
    )  # fmt: skip
    if math.isclose(factor, 1):
        return prepare
    mean, std = (tuple(x / factor for x in values) for values in (prepare.mean, prepare.std))
    return dataclasses.replace(prepare, mean=mean, std=std)


def _edges(value: Any, *names: str) -> dict[str, Any]:
    """A size as a dict of edges; older files have a number."""
    return dict(value) if isinstance(value, dict) else dict.fromkeys(names, value)


def write(
    config: Mapping[str, Any], params: param_mapping.Flat, tokens: Tokenizer
) -> tuple[dict[str, Any], param_mapping.Flat]:
    """Return content of config.json, and tensors by their names.

    Args:
      config: of the model.
      params: flat parameters of towers and `HEADS`.
      tokens: tokenizer of the model.

    Raises:
      UserError: a model that CLIPModel cannot represent.
    """
    model = config["model"]
    if not model["img"]["pre_norm"]:
        raise UserError("CLIPModel has a norm before the first block, model.img.pre_norm; write to 'open_clip'.")
    vocab, eot = tokens.vocab_size, tokens.eot_id
    if eot == _LEGACY_EOT:
        raise UserError(
            f"CLIPModel takes the end token's id {eot}, that of tokenizer {config['data']['tokenizer']!r}, for the "
            "largest id; write to 'open_clip'."
        )
    acts = {ours: theirs for theirs, ours in reversed(_ACTS.items())}

    def tower(group: Mapping[str, Any], modality: str) -> dict[str, Any]:
        return {
            "model_type": f"clip_{modality}_model", "hidden_size": group["width"],
            "intermediate_size": int(group["mlp_ratio"] * group["width"]), "num_hidden_layers": group["depth"],
            "num_attention_heads": group["heads"], "hidden_act": acts[group["act"]], "layer_norm_eps": group["eps"],
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
        | {"max_position_embeddings": model["txt"]["context_length"], "vocab_size": vocab, "eos_token_id": eot,
           "bos_token_id": tokens.sot_id, "pad_token_id": vocabulary.padding(tokens)},
        "dtype": "float32",
    }  # fmt: skip
    mappings = param_mapping.param_mappings(model, vocab, param_mapping.HF, HEADS)
    return content, param_mapping.write(params, mappings, "the model")


def beside(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {file: content} of the image processor and the tokenizer.

    Raises:
      UserError: preprocessing that CLIPImageProcessor does not have.
    """
    prepare, tokens = Preprocessing.from_dict(config, config["model"]["img"]["image_size"]), config["data"]["tokenizer"]
    if prepare.resize_mode == "longest":
        raise UserError("CLIPImageProcessor has no eval.resize='longest'; write to 'open_clip' or 'safetensors'.")
    side, size = prepare.resize_size or prepare.size, prepare.size
    squash = prepare.resize_mode == "squash"
    resample = {name: number for number, name in _INTERPOLATIONS.items()}[prepare.interpolation]
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": resample, "do_center_crop": not squash or side != size,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": prepare.mean, "image_std": prepare.std,
    }  # fmt: skip
    length = config["model"]["txt"]["context_length"]
    words = vocabulary.clip_files(length) if tokens == "clip" else vocabulary.own_files(tokens, length)
    return {PREPROCESSOR: json.dumps(processor, indent=2) + "\n"} | words
