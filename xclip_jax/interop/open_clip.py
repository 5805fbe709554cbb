"""Models of open_clip and OpenAI, which share their tensor names, and open_clip_config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.data.transforms import RESIZE_MODES
from xclip_jax.interop import names, vocabulary
from xclip_jax.interop.names import Export, Flat, Names
from xclip_jax.interop.tensor_files import OPENAI

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# Placeholder for the Hub repository from which open_clip loads other tokenizers than CLIP's.
HUB_ID = "REPOSITORY/ID"
_OWN_TOKENIZER = (
    "open_clip cleans texts before its tokenizer (broken encodings, HTML entities, white space), which the model's own "
    "does not; ids of other texts are equal",
    f"before it goes to the Hugging Face Hub, set text_cfg.hf_tokenizer_name in {CONFIG} to the repository's id",
)
# Extra entries in OpenAI's archives and in weights by older versions of open_clip.
_IGNORED = (OPENAI, "context_length", "vocab_size")
_IGNORED_ENDS = ("attn_mask", "position_ids")
# Supported options; all other options must be unset.
_IMAGE = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "no_ln_pre",
          "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "attn_pooler_queries",
          "attn_pooler_heads", "pool_type", "pos_embed_type")  # fmt: skip
_TEXT = ("context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "mlp_ratio", "pad_id",
         "eos_id", "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs", "pool_type", "proj_type",
         "proj_bias")  # fmt: skip
# Keys of towers that tensors do not determine.
_WITHOUT_SHAPE = ("style", "heads")
_HARMLESS = ("timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "timm_model_pretrained")


def _clip(prefix: str = "", *, linear: bool = False) -> Names:
    """Return the names in OpenAI's CLIP and open_clip, whose newer models have the `prefix` "text." for texts."""
    names: dict[str, str | tuple[str, ...]] = {
        "img/patches": "visual.conv1.", "img/positions": "visual.positional_embedding",
        "img/cls": "visual.class_embedding", "img/norm_pre/norm": "visual.ln_pre.",
        "img/norm_post/norm": "visual.ln_post.", "txt/tokens": f"{prefix}token_embedding.weight",
        "txt/positions": f"{prefix}positional_embedding", "txt/norm_post/norm": f"{prefix}ln_final.",
        "proj_img/linear/kernel": "visual.proj", "log_scale": "logit_scale", "bias": "logit_bias",
    }  # fmt: skip
    text = f"{prefix}text_projection"
    names |= {"proj_txt/linear": f"{text}."} if linear else {"proj_txt/linear/kernel": text}
    for tower, start in (("img", "visual."), ("txt", prefix)):
        for ours, theirs in (
            ("norm_1/norm", "ln_1."), ("attention/qkv", "attn.in_proj_"), ("attention/out", "attn.out_proj."),
            ("norm_2/norm", "ln_2."), ("mlp/up", "mlp.c_fc."), ("mlp/down", "mlp.c_proj."),
        ):  # fmt: skip
            names[f"{tower}/transformer/blocks/{ours}"] = f"{start}transformer.resblocks.{{}}.{theirs}"
    return names


HEADS = frozenset({"proj_img", "proj_txt", "log_scale", "bias"})  # heads that open_clip supports


