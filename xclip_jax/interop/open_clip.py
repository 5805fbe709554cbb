"""Models of open_clip and OpenAI, which share names of tensors, and open_clip_config.json."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.data.transforms import RESIZE_MODES
from xclip_jax.interop import names, vocabulary
from xclip_jax.interop.names import Export, Flat, Names

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# For a tokenizer other than CLIP's: open_clip loads it from a local folder, or from the Hub's repository of this id.
HUB_ID = "REPOSITORY/ID"
_OWN_TOKENIZER = (
    "open_clip cleans texts before its tokenizer (broken encodings, HTML entities, white space), which the model's own "
    "does not; ids of other texts are equal",
    f"before it goes to the Hugging Face Hub, set text_cfg.hf_tokenizer_name in {CONFIG} to the repository's id",
)
# Extra entries of OpenAI's archives and of older versions of open_clip.
_IGNORED = ("input_resolution", "context_length", "vocab_size")
_IGNORED_ENDS = ("attn_mask", "position_ids")
# Supported options; all others must be unset.
_IMAGE = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "no_ln_pre",
          "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "attn_pooler_queries",
          "attn_pooler_heads", "pool_type", "pos_embed_type")  # fmt: skip
_TEXT = ("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width", "heads",
         "layers", "mlp_ratio", "pad_id", "eos_id", "final_ln_after_pool", "output_tokens", "act_kwargs",
         "norm_kwargs", "pool_type", "proj_type", "proj_bias")  # fmt: skip
_HARMLESS = ("timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "timm_model_pretrained")


def _clip(prefix: str = "", *, linear: bool = False) -> Names:
    """Names of OpenAI's CLIP and of open_clip, whose newer models have the `prefix` "text." in the text tower."""
    return Names(
        img={
            "patches": "visual.conv1", "positions": "visual.positional_embedding",
            "cls": "visual.class_embedding", "norm_pre": "visual.ln_pre", "norm_post": "visual.ln_post",
            "blocks": "visual.transformer.resblocks",
        },
        txt={
            "tokens": f"{prefix}token_embedding.weight", "positions": f"{prefix}positional_embedding",
            "norm_post": f"{prefix}ln_final", "blocks": f"{prefix}transformer.resblocks",
        },
        block={
            "norm_1": "ln_1", "qkv": ("attn.in_proj_",), "out": "attn.out_proj", "norm_2": "ln_2", "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        heads={
            "proj_img": "visual.proj", "log_scale": "logit_scale", "bias": "logit_bias",
            "proj_txt": f"{prefix}text_projection" + (".weight" if linear else ""),
        },
    )  # fmt: skip


HEADS = frozenset(_clip().heads)  # heads that its models can have
_TIMM = "visual.trunk."
_SIGLIP = dataclasses.replace(
    _clip("text.", linear=True),
    img={
        "patches": f"{_TIMM}patch_embed.proj", "positions": f"{_TIMM}pos_embed", "norm_post": f"{_TIMM}norm",
        "blocks": f"{_TIMM}blocks", "probe": f"{_TIMM}attn_pool.latent", "query": f"{_TIMM}attn_pool.q",
        "kv": f"{_TIMM}attn_pool.kv", "out": f"{_TIMM}attn_pool.proj", "norm": f"{_TIMM}attn_pool.norm",
        "up": f"{_TIMM}attn_pool.mlp.fc1", "down": f"{_TIMM}attn_pool.mlp.fc2",
    },
    img_block={"norm_1": "norm1", "qkv": ("attn.qkv.",), "out": "attn.proj", "norm_2": "norm2", "up": "mlp.fc1",
               "down": "mlp.fc2"},
)  # fmt: skip
# timm's names of SigLIP's image towers give the number of heads, and which of them have the tanh form of GELU.
_TIMM_NAME = r"vit_(base|large|so400m|giantopt)_patch\d+_siglip_\d+"
_TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
_TIMM_TANH = r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt_patch16).*"


