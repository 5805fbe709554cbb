"""What all configs share: the string argument, and the groups of keys with their defaults."""

import difflib
from typing import Any

import ml_collections

from xclip_jax.errors import UserError
from xclip_jax.models.two_towers import preset
from xclip_jax.objective import OBJECTIVES


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """"a=1,b=x" -> ConfigDict of `defaults` with these values, each of its default's type; unknown keys raise."""
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
            raise UserError(f"config argument {key!r} is unknown; did you mean {near!r}? Known: {', '.join(defaults)}.")
        kind = type(defaults[key])
        try:
            values[key] = text.lower() in ("", "1", "true", "yes") if kind is bool else kind(text)
        except ValueError as error:
            raise UserError(f"config argument {key}={text!r} must be of type {kind.__name__}.") from error
    if values.get("objective", "clip") not in OBJECTIVES:
        raise UserError(f"config argument objective={values['objective']!r} must be one of {', '.join(OBJECTIVES)}.")
    return ml_collections.ConfigDict(values)


def base(objective: str, size: str) -> ml_collections.ConfigDict:
    """Every group and every key, with the full-size recipe's values and the towers of preset `size`.

    The recipe is SLIP's (arXiv 2112.12750), the public baseline for pre-training on tens of millions of pairs.
    """
    sizes = preset(size)
    sigmoid = objective == "siglip"
    tower = {"mlp_ratio": 4.0, "act": "gelu", "eps": 1e-5, "scan": True, "remat": "none"}
    options = {"stem": "linear", "pool": "cls", "pre_norm": True, "patch_dropout": 0.0, "drop_path": 0.0}
    img = tower | {"size": 224} | options | sizes["img"]
    return ml_collections.ConfigDict({
        "run": f"runs/{objective}-{size.replace('/', '')}",  # the run's folder
        "seed": 0,
        "steps": 0,
        "init": {"weights": "", "frozen": ()},  # what a new run starts from; towers that get no update
        "mesh": {"data": -1, "fsdp": 1, "model": 1, "strategy": "dp"},
        "model": {
            "img": img,
            "txt": tower | {"length": 77} | sizes["txt"],
            "embed": sizes["embed"],
            "scale_init": 10.0 if sigmoid else 1 / 0.07,
            "bias_init": -10.0,  # of the sigmoid loss alone
            "cluster_head": {"clusters": 32768, "hidden": 4096, "layers": 1, "last_norm": False},
            "dtype": "bfloat16",
        },
        "objective": {
            "name": objective,
            "w_clip": 0.3,
            "w_nclip": 0.7,
            "nclip": {
                "target": "detach",
                "tau": 1.0,
                "target_tau": 0.0,
                "sharpness": 1.0,
                "smoothness": 2.0,
                "balance": "none",
                "center_momentum": 0.9,
            },
            # Of fine-tuning, configs/finetune.py.
            "classify": {
                "tower": "img", "classes": 0, "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "head_std": 2e-5,
            },
        },
        "optim": {
            "lr": 5e-4,
            "schedule": "cosine",
            "warmup": 0,
            "lr_start": 1e-6,
            "lr_end": 1e-5,
            "weight_decay": 0.5,
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "layer_decay": 1.0,
            "clip": 0.0,
            "mu_dtype": "float32",
            "microbatches": 1,
        },
        "loss": {"impl": "plain", "chunk": 0},
        "ema": {"on": False, "momentum": 0.996, "schedule": "cosine"},
        "data": {
            "sources": (),
            "weights": (),
            "apart": False,
            "dir": "",
            "batch": 4096,
            "tokenizer": "clip",
            "image_key": "image",
            "text_keys": ("text",),
            "tags_key": "",
            "tags": 0,
            "tags_behind": 0.5,
            "tags_alone": 0.0,
            "crop_scale": (0.5, 1.0),
            "resample": "area",
            "flip": 0.0,
            "color": 0.0,
            "statistics": "imagenet",
            "cache": False,
            "threads": 16,
            "buffer": 8,
            "workers": 0,
            "max_bad": 0.05,
        },
        "eval": {
            "sets": (),
            "final_sets": (),
            "every": 0,
            "batch": 256,
            "ema": False,
            "report": False,
            # How images are prepared wherever the model is used but for training.
            "resize": "shortest",
            "resize_size": 0,
            "interpolation": "bicubic",
        },
        "log": {"every": 20, "alarms_after": 500},
        "checkpoint": {"every": 1000, "keep": 3},
    })


def pretrain(objective: str, arg: str | None) -> ml_collections.ConfigDict:
    """The full-size recipe: ViT-B/16, batch 4096, 25 epochs over `pairs` image-text pairs, by default 15 million."""
    args = parse_arg(arg, preset="B/16", batch=4096, pairs=15_000_000, epochs=25)
    config = base(objective, args.preset)
    config.model.img.remat = config.model.txt.remat = "dots"  # else 128 pairs of B/16 do not fit a chip of 16 GiB
    epoch = max(args.pairs // args.batch, 1)
    config.data.batch = args.batch
    config.steps = epoch * args.epochs
    config.optim.warmup = min(epoch, config.steps // 10)
    config.eval.every = epoch
    config.checkpoint.every = min(1000, epoch)
    return config
