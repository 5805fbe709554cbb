"""Fine-tuning end to end: the image tower on labelled images, or the text tower on a task of GLUE.

    xclip-jax train --config finetune:data=tfds:imagenet2012,weights=RUN
    xclip-jax train --config finetune:data=folder:/my/images,test=val,weights=RUN
    xclip-jax train --config finetune:data=glue:cola@/data/CoLA,weights=RUN

RUN is a run's folder or other weights, see init.weights; their sizes, tokenizer and pixel statistics are taken over.
Keys of the argument: data, train and test (a source is DATA/TRAIN: tfds:imagenet2012/train, folder:/my/images/train
with one sub-folder per class, csv:/my/images/train.csv with train=train.csv, glue:TASK@FOLDER/train), weights, preset
(without weights), batch, epochs, examples and classes (0 counts them in the source), dir (of TFDS data sets).

Images follow SLIP's README and BEiT's code, 100 epochs at batch 1024, or less for fewer than 8192 images, here with lr
in proportion to the batch, changes of brightness, contrast and saturation by 0.4 instead of RandAugment, no random
erasing, and weight decay of positions.
GLUE follows BERT: AdamW, 2e-5 falling linearly, batch 32, 3 epochs; these towers have no published recipe and no
dropout. Not run at full size; no score is claimed.
"""

import math

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.core.errors import UserError
from xclip_jax.data import labelled, sources
from xclip_jax.data.base import SourceOptions
from xclip_jax.train import weights

ARGUMENTS = {
    "data": "tfds:imagenet2012", "train": "train", "test": "validation", "dir": "", "weights": "", "preset": "",
    "batch": 0, "epochs": 0, "examples": 0, "classes": 0,
}  # fmt: skip
RATE = 4e-3  # of a batch of 1024 images
MIN_BATCH = 32
# Training examples and classes, so that a config can be read without the data.
KNOWN = {"tfds:imagenet2012/train": (1_281_167, 1000)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, **ARGUMENTS)
    if args.weights and args.preset:
        raise UserError(f"finetune: weights have towers of their own; leave preset={args.preset} out.")
    config = recipes.base("classify", args.preset or "B/16")
    name = args.data.partition(":")[2].partition("@")[0].partition("?")[0].strip("/").replace("/", "-")
    config.run = f"runs/finetune-{name}"
    config.init.weights = args.weights
    config.data.sources, config.data.dir = (f"{args.data}/{args.train}",), args.dir
    config.eval.sets = (f"finetuned/{args.data}/{args.test}",)
    if sources.parse(args.data).kind.labelled_items == "text":
        config.objective.classify.update(tower="txt")
        config.data.batch = args.batch or 32
        config.optim.lr, config.optim.schedule = 2e-5, "linear"
        config.optim.lr_end = 0.0
        config.optim.weight_decay, config.optim.b2, config.optim.grad_clip_norm = 0.01, 0.999, 1.0
    else:
        config.objective.classify.update(tower="img", smoothing=0.1, mixup=0.8, cutmix=1.0)
        config.data.batch = args.batch or 1024
        config.data.crop_scale, config.data.resample = (0.08, 1.0), "bicubic"
        config.data.flip_prob, config.data.color_jitter = 0.5, 0.4
        config.optim.lr = RATE * config.data.batch / 1024
        config.optim.lr_end = 1e-6
        config.optim.weight_decay, config.optim.b2 = 0.05, 0.999
    return config


def fill_in(config: ml_collections.ConfigDict, arg: str | None = None) -> None:
    """Take over the towers of the weights, and set the keys that depend on them and on the number of examples."""
    args = recipes.parse_arg(arg, **ARGUMENTS)
    if args.weights:
        weights.adopt(config, args.weights)
    counted = KNOWN.get(config.data.sources[0], (args.examples, args.classes))
    if not all(counted):
        source = sources.open_labelled(config.data.sources[0], SourceOptions(args.dir, config.data.image_column))
        counted = (len(source), labelled.count_classes(config.data.sources[0], source))
    examples = args.examples or counted[0]
    text = config.objective.classify.tower == "txt"
    epochs = args.epochs or (3 if text else 100)
    batch = config.data.batch
    if not args.batch:  # at least eight updates per epoch
        batch = config.data.batch = min(batch, max(2 ** int(math.log2(max(examples // 8, 1))), MIN_BATCH))
        if not text:
            config.optim.lr = RATE * batch / 1024
    config.objective.classify.classes = args.classes or counted[1]
    config.steps = max(examples * epochs // batch, 1)
    config.eval.every = max(examples // batch, 1) * max(epochs // 20, 1)
    config.checkpoint.every = min(1000, config.eval.every)
    if text:
        config.optim.warmup = config.steps // 10
    else:
        img = config.model.img
        large = img.depth >= 24
        img.drop_path = 0.1 if img.width >= 768 else 0.0
        config.optim.layer_decay = 0.75 if large else 0.65
        config.optim.warmup = round(config.steps * min(5 if large else 20, epochs / 5) / epochs)