def read(
    tensors: Mapping[str, np.ndarray], stored: str, folder: epath.Path, content: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Any], Flat]:
    """Return config and flat parameters of tensors with open_clip's names.

    Args:
      tensors: by their names.
      stored: form of the file, see `tensor_files.tensors`.
      folder: with the tokenizer, if there is one.
      content: of open_clip_config.json, or None: then sizes follow from shapes, as for OpenAI's weights.
      where: path of the weights, for errors.
    """
    if _is_siglip(content):
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
            notes.append(f"without {CONFIG} in its folder: heads are assumed to be 64 wide and activations to be {act}")
        activation: dict[str, Any] = {"act": act, "eps": 1e-5}
        img, txt = (sizes[key] | activation for key in ("img", "txt"))
        tokens = vocabulary.identify(folder, len(tensors[f"{prefix}token_embedding.weight"]), None, where)
    else:
        img, txt, embed, tokens, more = _from_config(content.get("model_cfg", content), folder, where)
        preprocess, notes = content.get("preprocess_cfg", {}), notes + more
    bias = float(tensors["logit_bias"].reshape(())) if "logit_bias" in tensors else None
    group = names.model(img, txt, embed, log_scale=float(tensors["logit_scale"].reshape(())), bias=bias)
    vocab = len(tensors[f"{prefix}token_embedding.weight"])
    projection = f"{prefix}text_projection.bias"
    if projection in tensors and not tensors[projection].any():
        tensors.pop(projection)
    prepare = _preprocessing(preprocess, img["image_size"], where)
    config = names.config(group, tokens, prepare, "open_clip", sigmoid=bias is not None, notes=notes)
    return config, names.read(tensors, group, vocab, _clip(prefix, linear=linear), where)


def _preprocessing(content: Mapping[str, Any], size: int, where: str) -> Preprocessing:
    """Return the preprocessing of preprocess_cfg; its `size` is ignored for the tower's, as in open_clip."""
    mode, interpolation = content.get("resize_mode") or "shortest", content.get("interpolation") or "bicubic"
    for key, value, known in (("resize_mode", mode, RESIZE_MODES),
                              ("interpolation", interpolation, ("bicubic", "bilinear", "random"))):  # fmt: skip
        if value not in known:
            raise UserError(f"{where}: preprocess_cfg sets {key}={value!r}; expected one of {', '.join(known)}.")
    if mode == "longest" and content.get("fill_color"):
        raise UserError(f"{where}: preprocess_cfg sets fill_color={content['fill_color']!r}; images are padded with 0.")
    # "random" is for training; open_clip evaluates it as "bicubic".
    interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
    mean, std = content.get("mean"), content.get("std")
    return names.preprocessing(size, mean, std, where, resize_mode=mode, interpolation=interpolation)