def read(
    tensors: Mapping[str, np.ndarray], folder: epath.Path, content: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Any], Flat]:
    """Return config and flat parameters of tensors with open_clip's names.

    `content` is the folder's open_clip_config.json, or None for OpenAI's archives, whose sizes follow from shapes. If
    the config next to an archive belongs to another model, it is ignored.
    """
    model_cfg: Any = content and content.get("model_cfg", content)
    if content is not None:
        vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
        pool = "eos" if text.get("pool_type") == "eos" else "argmax"
        _check_known("vision_cfg", vision, _IMAGE, where, pool_type="tok", pos_embed_type="learnable")
        _check_known("text_cfg", text, _TEXT, where, pool_type=pool, proj_type="linear")
    if any(name.startswith(("visual.trunk.", "visual.layer1.", "visual.attn_pool.")) for name in tensors):
        raise UserError(
            f"{where} has a ResNet or a tower of timm; Vision Transformers with a class token are supported."
        )
    if content is None and OPENAI not in tensors:
        raise UserError(f"{where} has no {CONFIG} in its folder, which contains sizes and options; put it there.")
    archive = tensors.get(OPENAI)
    tensors = {name: x for name, x in tensors.items() if name not in _IGNORED and not name.endswith(_IGNORED_ENDS)}
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    linear = f"{prefix}text_projection.weight" in tensors
    vocab = len(tensors[f"{prefix}token_embedding.weight"])
    notes: list[str] = []
    if content is not None and archive is not None:
        notes = _contradiction(model_cfg, tensors, prefix, where, openai=bool(archive))
    if content is None or notes:
        content = None
        img, txt, embed = _inferred(tensors, prefix)
        tokens = vocabulary.identify(folder, vocab, None, where)
    else:
        img, txt, embed = _towers(model_cfg, where)
        tokens, notes = _tokens(model_cfg, folder, where)
    group = names.model(img, txt, embed)
    projection = f"{prefix}text_projection.bias"
    if projection in tensors and not tensors[projection].any():
        tensors.pop(projection)
    prepare = _preprocessing((content or {}).get("preprocess_cfg", {}), img["image_size"], where)
    config = names.config(group, tokens, prepare, "open_clip", sigmoid="logit_bias" in tensors, notes=notes)
    return config, names.read(tensors, group, vocab, _clip(prefix, linear=linear), where)


def _preprocessing(content: Mapping[str, Any], size: int, where: str) -> Preprocessing:
    """Return the preprocessing by preprocess_cfg; like in open_clip, the tower's size replaces its `size`."""
    mode = content.get("resize_mode") or "shortest"
    interpolation = content.get("interpolation") or "bicubic"
    check_choice(f"{where}: preprocess_cfg.resize_mode", mode, RESIZE_MODES)
    check_choice(f"{where}: preprocess_cfg.interpolation", interpolation, ("bicubic", "bilinear", "random"))
    # "random" is for training; open_clip evaluates it as "bicubic".
    interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
    return names.preprocessing(
        size, content.get("mean"), content.get("std"), where, resize_mode=mode, interpolation=interpolation
    )


def _contradiction(
    content: Mapping[str, Any], tensors: Mapping[str, np.ndarray], prefix: str, where: str, *, openai: bool
) -> list[str]:
    """Return a note if a config does not belong to an archive.

    Shapes decide, and for OpenAI's archives also the options that shapes do not determine.
    """

    def sizes(towers: tuple[dict[str, Any], dict[str, Any], int], vocab: int) -> dict[str, Any]:
        by_name: dict[str, Any] = {"embed_dim": towers[2], "text vocab_size": vocab}
        for name, tower in zip(("vision", "text"), towers[:2], strict=True):
            ratio = tower.pop("mlp_ratio")
            tower["hidden width"] = int(ratio * tower["width"])  # configs round the ratio
            by_name |= {f"{name} {key}": value for key, value in tower.items()}
        return by_name

    stated = sizes(_towers(content, where), content["text_cfg"].get("vocab_size", vocabulary.CLIP_SIZE))
    stored = sizes(_inferred(tensors, prefix), len(tensors[f"{prefix}token_embedding.weight"]))
    unseen = () if openai else _WITHOUT_SHAPE
    for key, value in stored.items():
        if stated[key] != value and not key.endswith(unseen):
            return [f"{CONFIG} in its folder belongs to another model and is ignored: {key} {stated[key]}, not {value}"]
    return []


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


