"""Pre-training at full size: ViT-B/16, batch 4096, 25 epochs, by SLIP's recipe.

    xclip-jax train --config pretrain:objective=clip,pairs=8000000 --config.data.sources='("folder:PATH",)'
    xclip-jax train --config pretrain:objective=xclip,data=cc12m
    xclip-jax train --config pretrain:objective=xclip,data=yfcc15m,preset=B/32

The first line reads your pairs, whose number, `pairs`, decides on the steps. The second one reads a copy of CC12M on
the Hugging Face Hub or, with root=/data, your tars /data/cc12m/*.tar from img2dataset (--output_format webdataset).
The third one is the setting of many published methods: ViT-B/32, 32 epochs of YFCC15M, batch 4096, 117,664 steps with a
warm-up of 3,677; docs/protocols.md has their scores.

Keys of the argument, all optional: objective (clip, siglip, nclip, xclip), data (cc3m, cc12m, yfcc15m, 35m), root,
preset, batch, epochs (25; 32 of yfcc15m), and pairs, by default those of the copy: for your tars give the number
counted by `xclip-jax check`, because links die. Written for TPU pods; not run, and no score is claimed.

Two sets are called YFCC15M: the copy on the Hub is DeCLIP's list, with RWKV-CLIP's captions; `root` reads your files.
The nCLIP paper's list of 35 million pairs is not published. The mixture here is CC3M, CC12M, YFCC15M, SBU and the
regions of Visual Genome, weighted by size, and needs `root`; data.json in a run's folder lists the files.
"""

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.core.errors import UserError, check_choice

# Copies on the Hub: pairs, and the source.
COPIES = {
    "cc3m": (2_905_954, "tar:hf://datasets/pixparse/cc3m-wds/cc3m-train-*.tar"),
    "cc12m": (10_968_539, "tar:hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar"),
    "yfcc15m": (15_061_515, "hf:Kaichengalex/YFCC15M/train?image=images"),
}
MIXTURE = ("cc3m", "cc12m", "yfcc15m", "sbu", "visual_genome")  # folders under `root`
PAIRS = {name: pairs for name, (pairs, _) in COPIES.items()} | {"35m": 35_000_000}
OWN_PAIRS = 15_000_000  # for sources set on the command line


def sources(data: str, root: str) -> tuple[str, ...]:
    """Return the sources of the set `data`: tars under `root`, if given, or a copy on the Hub."""
    if root:
        folders = MIXTURE if data == "35m" else (data,)
        return tuple(f"tar:{root}/{folder}/*.tar" for folder in folders)
    if data == "35m":
        raise UserError(f"config argument data=35m needs root=FOLDER, with the folders {', '.join(MIXTURE)} of tars.")
    return (COPIES[data][1],)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="xclip", data="", root="", preset="B/16", batch=4096, epochs=0, pairs=0)
    if args.data:
        check_choice("config argument data", args.data, PAIRS)
    elif args.root:
        raise UserError(f"config argument root={args.root} is the folder of a set; name the set, data=NAME.")
    epochs = args.epochs or (32 if args.data == "yfcc15m" else 25)
    epoch = max((args.pairs or PAIRS.get(args.data, OWN_PAIRS)) // args.batch, 1)  # steps

    config = recipes.base(args.objective, args.preset)  # terms of the loss, sizes of the towers
    config.run += f"-{args.data}" if args.data else ""
    config.steps = epochs * epoch

    config.data.sources = sources(args.data, args.root) if args.data else ()
    if args.data == "yfcc15m" and not args.root:
        config.data.text_columns = ("texts",)  # lists of ids of CLIP's tokenizer
    config.data.batch = args.batch
    config.data.tokenizer = "clip"
    config.data.crop_scale = (0.5, 1.0)

    config.model.dtype = "bfloat16"
    config.model.img.remat = config.model.txt.remat = "dots"  # else 128 pairs of B/16 do not fit a chip of 16 GiB
    # The usual head is thirty times as large as the smallest towers.
    clusters, hidden = (4096, 1024) if args.preset.startswith("Ti") else (32_768, 4096)
    config.model.cluster_head.update(clusters=clusters, hidden=hidden)

    config.optim.lr = 5e-4
    config.optim.lr_end = 1e-5
    config.optim.warmup = min(epoch, config.steps // 10)
    config.optim.weight_decay = 0.5
    config.optim.b2 = 0.98

    config.eval.sets = ()  # such as ("coco_retrieval",)
    config.eval.every = epoch
    # A checkpoint is three times the model: a few steps are trained again sooner than saved.
    config.checkpoint.every = min(1000, max(epoch, 200))
    return config
