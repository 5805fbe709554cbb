"""Icons: 86,000 drawings by a hundred families of artists, on a laptop's CPU; the data are in docs/icons.md.

    python -m xclip_jax.main --config configs/icons.py
    python -m xclip_jax.main --config configs/icons.py:objective=clip,steps=3000

The argument's keys: objective (clip, siglip, nclip, xclip), steps, preset, size (pixels).
"""

import ml_collections

from xclip_jax.configs import common

VALIDATION = ("icons/validation_concepts", "icons/validation_rendering")
TESTS = (
    "icons/test_concepts",
    "icons/test_rendering",
    "icons/test_retrieval",
    "icons/test_probe",
    "icons/test_aliases",
    "icons/test_categories",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = common.parse_arg(arg, objective="clip", steps=1000, preset="Ti/12", size=36)
    config = common.base(args.objective, args.preset)
    config.run = f"runs/icons-{args.objective}"
    config.steps = args.steps
    config.model.img.image_size = args.size
    config.model.img.stem = "hmlp"  # as in the demo
    config.model.txt.context_length = 16  # the longest caption has 12 tokens
    for tower in (config.model.img, config.model.txt):
        tower.scan = False
    config.model.dtype = "float32"
    config.model.cluster_head = {"clusters": 1024, "hidden": 1024, "layers": 1, "last_norm": False}
    if args.objective == "xclip":
        config.objective.terms = {"clip": 0.7, "nclip": 0.3}
    config.optim.lr = 1e-3
    config.optim.warmup = min(300, args.steps // 10 * 3)
    config.optim.lr_start = config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1
    config.data.sources = ("icons:train",)
    config.data.spread_duplicate_captions = True  # "calendar" has over a hundred drawings
    config.data.batch = 256
    config.data.text_keys = ("name", "aliases")
    config.data.tags_key = "category"
    config.data.tags = 1
    config.data.tags_append_prob = 0.3
    config.data.tags_only_prob = 0.0  # a category alone names nothing
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "bicubic"
    config.data.flip_prob = 0.0  # left and right are words here
    config.data.color_jitter = 0.2
    config.data.threads = 1
    config.eval.sets = VALIDATION
    config.eval.final_sets = TESTS
    config.eval.every = max(args.steps // 4, 1)
    config.eval.report = True
    config.log.every = 20
    config.log.collapse_warmup_steps = 400  # the loss is flat at ln 256 for some hundred steps
    config.checkpoint.every = max(args.steps // 4, 1)
    config.checkpoint.keep = 1
    return config
