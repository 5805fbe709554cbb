"""Pre-training at full size: ViT-B/16, batch 4096, 25 epochs, by SLIP's recipe.

    xclip-jax train --config pretrain:objective=clip,pairs=8000000 --config.data.sources='("folder:PATH",)'
    xclip-jax train --config pretrain:objective=xclip,data=cc12m,root=/data

The first line reads pairs of your own: `pairs` says how many, because the steps follow from it. The second one reads
/data/cc12m/*.tar, as img2dataset writes them (--output_format webdataset).

The argument's keys, all optional: objective (clip, siglip, nclip, xclip), data (cc3m, cc12m, yfcc15m, 35m), root,
preset, batch, epochs, and pairs, by default as published: give the number that `xclip-jax check` counts, because a
third of the links of CC3M and CC12M are dead. Written for TPU pods; no run of this size has been made and no score is
claimed.

Two sets go by the name YFCC15M, and the list of the 35 million pairs of the nCLIP paper is not published: data.json in
a run's folder says which files it read. The mixture here is CC3M, CC12M, YFCC15M, SBU and the regions of Visual Genome,
each weighted by its size.
"""

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.core.errors import check_choice

# Folders under `root`, and pairs as published.
DATA = {
    "cc3m": (("cc3m",), 3_318_333),
    "cc12m": (("cc12m",), 12_423_374),
    "yfcc15m": (("yfcc15m",), 14_829_396),
    "35m": (("cc3m", "cc12m", "yfcc15m", "sbu", "visual_genome"), 35_000_000),
}
OWN = ((), 15_000_000)  # the sources are set on the command line


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(
        arg, objective="xclip", data="", root="/data", preset="B/16", batch=4096, epochs=25, pairs=0
    )
    if args.data:
        check_choice("config argument data", args.data, DATA)
    folders, published = DATA.get(args.data, OWN)
    epoch = max((args.pairs or published) // args.batch, 1)  # steps

    config = recipes.base(args.objective, args.preset)  # terms of the loss, sizes of the towers
    config.run += f"-{args.data}" if args.data else ""
    config.steps = args.epochs * epoch
    config.log.expected_epochs = args.epochs  # compared with the epochs over the pairs that the sources have

    config.data.sources = tuple(f"tar:{args.root}/{folder}/*.tar" for folder in folders)
    config.data.batch = args.batch
    config.data.tokenizer = "clip"
    config.data.crop_scale = (0.5, 1.0)

    config.model.dtype = "bfloat16"
    config.model.img.remat = config.model.txt.remat = "dots"  # else 128 pairs of B/16 do not fit a chip of 16 GiB
    # The usual head has thirty times the parameters of the smallest towers.
    clusters, hidden = (4096, 1024) if args.preset.startswith("Ti") else (32_768, 4096)
    config.model.cluster_head.update(clusters=clusters, hidden=hidden)

    config.optim.lr = 5e-4
    config.optim.lr_start, config.optim.lr_end = 1e-6, 1e-5
    config.optim.warmup = min(epoch, config.steps // 10)
    config.optim.weight_decay = 0.5
    config.optim.b2 = 0.98

    config.eval.sets = ()  # such as ("coco_retrieval",)
    config.eval.every = epoch
    # A checkpoint is three times the model: an epoch of few steps is trained again sooner than it is saved.
    config.checkpoint.every = min(1000, max(epoch, 200))
    return config
