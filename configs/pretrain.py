"""Pre-training from tars of public image-text data at full size: ViT-B/16, batch 4096, 25 epochs, SLIP's recipe.

    python -m xclip_jax.main --config configs/pretrain.py:data=cc12m,objective=xclip,root=/data

reads /data/cc12m/*.tar, as img2dataset writes them (--output_format webdataset). For a folder of your own:

    --config.data.sources='("tar:/my/pairs/*.tar",)'

The argument's keys, all optional: data (cc3m, cc12m, yfcc15m, 35m), objective (clip, siglip, nclip, xclip), root,
preset, batch, epochs, and pairs, 0 for the data's nominal number: give what `python -m xclip_jax.data.check` counts,
because a third of the links of CC3M and CC12M are dead. Written for TPU pods; no run of this size has been made and no
score is claimed.

Two sets go by the name YFCC15M, and the list of the 35 million pairs of the nCLIP paper is not published: data.json in
a run's folder says which files it read. The mixture here is CC3M, CC12M, YFCC15M, SBU and the regions of Visual Genome,
each weighted by its size.
"""

import ml_collections

from xclip_jax.configs import common
from xclip_jax.errors import check_choice

# Folders under `root`, and pairs as published.
DATA = {
    "cc3m": (("cc3m",), 3_318_333),
    "cc12m": (("cc12m",), 12_423_374),
    "yfcc15m": (("yfcc15m",), 14_829_396),
    "35m": (("cc3m", "cc12m", "yfcc15m", "sbu", "visual_genome"), 35_000_000),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = common.parse_arg(
        arg, data="cc12m", objective="xclip", root="/data", preset="B/16", batch=4096, epochs=25, pairs=0
    )
    check_choice("config argument data", args.data, DATA)
    folders, nominal = DATA[args.data]
    sizes = f"preset={args.preset},batch={args.batch},epochs={args.epochs},pairs={args.pairs or nominal}"
    config = common.pretrain(args.objective, sizes)
    config.run = f"runs/{args.objective}-{args.preset.replace('/', '')}-{args.data}"
    config.data.sources = tuple(f"tar:{args.root}/{folder}/*.tar" for folder in folders)
    return config