def _inferred(tensors: Mapping[str, np.ndarray], prefix: str, where: str) -> dict[str, dict[str, Any]]:
    """Infer the sizes of both towers from shapes."""

    def blocks(start: str) -> int:
        return len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})

    def tower(start: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise UserError(
                f"{where}: width {width} is not a multiple of 64, a head's width; put {CONFIG} into its folder."
            )
        ratio = names.mlp_ratio(len(tensors[f"{start}0.mlp.c_fc.weight"]), width)
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
        "image_size": names.square(vision.get("image_size", 224), "image_size", where),
        "patch": names.square(vision.get("patch_size", 16), "patch_size", where),
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


def _is_siglip(content: Mapping[str, Any] | None) -> bool:
    """Whether an open_clip_config.json describes a SigLIP."""
    model = (content or {}).get("model_cfg", content)
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    return isinstance(vision, Mapping) and bool(re.fullmatch(_TIMM_NAME, str(vision.get("timm_model_name"))))


def _read_siglip(
    tensors: Mapping[str, np.ndarray], folder: epath.Path, content: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Flat]:
    vision, text, embed = _groups(content.get("model_cfg", content), where)
    _check_known((("vision_cfg", vision, ("timm_model_name", "image_size")),
                  ("text_cfg", text, (*_TEXT, "no_causal_mask"))), where)  # fmt: skip
    for key, given, right in (
        ("timm_pool", vision.get("timm_pool"), "map"), ("timm_proj", vision.get("timm_proj"), "none"),
        ("pool_type", text.get("pool_type"), "last"), ("no_causal_mask", text.get("no_causal_mask"), True),
        ("proj_bias", text.get("proj_bias"), True),
    ):  # fmt: skip
        if given != right:
            raise UserError(f"{where} is not supported: a SigLIP with {key}={given!r}; expected {right!r}.")
    tensors = {name: x for name, x in tensors.items() if not name.endswith(_IGNORED_ENDS)}
    group = names.siglip(_timm_tower(tensors, vision, where), _text_tower(text, False), embed, tensors, where)
    clean = (text.get("tokenizer_kwargs") or {}).get("clean")
    if clean != "canonicalize":
        raise UserError(f"{where}: tokenizer_kwargs sets clean={clean!r}; expected 'canonicalize'.")
    vocab = text.get("vocab_size", vocabulary.CLIP_SIZE)
    tokens = vocabulary.siglip(folder, vocab, "canonical_spaces", where)
    prepare = _preprocessing(content.get("preprocess_cfg", {}), group["img"]["image_size"], where)
    config = names.config(group, tokens, prepare, "open_clip", sigmoid=True)
    return config, names.read(tensors, group, vocab, _SIGLIP, where)


def _timm_tower(tensors: Mapping[str, np.ndarray], vision: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Infer the options of SigLIP's image tower from shapes and from its name in timm."""
    name, blocks = vision["timm_model_name"], _SIGLIP.img["blocks"]
    needed = (f"{_SIGLIP.img['patches']}.weight", f"{blocks}.0.mlp.fc1.weight")
    if missing := [key for key, n in zip(needed, (4, 2), strict=True) if key not in tensors or tensors[key].ndim != n]:
        raise UserError(f"{where} is not the image tower {name!r}: it lacks {', '.join(missing)}.")
    patches, up = (tensors[key] for key in needed)
    size = re.search(r"siglip.*_(\d+)", name)
    return {
        "width": len(patches), "patch": patches.shape[-1],
        "depth": len({key.split(".")[3] for key in tensors if key.startswith(f"{blocks}.")}),
        "heads": _TIMM_HEADS[name.split("_")[1]], "mlp_ratio": names.mlp_ratio(len(up), len(patches)),
        "act": "gelu_tanh" if re.fullmatch(_TIMM_TANH, name) else "gelu", "eps": 1e-6,
        "image_size": names.square(vision.get("image_size") or int(size[1] if size else 0), "image_size", where),
    }  # fmt: skip


def write(config: Mapping[str, Any], params: Flat, tokens: Tokenizer, repository: str = "") -> Export:
    """Return a model as open_clip's.

    Args:
      config: config of the model.
      params: flat parameters of towers and of the `HEADS` that the model has.
      tokens: tokenizer of the model.
      repository: the model's id on the Hub, or "".

    Raises:
      UserError: a model that open_clip does not have.
    """
    model = config["model"]
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
    texts, notes = {}, []
    if tokens.name != "clip":
        text["hf_tokenizer_name"] = repository or HUB_ID
        texts = vocabulary.own_files(tokens.name, txt["context_length"])
        notes += _OWN_TOKENIZER[: 1 if repository else None]
    content = {"embed_dim": model["embed"], "quick_gelu": "quick_gelu" in acts, "vision_cfg": vision, "text_cfg": text}
    if "bias" in params:
        content["init_logit_bias"] = float(params["bias"])
    whole = {"model_cfg": content, "preprocess_cfg": _preprocess_cfg(config)}
    return Export(whole, names.write(params, model, vocab, _clip()), texts, notes)


def _preprocess_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Group "preprocess_cfg" of open_clip_config.json."""
    prepare = Preprocessing.from_dict(config, config["model"]["img"]["image_size"])
    if prepare.resize_size not in (0, prepare.size):
        raise UserError(
            f"open_clip has no size but {prepare.size} to resize images to, and eval.resize_size is "
            f"{prepare.resize_size}; write to 'hf' or 'safetensors'."
        )
    return {
        "size": prepare.size, "mean": prepare.mean, "std": prepare.std, "interpolation": prepare.interpolation,
        "resize_mode": prepare.resize_mode, "fill_color": 0,
    }  # fmt: skip
