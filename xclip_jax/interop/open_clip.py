"""open_clip's models, and OpenAI's, whose names it keeps: tensors and open_clip_config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.data.transforms import RESIZE_MODES
from xclip_jax.interop import config_mapping, param_mapping, siglip, vocabulary

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
HEADS = frozenset(param_mapping.open_clip().heads)  # that its models can have
# Value for a tokenizer of its own: open_clip loads it from a local folder, or from the Hub's repository of this id.
HUB_ID = "REPOSITORY/ID"
OWN_TOKENIZER = (
    "open_clip cleans texts before its tokenizer (broken encodings, HTML entities, white space), which the model's own "
    "does not; ids of other texts are equal",
    f"before it goes to the Hugging Face Hub, set text_cfg.hf_tokenizer_name in {CONFIG} to the repository's id",
)
# Extra entries of OpenAI's archives and of older versions of open_clip.
_IGNORED = ("input_resolution", "context_length", "vocab_size")
_IGNORED_ENDS = ("attn_mask", "position_ids")
# Supported options; any other that is set is an error.
_IMAGE = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "no_ln_pre",
          "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "attn_pooler_queries",
          "attn_pooler_heads", "pool_type", "pos_embed_type")  # fmt: skip
_TEXT = ("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width", "heads",
         "layers", "mlp_ratio", "pad_id", "eos_id", "final_ln_after_pool", "output_tokens", "act_kwargs",
         "norm_kwargs", "pool_type", "proj_type", "proj_bias")  # fmt: skip
_HARMLESS = ("timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "timm_model_pretrained")


def read(
    tensors: Mapping[str, np.ndarray], stored: str, folder: epath.Path, content: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Any], param_mapping.Flat]:
    """Return config and flat parameters of tensors with open_clip's names.

    Args:
      tensors: by their names.
      stored: form of the file, see `tensor_files.tensors`.
      folder: with the tokenizer, if there is one.
      content: of open_clip_config.json, or None: then sizes follow from shapes, as for OpenAI's weights.
      where: path of the weights, for errors.
    """
    if siglip.is_open_clip(content):
        return _read_siglip(tensors, folder, content or {}, where)
    for start, what in (("visual.trunk.", "an image tower of timm"), ("visual.layer1.", "a ResNet"),
                        ("visual.attn_pool.", "attention pooling of images"), ("text.transformer.embeddings.",
                        "a text tower of transformers"), ("visual.head.", "an image tower of timm")):  # fmt: skip
        if any(name.startswith(start) for name in tensors):
            raise UserError(f"{where} has {what}, which is not supported; Vision Transformers with a class token are.")
    script = stored == "script" or "input_resolution" in tensors
    tensors = {name: x for name, x in tensors.items() if name not in _IGNORED and not name.endswith(_IGNORED_ENDS)}
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    linear = f"{prefix}text_projection.weight" in tensors
    needed = ("visual.conv1.weight", "visual.positional_embedding", f"{prefix}token_embedding.weight",
              f"{prefix}positional_embedding", f"{prefix}transformer.resblocks.0.mlp.c_fc.weight",
              "visual.transformer.resblocks.0.mlp.c_fc.weight", "logit_scale", "visual.proj")  # fmt: skip
    if missing := [name for name in needed if name not in tensors]:
        raise UserError(f"{where} is not a CLIP with both towers and projections: it lacks {', '.join(missing)}.")
    notes: list[str] = []
    if content is None:
        sizes, embed = _inferred(tensors, prefix, where), tensors["visual.proj"].shape[1]
        act, preprocess = "quick_gelu", {}
        if not script:
            act = "gelu" if stored == "checkpoint" else act
            notes.append(f"without {CONFIG} beside it: heads are assumed to be 64 wide and activations to be {act}")
        activation: dict[str, Any] = {"act": act, "eps": 1e-5}
        img, txt = (sizes[key] | activation for key in ("img", "txt"))
        tokens = vocabulary.identify(folder, len(tensors[f"{prefix}token_embedding.weight"]), None, where)
    else:
        img, txt, embed, tokens, more = _from_config(content.get("model_cfg", content), folder, where)
        preprocess, notes = content.get("preprocess_cfg", {}), notes + more
    bias = float(tensors["logit_bias"].reshape(())) if "logit_bias" in tensors else None
    model = config_mapping.model(img, txt, embed, log_scale=float(tensors["logit_scale"].reshape(())), bias=bias)
    vocab = len(tensors[f"{prefix}token_embedding.weight"])
    names, heads = param_mapping.open_clip(prefix, linear=linear), HEADS if bias is not None else HEADS - {"bias"}
    mappings = param_mapping.param_mappings(model, vocab, names, heads)
    projection = f"{prefix}text_projection.bias"
    if projection in tensors and not tensors[projection].any():
        tensors.pop(projection)
    prepare = _preprocessing(preprocess, img["image_size"], where)
    config = config_mapping.config(model, tokens, prepare, notes, "open_clip", heads)
    return config, param_mapping.read(tensors, mappings, where)


def _preprocessing(content: Mapping[str, Any], size: int, where: str) -> Preprocessing:
    """Preprocessing of preprocess_cfg, whose own `size` open_clip ignores too: it uses the tower's."""
    mode, interpolation = content.get("resize_mode") or "shortest", content.get("interpolation") or "bicubic"
    for key, value, known in (("resize_mode", mode, RESIZE_MODES),
                              ("interpolation", interpolation, ("bicubic", "bilinear", "random"))):  # fmt: skip
        if value not in known:
            raise UserError(f"{where}: preprocess_cfg sets {key}={value!r}; expected one of {', '.join(known)}.")
    if mode == "longest" and content.get("fill_color"):
        raise UserError(f"{where}: preprocess_cfg sets fill_color={content['fill_color']!r}; images are padded with 0.")
    # "random" is of training; open_clip evaluates it as "bicubic".
    interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
    mean, std = content.get("mean"), content.get("std")
    return config_mapping.preprocessing(size, mean, std, where, resize_mode=mode, interpolation=interpolation)


