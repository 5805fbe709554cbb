"""What all configs share: the string argument, and the groups of keys with their defaults."""

import dataclasses
import json
import math
import os
import shlex
from typing import Any

import ml_collections
from etils import epath

from xclip_jax import imports, interop
from xclip_jax.config import schema
from xclip_jax.config.fields import nearest
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.interop import hub
from xclip_jax.models.two_towers import preset
from xclip_jax.objectives import OBJECTIVES, RECIPES
from xclip_jax.run_folder import is_run

_KINDS = {int: "an integer", float: "a number"}


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """ "a=1,b=x,y" -> ConfigDict of `defaults` with these values, each of its default's type; unknown keys raise.

    A part without "=" is a flag where the default is a bool; after a string it continues this, as "y" does above.
    """
    values = dict(defaults)
    items: list[tuple[str, str]] = []
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if (
            not (equals or isinstance(defaults.get(key), bool))
            and items
            and isinstance(defaults.get(items[-1][0]), str)
        ):
            items[-1] = (items[-1][0], f"{items[-1][1]},{item}")
        else:
            items.append((key, text))
    for key, text in items:
        if key not in defaults:
            if not text and os.path.exists(os.path.expanduser(key)):
                raise UserError(
                    f"config argument {key!r} is a path; to train on it, write {shlex.quote(f'small:pairs={key}')}."
                )
            near = nearest(key, defaults)
            raise UserError(f"config argument {key!r} is unknown; did you mean {near!r}? Known: {', '.join(defaults)}.")
        kind = type(defaults[key])
        try:
            values[key] = text.lower() in ("", "1", "true", "yes") if kind is bool else kind(text)
        except ValueError as error:
            raise UserError(f"config argument {key}={text!r}; expected {_KINDS[kind]}.") from error
        # A default of 0 means "as the data or the recipe has it".
        low = min(defaults[key], 1) if kind is int else 0
        above = low == 0 and key in ("steps", "epochs")
        if kind in (int, float) and not (low <= values[key] < math.inf and (values[key] or not above)):
            raise UserError(f"config argument {key}={text!r}; expected {'above' if above else 'at least'} {low}.")
    # An objective of "" is up to the recipe.
    if values.get("objective", "clip") not in (*OBJECTIVES, defaults.get("objective")):
        raise UserError(f"config argument objective={values['objective']!r} must be one of {', '.join(OBJECTIVES)}.")
    return ml_collections.ConfigDict(values)


def base(objective: str, size: str) -> ml_collections.ConfigDict:
    """Every key with its default, for `objective`, with the towers of preset `size`.

    The defaults are SLIP's recipe (arXiv 2112.12750), a public baseline for tens of millions of pairs.
    """
    config, sizes = schema.default(), preset(size)
    config.run = f"runs/{objective}-{size.replace('/', '')}"
    config.objective.name, config.objective.terms = objective, RECIPES[objective]
    config.model.img.update(sizes["img"])
    config.model.txt.update(sizes["txt"])
    config.model.embed = sizes["embed"]
    config.model.img.image_size -= config.model.img.image_size % config.model.img.patch  # whole patches: 216 of Ti/12
    if objective == "siglip":
        config.model.scale_init = 10.0
    return config


def adopt(config: ml_collections.ConfigDict, weights: str) -> schema.Config | None:
    """Take over towers, tokenizer and preprocessing of weights.

    Args:
      config: to change.
      weights: a run, a file or folder of another project, or hf:ORG/NAME.

    Returns:
      The config of the weights; None where they do not exist on this machine: the trainer says so.

    Raises:
      UserError: weights that cannot be read.
    """
    path = epath.Path(hub.resolve(weights))
    if not path.exists():
        return None
    try:
        run = is_run(str(path))
        source = json.loads((path / "config.json").read_text())["config"] if run else interop.read(weights)[0]
        groups = {name: source[name] for name in ("model", "objective", "data", "eval") if name in source}
        with imports.named_by(weights):
            saved = schema.resolve(schema.complete({"steps": 1} | groups))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / 'config.json'} cannot be read ({error}); give weights=RUN of another run.") from error
    for name in ("img", "txt"):
        tower = config.model[name]
        # How it is computed does not depend on the weights.
        tower.update(dataclasses.asdict(getattr(saved.model, name)) | {"scan": tower.scan, "remat": tower.remat})
    config.model.plugins = saved.model.plugins
    config.model.img.patch_dropout = config.model.img.drop_path = 0.0
    prepare = Preprocessing.from_config(saved).to_config()
    config.eval.update(prepare["eval"])
    with config.ignore_type():  # a name, or a pair
        config.data.update(prepare["data"] | {"tokenizer": saved.data.tokenizer})
    return saved


def pretrain(objective: str, arg: str | None) -> ml_collections.ConfigDict:
    """The full-size recipe: ViT-B/16, batch 4096, 25 epochs over `pairs` image-text pairs, by default 15 million.

    The trainer compares the epochs with those over the pairs that it counts (`log.expected_epochs`).
    """
    args = parse_arg(arg, preset="B/16", batch=4096, pairs=15_000_000, epochs=25)
    config = base(objective, args.preset)
    if args.preset.startswith("Ti"):  # the usual head has thirty times their parameters
        config.model.cluster_head.update(clusters=4096, hidden=1024)
    config.model.img.remat = config.model.txt.remat = "dots"  # else 128 pairs of B/16 do not fit a chip of 16 GiB
    epoch = max(args.pairs // args.batch, 1)
    config.data.batch = args.batch
    config.steps = epoch * args.epochs
    config.optim.warmup = min(epoch, config.steps // 10)
    config.eval.every = epoch
    config.log.expected_epochs = args.epochs
    # A checkpoint is three times the model: an epoch of few steps is trained again sooner than it is saved.
    config.checkpoint.every = min(1000, max(epoch, 200))
    return config


def laptop(name: str, args: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A recipe for small drawings on a CPU: towers in float32, batches of 256, four evaluations on the way.

    Args:
      name: of the data, for the run's folder.
      args: of `parse_arg`, with objective, steps, preset and size (pixels).
    """
    config = base(args.objective, args.preset)
    config.run = f"runs/{name}-{args.objective}"
    config.steps = args.steps
    config.model.img.image_size = args.size
    config.model.img.stem = "hmlp"  # one linear map of 12 x 12 pixels learns less from so few pictures
    config.model.txt.context_length = 16
    for tower in (config.model.img, config.model.txt):
        tower.scan = False
    config.model.dtype = "float32"
    config.model.cluster_head = {"clusters": 1024, "hidden": 1024, "layers": 1, "last_norm": False}
    config.optim.lr = 1e-3
    config.optim.lr_start = config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1
    config.data.batch = 256
    config.data.text_keys = ("name", "aliases")
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "bicubic"  # smoother than "area" where pictures change little in size
    config.data.color_jitter = 0.2
    config.data.threads = 1  # more of them wait for each other: decoded images leave Python little to do
    config.eval.every = config.checkpoint.every = max(args.steps // 4, 1)
    config.eval.report = True
    config.log.every = 20
    config.checkpoint.keep = 1
    return config
