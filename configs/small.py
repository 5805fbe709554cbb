"""Your own pairs, from a laptop up: a run whose sizes follow from the pairs and from this machine.

    xclip-jax train --config small:pairs=/my/pairs
    xclip-jax train --config small:pairs=/my/pairs.csv,image=path,text=caption,weights=hf:ORG/NAME

pairs is a folder of images with .txt files next to them, a table, tars, or any spec of data.sources. Some hundred of
the pairs are read to choose towers, image size, context, batch, cluster head, optimizer, its rate, steps and intervals
(xclip_jax/train/autosize.py). Then all are read: a share is held out by content, and equal captions are counted. The
held-out pairs are evaluated on the way (retrieval/holdout, and zeroshot/holdout if sub-folders, or a column "label" of
some sources, name one class an image) and shown in RUN/report.html. Lines say what was chosen, and why held-out images
of such a source are not classified.

The argument's keys, all but pairs optional: weights (to start from, instead of random parameters), objective (clip,
siglip, nclip, xclip, superclip; by default clip, or the objective of the weights), image and text (columns or
features; several captions are text=title,alt), tokenizer, dir (of TFDS data sets), preset, size (pixels), batch, epochs
(0.5 too) or steps, from which warm-up and intervals follow, count (number of pairs; then none is read), device (cpu,
gpu, tpu: sizes for an ordinary one instead of this machine; needed if several processes train).
"""

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.config.recipes import Describe
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.train import autosize

ARGUMENTS = {
    "pairs": "", "weights": "", "objective": "", "image": "image", "text": "text", "tokenizer": "", "dir": "",
    "preset": "", "size": 0, "batch": 0, "epochs": 0.0, "steps": 0, "count": 0, "device": "",
}  # fmt: skip


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, **ARGUMENTS)
    if not args.pairs:
        raise UserError(
            "the recipe small needs your pairs: --config small:pairs=PATH, a folder of images with .txt files next "
            "to them, a table, tars, or a source such as tfds:NAME/SPLIT."
        )
    if args.device:
        check_choice("config argument device", args.device, autosize.ORDINARY)
    if args.steps and args.epochs:
        raise UserError(f"small:steps={args.steps},epochs={args.epochs:g}: give steps or epochs, not both.")
    config = recipes.base(args.objective or "clip", args.preset or "Ti/12")
    config.init.weights = args.weights
    config.data.sources, config.data.dir = (args.pairs,), args.dir
    config.data.image_key, config.data.text_keys = args.image, tuple(args.text.split(","))
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
    config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1
    config.eval.sets = ("retrieval/holdout",)
    config.eval.report = True
    config.checkpoint.keep = 2
    return config


def fill_in(config: ml_collections.ConfigDict, arg: str | None = None) -> Describe:
    """Choose what follows from the pairs, the weights and this machine; return a function that describes a config."""
    return autosize.fill_in(config, recipes.parse_arg(arg, **ARGUMENTS))
