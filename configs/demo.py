"""The demo: emoji drawn by three artists, on a laptop's CPU in minutes.

    xclip-jax train --config demo
    xclip-jax train --config demo:objective=nclip

The argument's keys: objective (clip, siglip, nclip, xclip), steps, preset, size (pixels).
"""

import ml_collections

from xclip_jax.config import recipes

TESTS = (
    "emoji/test_concepts",
    "emoji/test_rendering",
    "emoji/test_line",
    "emoji/test_line_concepts",
    "emoji/test_retrieval",
    "emoji/test_probe",
    "emoji/test_aliases",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="xclip", steps=680, preset="Ti/12", size=48)
    config = recipes.base(args.objective, args.preset)  # terms of the loss, sizes of the towers
    config.run = f"runs/demo-{args.objective}"
    config.steps = args.steps

    config.data.sources = ("demo:train", "demo:train_tones")
    config.data.weights = (0.93, 0.07)
    config.data.batch = 256
    config.data.text_columns = ("name", "aliases")
    config.data.spread_duplicate_captions = True  # the three pictures of a thing have one caption
    config.data.caption_transform = "xclip_jax.demo.emoji:add_keywords:tags"
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "bicubic"  # smoother than "area" at small changes of size
    config.data.flip_prob = 0.5
    config.data.color_jitter = 0.2
    config.data.threads = 1  # with decoded images, more threads wait for each other
    config.data.cache = True

    config.model.dtype = "float32"
    config.model.img.image_size = args.size
    config.model.txt.context_length = 16
    config.model.scan = False
    config.model.cluster_head.update(clusters=1024, hidden=1024)

    # The optimizer, its rate and half of the steps as warm-up are the best on validation: docs/demo.md.
    config.optim.name, config.optim.lr = "muon", 4e-3
    config.optim.lr_end = 0.0
    config.optim.warmup = round(args.steps / 2)
    config.optim.weight_decay = 0.1

    config.eval.sets = ("emoji/validation_concepts", "emoji/validation_rendering")
    config.eval.sets_at_end = TESTS
    config.eval.every = config.checkpoint.every = max(args.steps // 4, 1)
    config.eval.report = True
    config.checkpoint.keep = 1
    config.log.every = 20
    return config