def _inferred(tensors: Mapping[str, np.ndarray], prefix: str, where: str) -> dict[str, dict[str, Any]]:
    """Infer the sizes of both towers from shapes."""

    def blocks(start: str) -> int:
        return len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})

    def tower(start: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise UserError(f"{where}: width {width} is not a multiple of 64, a head's width; put {CONFIG} beside it.")
        ratio = config_mapping.mlp_ratio(len(tensors[f"{start}0.mlp.c_fc.weight"]), width)
        return {"width": width, "depth": blocks(start), "heads": width // 64, "mlp_ratio": ratio}

    conv, texts = tensors["visual.conv1.weight"], tensors[f"{prefix}positional_embedding"]
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    img = {"patch": conv.shape[-1], "image_size": grid * conv.shape[-1], "pre_norm": "visual.ln_pre.weight" in tensors}
    return {
        "img": tower("visual.transformer.resblocks.", len(conv)) | img,
        "txt": tower(f"{prefix}transformer.resblocks.", texts.shape[1]) | {"context_length": len(texts)},
    }


def _groups(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    try:
        return dict(content["vision_cfg"]), dict(content["text_cfg"]), content["embed_dim"]
    except KeyError as error:
        raise UserError(f"{where}: {CONFIG} has no {error}; download it again.") from error


def _check_known(groups: Sequence[tuple[str, Mapping[str, Any], Sequence[str]]], where: str) -> None:
    for group, cfg, known in groups:
        unknown = [f"{group}.{key}={value!r}" for key, value in cfg.items()
                   if value and key not in known and key not in _HARMLESS]  # fmt: skip
        if unknown:
            raise UserError(f"{where} is not supported: {CONFIG} sets {', '.join(unknown)}.")


def _from_config(
    content: Mapping[str, Any], folder: epath.Path, where: str
) -> tuple[dict[str, Any], dict[str, Any], int, str, list[str]]:
    vision, text, embed = _groups(content, where)
    _check_known((("vision_cfg", vision, _IMAGE), ("text_cfg", text, _TEXT)), where)
    for key, cfg, right in (("pool_type", vision, ("tok",)), ("pos_embed_type", vision, ("learnable",)),
                            ("pool_type", text, ("argmax", "eos")), ("proj_type", text, ("linear",))):  # fmt: skip
        if cfg.get(key, right[0]) not in right:
            raise UserError(f"{where} is not supported: {CONFIG} sets {key}={cfg[key]!r}; expected {right[0]!r}.")
    if isinstance(vision.get("layers"), list):
        raise UserError(f"{where} has a ResNet, which is not supported; Vision Transformers with a class token are.")
    quick = content.get("quick_gelu", False)
    width = vision.get("width", 768)
    img = _tower(vision, width, width // vision.get("head_width", 64), quick) | {
        "image_size": config_mapping.square(vision.get("image_size", 224), "image_size", where),
        "patch": config_mapping.square(vision.get("patch_size", 16), "patch_size", where),
        "pre_norm": not vision.get("no_ln_pre", False),
    }
    txt = _text_tower(text, quick)
    vocab, eot = text.get("vocab_size", vocabulary.CLIP_SIZE), None
    if text.get("pool_type", "argmax") == "eos":
        eot = text.get("eos_id", 2)
    tokens = vocabulary.identify(folder, vocab, eot, where)
    notes = []
    if tokens != "clip":
        notes.append("open_clip cleans texts before this tokenizer (HTML entities, white space); xclip_jax does not")
    if text.get("tokenizer_kwargs"):
        notes.append(f"its tokenizer's options {text['tokenizer_kwargs']} are ignored")
    if text.get("hf_tokenizer_name") and tokens == "clip":
        notes.append(f"its tokenizer {text['hf_tokenizer_name']!r} is assumed to be CLIP's")
    return img, txt, embed, tokens, notes


def _tower(cfg: Mapping[str, Any], width: int, heads: int, quick: bool) -> dict[str, Any]:
    approximate = (cfg.get("act_kwargs") or {}).get("approximate", "none")
    act = "quick_gelu" if quick else {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    return {
        "width": width, "depth": cfg.get("layers", 12), "heads": heads, "mlp_ratio": cfg.get("mlp_ratio", 4.0),
        "act": act, "eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
    }  # fmt: skip


def _text_tower(cfg: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    tower = _tower(cfg, cfg.get("width", 512), cfg.get("heads", 8), quick)
    return tower | {"context_length": cfg.get("context_length", 77)}


def _read_siglip(
    tensors: Mapping[str, np.ndarray], folder: epath.Path, content: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], param_mapping.Flat]:
    cfg = content.get("model_cfg", content)
    vision, text, embed = _groups(cfg, where)
    _check_known((("vision_cfg", vision, ("timm_model_name", "image_size")),
                  ("text_cfg", text, (*_TEXT, "no_causal_mask"))), where)  # fmt: skip
    tensors = {name: x for name, x in tensors.items() if not name.endswith(_IGNORED_ENDS)}
    options = {"vocab_size": vocabulary.CLIP_SIZE} | text | {"embed_dim": embed}
    model, tokens, flat = siglip.read_open_clip(tensors, folder, vision, _text_tower(text, False), options, where)
    prepare = _preprocessing(content.get("preprocess_cfg", {}), model["img"]["image_size"], where)
    return config_mapping.config(model, tokens, prepare, (), "open_clip", siglip.HEADS), flat


def write(
    config: Mapping[str, Any], params: param_mapping.Flat, tokens: Tokenizer, repository: str = ""
) -> tuple[dict[str, Any], param_mapping.Flat]:
    """Return content of open_clip_config.json, and tensors by their names.

    Args:
      config: of the model.
      params: flat parameters of towers and those of `HEADS` that the model has.
      tokens: tokenizer of the model.
      repository: the model's id on the Hub, or "".

    Raises:
      UserError: a model that open_clip does not have.
    """
    model, heads = config["model"], HEADS if "bias" in params else HEADS - {"bias"}
    vocab, eot = tokens.vocab_size, tokens.eot_id
    img, txt = model["img"], model["txt"]
    acts = {tower["act"] for tower in (img, txt)}
    if "quick_gelu" in acts and len(acts) > 1:
        raise UserError(
            f"open_clip has one kind of GELU for both towers, not {img['act']!r} and {txt['act']!r}; write to 'hf' or "
            "'safetensors'."
        )

    def options(tower: Mapping[str, Any]) -> dict[str, Any]:
        cfg: dict[str, Any] = {"width": tower["width"], "layers": tower["depth"], "mlp_ratio": tower["mlp_ratio"]}
        if tower["eps"] != 1e-5:
            cfg["norm_kwargs"] = {"eps": tower["eps"]}
        if tower["act"] == "gelu_tanh":
            cfg["act_kwargs"] = {"approximate": "tanh"}
        return cfg

    vision = options(img) | {
        "image_size": img["image_size"], "patch_size": img["patch"], "head_width": img["width"] // img["heads"],
    }  # fmt: skip
    if not img["pre_norm"]:
        vision["no_ln_pre"] = True
    text = options(txt) | {"context_length": txt["context_length"], "vocab_size": vocab, "heads": txt["heads"]}
    if eot != vocab - 1:
        text |= {"pool_type": "eos", "eos_id": eot}
    if tokens.name != "clip":
        text["hf_tokenizer_name"] = repository or HUB_ID
    content = {"embed_dim": model["embed"], "quick_gelu": "quick_gelu" in acts, "vision_cfg": vision, "text_cfg": text}
    if "bias" in heads:
        content["init_logit_bias"] = float(params["bias"])
    prepare = Preprocessing.from_dict(config, config["model"]["img"]["image_size"])
    if prepare.resize_size not in (0, prepare.size):
        raise UserError(
            f"open_clip has no size but {prepare.size} to resize images to, and eval.resize_size is "
            f"{prepare.resize_size}; write to 'hf' or 'safetensors'."
        )
    preprocess = {
        "size": prepare.size, "mean": prepare.mean, "std": prepare.std, "interpolation": prepare.interpolation,
        "resize_mode": prepare.resize_mode, "fill_color": 0,
    }  # fmt: skip
    mappings = param_mapping.param_mappings(model, vocab, param_mapping.open_clip(), heads)
    return {"model_cfg": content, "preprocess_cfg": preprocess}, param_mapping.write(params, mappings, "the model")
