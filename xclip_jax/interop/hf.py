"""Hugging Face transformers: folders of a CLIPModel."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.data import tokenizer
from xclip_jax.data.transforms import STATISTICS
from xclip_jax.errors import UserError
from xclip_jax.interop import groups, links
from xclip_jax.interop.files import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_LEGACY_EOT = 2  # of configs before 2023; CLIPModel then pools at the largest id
# What CLIPConfig leaves out of the file where it is the default.
_IMAGE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
}  # fmt: skip
_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "vocab_size": groups.CLIP_VOCAB, "eos_token_id": groups.CLIP_VOCAB - 1,
}  # fmt: skip
_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def read(
    found: Mapping[str, np.ndarray], folder: epath.Path, content: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], links.Flat]:
    """Config and flat parameters of a CLIPModel's tensors and config.json."""
    if content.get("model_type") != "clip":
        raise UserError(f"{where} is a model of type {content.get('model_type')!r}, which is not supported; 'clip' is.")
    cfg_img, cfg_txt = (
        defaults | _TOWER | {key: value for key, value in given.items() if value is not None}
        for defaults, given in ((_IMAGE, _given(content, "vision")), (_TEXT, _given(content, "text")))
    )
    if cfg_img["num_channels"] != 3:
        raise UserError(f"{where} takes images of {cfg_img['num_channels']} channels; towers here take 3.")

    def tower(cfg: Mapping[str, Any]) -> dict[str, Any]:
        if cfg["hidden_act"] not in _ACTS:
            raise UserError(f"{where}: hidden_act {cfg['hidden_act']!r} is not supported; {', '.join(_ACTS)} are.")
        width = cfg["hidden_size"]
        return {
            "width": width, "depth": cfg["num_hidden_layers"], "heads": cfg["num_attention_heads"],
            "mlp_ratio": groups.mlp_ratio(cfg["intermediate_size"], width), "act": _ACTS[cfg["hidden_act"]],
            "eps": cfg["layer_norm_eps"],
        }  # fmt: skip

    size, patch = (groups.square(cfg_img[key], f"vision_config.{key}", where) for key in ("image_size", "patch_size"))
    img = tower(cfg_img) | {"size": size, "patch": patch, "pre_norm": True}
    txt = tower(cfg_txt) | {"length": cfg_txt["max_position_embeddings"]}
    eot = cfg_txt["eos_token_id"]
    vocab = cfg_txt["vocab_size"]
    tokens = groups.tokens(folder, vocab, None if eot == _LEGACY_EOT else eot, where)
    found = {name: x for name, x in found.items() if not name.endswith("position_ids")}
    log_scale = float(found["logit_scale"].reshape(())) if "logit_scale" in found else 0.0
    model = groups.model(img, txt, content.get("projection_dim", 512), log_scale=log_scale, bias=None)
    flat = links.read(found, links.links(model, vocab, links.HF, bias=False), where)
    return groups.config(model, tokens, _statistics(folder), (), "hf", bias=False), flat


def _given(content: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    # Configs of 2022 have a second group, which counts where it is there.
    second = content.get(f"{kind}_config_dict")
    return (content.get(f"{kind}_config") or {}) if second is None else second


def _statistics(folder: epath.Path) -> str:
    for name, key in ((PREPROCESSOR, None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            content = read_json(folder / name)
            content = content.get(key) or {} if key else content
            return groups.statistics(content.get("image_mean"), content.get("image_std"), str(folder / name))
    return "clip"


def write(config: Mapping[str, Any], params: links.Flat, vocab: int, eot: int) -> tuple[dict[str, Any], links.Flat]:
    """Content of config.json and tensors.

    Raises:
      UserError: a model that CLIPModel cannot be.
    """
    model = config["model"]
    if not model["img"]["pre_norm"]:
        raise UserError("CLIPModel has a norm before the first block, model.img.pre_norm; write to 'open_clip'.")
    if eot == _LEGACY_EOT:
        raise UserError(
            f"CLIPModel takes the end token's id {eot}, that of tokenizer {config['data']['tokenizer']!r}, for the "
            "largest id; write to 'open_clip'."
        )
    acts = {ours: theirs for theirs, ours in reversed(_ACTS.items())}

    def tower(group: Mapping[str, Any], kind: str) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model", "hidden_size": group["width"],
            "intermediate_size": int(group["mlp_ratio"] * group["width"]), "num_hidden_layers": group["depth"],
            "num_attention_heads": group["heads"], "hidden_act": acts[group["act"]], "layer_norm_eps": group["eps"],
            "projection_dim": model["embed"],
        }  # fmt: skip

    clip = config["data"]["tokenizer"] == "clip"
    content = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed"],
        "logit_scale_init_value": float(params["log_scale"]),
        "vision_config": tower(model["img"], "vision")
        | {"image_size": model["img"]["size"], "patch_size": model["img"]["patch"], "num_channels": 3},
        "text_config": tower(model["txt"], "text")
        | {"max_position_embeddings": model["txt"]["length"], "vocab_size": vocab, "eos_token_id": eot,
           "bos_token_id": vocab - 2 if clip else None, "pad_token_id": eot if clip else None},
        "dtype": "float32",
    }  # fmt: skip
    params = {name: x for name, x in params.items() if name != "bias"}
    return content, links.write(params, links.links(model, vocab, links.HF, bias=False), "the model")


def write_beside(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """The image processor's file, and the tokenizer's where it is CLIP's."""
    size = config["model"]["img"]["size"]
    mean, std = STATISTICS[config["data"]["statistics"]]
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,  # Pillow's bicubic
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    (folder / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
    if config["data"]["tokenizer"] != "clip":
        return
    words, merges = tokenizer.clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {word: i for i, word in enumerate([*words, start, end])}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    options = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": config["model"]["txt"]["length"],
        "do_lower_case": True, **special,
    }  # fmt: skip
    contents = (
        json.dumps(vocab, ensure_ascii=False),
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        json.dumps(options, indent=2) + "\n",
        json.dumps(special, indent=2) + "\n",
    )
    for name, content in zip(TOKENIZER_FILES, contents, strict=True):
        (folder / name).write_text(content)
