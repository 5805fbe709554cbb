"""Fine-tuning end to end: the image tower on labelled images, or the text tower on a task of GLUE.

    python -m xclip_jax.main --config configs/finetune.py:data=tfds:imagenet2012,weights=RUN
    python -m xclip_jax.main --config configs/finetune.py:data=folder:/my/images,test=val,weights=RUN
    python -m xclip_jax.main --config configs/finetune.py:data=glue:cola@/data/CoLA,weights=RUN

RUN is a run's folder, or weights of another project as init.weights reads them: their sizes, tokenizer and pixel
statistics are taken over. The argument's keys: data, train and test (a source is DATA/TRAIN: tfds:imagenet2012/train,
folder:/my/images/train with one sub-folder a class, csv:/my/images/train.csv with train=train.csv, glue:TASK/train),
weights, preset (where there are none), batch, epochs, examples and classes (0 counts them in the source), dir (of TFDS
data sets).

Images: the recipe of SLIP's README and BEiT's code, 100 epochs at batch 1024, here with lr in proportion to the batch;
without its RandAugment and random erasing: brightness, contrast and saturation by 0.4 replace the former. Positions
decay here, not there. GLUE: AdamW, 2e-5 falling linearly, batch 32, 3 epochs, as BERT's; there is
no published recipe for these towers, and no dropout. No run of full size has been made and no score is claimed.
"""

import ml_collections

from xclip_jax.configs import common
from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions

# Training examples and classes, so that a config can be read where the data are not.
_KNOWN = {"tfds:imagenet2012": (1_281_167, 1000)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = common.parse_arg(
        arg,
        data="tfds:imagenet2012",
        train="train",
        test="validation",
        weights="",
        preset="B/16",
        batch=0,
        epochs=0,
        examples=0,
        classes=0,
        dir="",
    )
    text = sources.parse(args.data).kind.labelled_items == "text"
    config = common.base("classify", args.preset)
    if args.weights:
        common.adopt(config, args.weights)
    known = _size(args)
    examples, classes = args.examples or known[0], args.classes or known[1]
    batch, epochs = args.batch or (32 if text else 1024), args.epochs or (3 if text else 100)
    name = args.data.partition(":")[2].partition("@")[0].partition("?")[0].strip("/").replace("/", "-")
    config.run = f"runs/finetune-{name}"
    config.init.weights = args.weights
    config.objective.classify.classes = classes
    config.steps = max(examples * epochs // batch, 1)
    config.data.dir, config.data.batch, config.data.sources = args.dir, batch, (f"{args.data}/{args.train}",)
    config.eval.sets = (f"finetuned/{args.data}/{args.test}",)
    config.eval.every = max(examples // batch, 1) * max(epochs // 20, 1)
    config.checkpoint.every = min(1000, config.eval.every)
    if text:
        _text(config)
    else:
        _image(config, epochs)
    return config


def _size(args: ml_collections.ConfigDict) -> tuple[int, int]:
    if args.examples and args.classes:
        return args.examples, args.classes
    if args.data in _KNOWN:
        return _KNOWN[args.data]
    source = sources.open_labelled(f"{args.data}/{args.train}", SourceOptions(args.dir))
    return len(source), len(source.names or ()) or 1


def _image(config: ml_collections.ConfigDict, epochs: int) -> None:
    large = config.model.img.depth >= 24
    config.model.img.drop_path = 0.1 if config.model.img.width >= 768 else 0.0
    config.objective.classify.update(tower="img", smoothing=0.1, mixup=0.8, cutmix=1.0, head_std=2e-5)
    config.optim.lr = 4e-3 * config.data.batch / 1024
    config.optim.lr_start = config.optim.lr_end = 1e-6
    config.optim.warmup = round(config.steps * min(5 if large else 20, epochs / 5) / epochs)
    config.optim.weight_decay, config.optim.b2 = 0.05, 0.999
    config.optim.layer_decay = 0.75 if large else 0.65
    config.data.crop_scale, config.data.resample = (0.08, 1.0), "bicubic"
    config.data.flip_prob, config.data.color_jitter = 0.5, 0.4


def _text(config: ml_collections.ConfigDict) -> None:
    config.objective.classify.update(tower="txt", head_std=0.02)
    config.optim.lr, config.optim.schedule = 2e-5, "linear"
    config.optim.lr_start = config.optim.lr_end = 0.0
    config.optim.warmup = config.steps // 10
    config.optim.weight_decay, config.optim.b2, config.optim.grad_clip_norm = 0.01, 0.999, 1.0
