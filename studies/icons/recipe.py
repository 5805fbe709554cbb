"""Icons: the recipe of recorded runs on 87,000 drawings; the code of these data is at the commit in docs/icons.md.

The argument's keys: objective (clip, siglip, nclip, xclip), steps, preset, size (pixels).
"""

import ml_collections

from xclip_jax.config import recipes

SOURCE, SET = "studies.icons.sources:IconSplits", "studies.icons.sets:IconSets"
TESTS = ("concepts", "rendering", "retrieval", "probe", "dense", "aliases", "categories")

# Learning rate, and warm-up as a share of 1,000 steps: the best of seven or eight on validation, with tau 1 and, in
# xCLIP, a weight of nCLIP of 0.3; docs/study.md.
TUNED = {"clip": (2e-3, 0.6), "siglip": (2e-3, 0.6), "nclip": (2e-3, 0.6), "xclip": (2e-3, 0.45)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="clip", steps=1000, preset="Ti/12", size=36)
    config = recipes.base(args.objective, args.preset)
    config.run = f"runs/icons-{args.objective}"
    config.steps = args.steps

    config.model.dtype = "float32"  # on a CPU
    config.model.img.image_size = args.size
    config.model.txt.context_length = 16
    config.model.scan = False
    config.model.cluster_head = {"clusters": 1024, "hidden": 1024, "layers": 1}

    config.optim.lr, warmup_share = TUNED[args.objective]
    config.optim.warmup = round(warmup_share * min(args.steps, 1000))
    config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1

    config.data.sources = (f"{SOURCE}:train",)
    config.data.batch = 256
    config.data.text_columns = ("name", "aliases")
    config.data.spread_duplicate_captions = True  # "calendar" has over a hundred drawings
    config.data.caption_transform = "studies.icons.sources:add_category:category"
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "bicubic"  # smoother than "area" where pictures change little in size
    config.data.color_jitter = 0.2
    config.data.flip_prob = 0.0  # left and right are words here
    config.data.threads = 1  # more of them wait for each other: decoded images leave Python little to do
    config.data.cache = True  # some 0.9 GB; to read and decode a batch takes a fifth of its step on two cores

    config.eval.sets = (f"{SET}/validation_concepts", f"{SET}/validation_rendering")
    config.eval.sets_at_end = tuple(f"{SET}/test_{name}" for name in TESTS)
    config.eval.every = config.checkpoint.every = max(args.steps // 4, 1)
    config.eval.report = True
    config.checkpoint.keep = 1
    config.log.every = 20
    return config
