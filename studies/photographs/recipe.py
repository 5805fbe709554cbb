"""Photographs of a shop's products with its titles, on a laptop's CPU; the data are in docs/photographs.md.

    PHOTOGRAPHS=FOLDER python -m xclip_jax.main --config studies/photographs/recipe.py:objective=xclip

The argument's keys: objective (clip, siglip, nclip, xclip), steps, split (choice, train), captions (loose,
tight, half), root (folder of the files). Sizes are those that the recipe small chooses for these pairs on two cores.
"""

import ml_collections

from studies.photographs import corpus, sets
from xclip_jax.config import recipes

CLUSTER_HEAD = {"clusters": 1024, "hidden": 1, "layers": 0}  # linear: next to no cost


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="clip", steps=800, split="choice", captions="loose", root="")
    config = recipes.base(args.objective, "Ti/12")
    config.run = f"runs/photographs-{args.objective}"
    config.steps = args.steps

    config.model.dtype = "float32"  # on a CPU
    config.model.img.image_size = 60  # the shorter side of the photographs
    config.model.txt.context_length = 16
    config.model.scan = False
    config.model.cluster_head = CLUSTER_HEAD

    config.optim.name = "muon"
    config.optim.lr = 4e-3
    config.optim.warmup = round(0.6 * args.steps)
    config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.05

    config.data.sources = (f"{corpus.KIND}:{args.split}/{args.captions}",)
    config.data.dir = args.root
    config.data.batch = 256
    config.data.spread_duplicate_captions = True
    config.data.threads = 2
    config.data.cache = True

    config.eval.sets = tuple(f"{sets.KIND}/validation_{name}" for name in ("unseen", "known", "retrieval"))
    config.eval.every = config.checkpoint.every = max(args.steps // 4, 1)
    config.checkpoint.keep = 1
    config.log.every = 20
    return config
