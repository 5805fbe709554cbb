"""Models of open_clip and OpenAI, which share their tensor names, and open_clip_config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.transforms import RESIZE_MODES
from xclip_jax.interop import names, vocabulary
from xclip_jax.interop.names import Flat, Names
from xclip_jax.interop.tensor_files import OPENAI, json_text, read_json

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# Extra entries in OpenAI's archives and in weights by older versions of open_clip.
_IGNORED = (OPENAI, "context_length", "vocab_size")
_IGNORED_ENDS = ("attn_mask", "position_ids")
# Supported options; all other options must be unset.
_IMAGE = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
          "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "attn_pooler_queries",
          "attn_pooler_heads")  # fmt: skip
_TEXT = ("context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "mlp_ratio", "pad_id",
         "eos_id", "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "pool_type")  # fmt: skip
_HARMLESS = ("timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "timm_model_pretrained")


def _clip(prefix: str = "") -> Names:
    """Return the names in OpenAI's CLIP and open_clip, whose newer models have the `prefix` "text." for texts."""
    names: dict[str, str | tuple[str, ...]] = {
        "img/patches": "visual.conv1.", "img/positions": "visual.positional_embedding",
        "img/cls": "visual.class_embedding", "img/norm_pre/norm": "visual.ln_pre.",
        "img/norm_post/norm": "visual.ln_post.", "txt/tokens": f"{prefix}token_embedding.weight",
        "txt/positions": f"{prefix}positional_embedding", "txt/norm_post/norm": f"{prefix}ln_final.",
        "proj_img/linear/kernel": "visual.proj", "proj_txt/linear/kernel": f"{prefix}text_projection",
        "log_scale": "logit_scale", "bias": "logit_bias",
    }  # fmt: skip
    for tower, start in (("img", "visual."), ("txt", prefix)):
        for ours, theirs in (
            ("norm_1/norm", "ln_1."), ("attention/qkv", "attn.in_proj_"), ("attention/out", "attn.out_proj."),
            ("norm_2/norm", "ln_2."), ("mlp/up", "mlp.c_fc."), ("mlp/down", "mlp.c_proj."),
        ):  # fmt: skip
            names[f"{tower}/transformer/blocks/{ours}"] = f"{start}transformer.resblocks.{{}}.{theirs}"
    return names


HEADS = frozenset({"proj_img", "proj_txt", "log_scale", "bias"})  # heads that open_clip supports


def read(tensors: Mapping[str, np.ndarray], folder: epath.Path) -> tuple[dict[str, Any], Flat]:
    """Return config and flat parameters of tensors with open_clip's names.

    The folder's open_clip_config.json contains sizes and options. OpenAI's archives need none and ignore one: their
    sizes follow from shapes.
    """
    content: dict[str, Any] = {}
    notes: list[str] = []
    if (folder / CONFIG).exists() and OPENAI in tensors:
        notes = [f"{CONFIG} in its folder is ignored: OpenAI's archives need none"]
    elif (folder / CONFIG).exists():
        content = read_json(folder / CONFIG)
        content = content if "model_cfg" in content else {"model_cfg": content}
        _check_options(content["model_cfg"])
    if any(name.startswith(("visual.trunk.", "visual.layer1.", "visual.attn_pool.")) for name in tensors):
        raise UserError("it has a ResNet or a tower of timm; Vision Transformers with a class token are supported.")
    if not content and OPENAI not in tensors:
        raise UserError(f"it has no {CONFIG} in its folder, which contains sizes and options; put it there.")
    tensors = {name: x for name, x in tensors.items() if name not in _IGNORED and not name.endswith(_IGNORED_ENDS)}
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    vocab = len(tensors[f"{prefix}token_embedding.weight"])
    if content:
        img, txt, embed = _towers(content["model_cfg"])
        text = content["model_cfg"]["text_cfg"]
        eot = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
        tokens = vocabulary.identify(folder, text.get("vocab_size", vocabulary.CLIP_SIZE), eot, "open_clip")
        if tokens == "clip" and text.get("hf_tokenizer_name"):
            notes = [f"its tokenizer {text['hf_tokenizer_name']!r} is assumed to be CLIP's"]
    else:
        img, txt, embed = _inferred(tensors, prefix)
        tokens = vocabulary.identify(folder, vocab, None)
    group = names.model(img, txt, embed)
    prepare = _preprocessing(content.get("preprocess_cfg", {}), img["image_size"])
    config = names.config(group, tokens, prepare, "open_clip", sigmoid="logit_bias" in tensors, notes=notes)
    return config, names.read(tensors, group, vocab, _clip(prefix))


def _preprocessing(content: Mapping[str, Any], size: int) -> Preprocessing:
    """Return the preprocessing by preprocess_cfg; like in open_clip, the tower's size replaces its `size`."""
    mode = content.get("resize_mode") or "shortest"
    interpolation = content.get("interpolation") or "bicubic"
    check_choice("preprocess_cfg.resize_mode", mode, RESIZE_MODES)
    check_choice("preprocess_cfg.interpolation", interpolation, ("bicubic", "bilinear", "random"))
    # "random" is for training; open_clip evaluates it as "bicubic".
    interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
    return names.preprocessing(
        CONFIG, size, content.get("mean"), content.get("std"), resize_mode=mode, interpolation=interpolation
    )