def _check_known(group: str, cfg: Mapping[str, Any], known: Sequence[str], where: str, **right: Any) -> None:
    """Check that a group sets only options in `known` and `right`, and the latter only to their values in `right`."""
    wrong = [key for key, value in cfg.items() if value and key not in (*known, *right, *_HARMLESS)]
    wrong += [key for key, value in right.items() if cfg.get(key, value) != value]
    if wrong:
        key = wrong[0]
        expected = f"; expected {right[key]!r}" if key in right else ""
        raise UserError(f"{where} is not supported: {CONFIG} sets {group}.{key}={cfg[key]!r}{expected}.")


def _towers(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return both towers and the embedding size in model_cfg."""
    vision, text = content["vision_cfg"], content["text_cfg"]
    quick = content.get("quick_gelu", False)
    width = vision.get("width", 768)
    pre_norm = not vision.get("no_ln_pre", False)
    img = _tower(vision, width, width // vision.get("head_width", 64), quick, where, pre_norm=pre_norm) | {
        "image_size": names.square(vision.get("image_size", 224), "image_size", where),
        "patch": names.square(vision.get("patch_size", 16), "patch_size", where),
    }
    txt = _tower(text, text.get("width", 512), text.get("heads", 8), quick, where)
    txt["context_length"] = text.get("context_length", 77)
    return img, txt, content["embed_dim"]


def _tokens(content: Mapping[str, Any], folder: epath.Path, where: str) -> tuple[str, list[str]]:
    """Return the tokenizer by model_cfg, and notes about it."""
    text = content["text_cfg"]
    vocab = text.get("vocab_size", vocabulary.CLIP_SIZE)
    eot = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
    tokens = vocabulary.identify(folder, vocab, eot, where)
    if tokens != "clip":
        return tokens, ["open_clip cleans texts before this tokenizer (HTML entities, white space); xclip_jax does not"]
    named = text.get("hf_tokenizer_name")
    return tokens, [f"its tokenizer {named!r} is assumed to be CLIP's"] if named else []


def _tower(
    cfg: Mapping[str, Any], width: int, heads: int, quick: bool, where: str, *, pre_norm: bool = True
) -> dict[str, Any]:
    approximate = (cfg.get("act_kwargs") or {}).get("approximate", "none")
    act = "quick_gelu" if quick else {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    return {
        "width": width, "depth": cfg.get("layers", 12), "heads": heads, "mlp_ratio": cfg.get("mlp_ratio", 4.0),
        "style": names.find_style(act, (cfg.get("norm_kwargs") or {}).get("eps", 1e-5), where, pre_norm=pre_norm),
    }  # fmt: skip


def write(config: Mapping[str, Any], params: Flat, tokens: Tokenizer, repository: str = "") -> Export:
    """Return a model in open_clip's format, from its flat parameters; `repository` is its id on the Hub, or "".

    A `UserError` names features without support in open_clip.
    """
    model = config["model"]
    vocab = tokens.vocab_size
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
    if tokens.eot_id != vocab - 1:
        text |= {"pool_type": "eos", "eos_id": tokens.eot_id}
    texts, notes = {}, []
    if tokens.name != "clip":
        text["hf_tokenizer_name"] = repository or HUB_ID
        texts = vocabulary.own_files(tokens.name, txt["context_length"])
        notes += _OWN_TOKENIZER[: 1 if repository else None]
    content = {"embed_dim": model["embed"], "quick_gelu": "openai" in styles, "vision_cfg": vision, "text_cfg": text}
    if "bias" in params:
        content["init_logit_bias"] = float(params["bias"])
    preprocess = {
        "size": prepare.size, "mean": prepare.mean, "std": prepare.std, "interpolation": prepare.interpolation,
        "resize_mode": prepare.resize_mode, "fill_color": 0,
    }  # fmt: skip
    whole = {"model_cfg": content, "preprocess_cfg": preprocess}
    return Export(whole, names.write(params, model, vocab, _clip()), texts, notes)