def _inferred(tensors: Mapping[str, np.ndarray], prefix: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Infer the sizes of OpenAI's towers from shapes; their heads are 64 wide."""

    def tower(start: str, width: int) -> dict[str, Any]:
        depth = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})
        ratio = names.mlp_ratio(len(tensors[f"{start}0.mlp.c_fc.weight"]), width)
        return {"width": width, "depth": depth, "heads": width // 64, "mlp_ratio": ratio, "style": "openai"}

    conv = tensors["visual.conv1.weight"]
    texts = tensors[f"{prefix}positional_embedding"]
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    img = {"patch": conv.shape[-1], "image_size": grid * conv.shape[-1]}
    return (
        tower("visual.transformer.resblocks.", len(conv)) | img,
        tower(f"{prefix}transformer.resblocks.", texts.shape[1]) | {"context_length": len(texts)},
        tensors["visual.proj"].shape[1],
    )


def _check_options(content: Mapping[str, Any]) -> None:
    """Raise `UserError` if model_cfg sets other options than `_IMAGE` and `_TEXT`, or unsupported pools."""
    pools = {"vision_cfg.pool_type": "tok", "vision_cfg.pos_embed_type": "learnable", "text_cfg.proj_type": "linear"}
    for group, known in (("vision_cfg", _IMAGE), ("text_cfg", _TEXT)):
        for key, value in content[group].items():
            name = f"{group}.{key}"
            if name in pools:
                check_choice(f"{CONFIG}: {name}", value, (pools[name],))
            elif value and key not in known and key not in _HARMLESS:
                raise UserError(f"{CONFIG} sets {name}={value!r}, which is not supported.")
    check_choice(f"{CONFIG}: text_cfg.pool_type", content["text_cfg"].get("pool_type", "argmax"), ("argmax", "eos"))


def _towers(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:

    def tower(cfg: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        approximate = (cfg.get("act_kwargs") or {}).get("approximate", "none")
        act = "quick_gelu" if content.get("quick_gelu") else {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
        return {
            "width": width, "depth": cfg.get("layers", 12), "heads": heads, "mlp_ratio": cfg.get("mlp_ratio", 4.0),
            "style": names.find_style(act, (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)),
        }  # fmt: skip

    vision, text = content["vision_cfg"], content["text_cfg"]
    width = vision.get("width", 768)
    img = {"image_size": vision.get("image_size", 224), "patch": vision.get("patch_size", 16)}
    img |= tower(vision, width, width // vision.get("head_width", 64))
    txt = {"context_length": text.get("context_length", 77)}
    txt |= tower(text, text.get("width", 512), text.get("heads", 8))
    return img, txt, content["embed_dim"]


def write(config: Mapping[str, Any], params: Flat) -> tuple[Flat, dict[str, str]]:
    """Return tensors, and texts of files, of a model with CLIP's tokenizer in open_clip's format.

    `params` are flat. A `UserError` names features without support in open_clip.
    """
    model = config["model"]
    vocab = vocabulary.CLIP_SIZE
    img, txt = model["img"], model["txt"]
    prepare = Preprocessing.from_dict(config, img["image_size"])
    styles = {tower["style"] for tower in (img, txt)}
    fault = ""
    if "openai" in styles and len(styles) > 1:
        fault = f"one kind of GELU for both towers; their styles are {img['style']!r} and {txt['style']!r}"
    elif prepare.resize_size not in (0, prepare.size):
        fault = f"no size but {prepare.size} to resize images to, and eval.resize_size is {prepare.resize_size}"
    if fault:
        raise UserError(f"open_clip has {fault}; write to 'hf' or 'safetensors'.")

    def options(tower: Mapping[str, Any]) -> dict[str, Any]:
        cfg: dict[str, Any] = {"width": tower["width"], "layers": tower["depth"], "mlp_ratio": tower["mlp_ratio"]}
        if tower["style"] == "tanh":
            cfg["act_kwargs"] = {"approximate": "tanh"}
        return cfg

    vision = options(img) | {
        "image_size": img["image_size"], "patch_size": img["patch"], "head_width": img["width"] // img["heads"],
    }  # fmt: skip
    text = options(txt) | {"context_length": txt["context_length"], "vocab_size": vocab, "heads": txt["heads"]}
    content = {"embed_dim": model["embed"], "quick_gelu": "openai" in styles, "vision_cfg": vision, "text_cfg": text}
    if "bias" in params:
        content["init_logit_bias"] = float(params["bias"])
    preprocess = {
        "size": prepare.size, "mean": prepare.mean, "std": prepare.std, "interpolation": prepare.interpolation,
        "resize_mode": prepare.resize_mode, "fill_color": 0,
    }  # fmt: skip
    whole = {"model_cfg": content, "preprocess_cfg": preprocess}
    return names.write(params, model, vocab, _clip()), {CONFIG: json_text(whole)}
