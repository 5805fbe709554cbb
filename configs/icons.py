"""Icons: 87,000 drawings by a hundred families of artists, on a laptop's CPU; the data are in docs/icons.md.

    python -m xclip_jax.main --config configs/icons.py
    python -m xclip_jax.main --config configs/icons.py:objective=clip,steps=3000

The argument's keys: objective (clip, siglip, nclip, xclip), steps, preset, size (pixels).
"""

import ml_collections

from xclip_jax.config import recipes
from xclip_jax.config.load import load_config

VALIDATION = ("icons/validation_concepts", "icons/validation_rendering")
TESTS = (
    "icons/test_concepts",
    "icons/test_rendering",
    "icons/test_retrieval",
    "icons/test_probe",
    "icons/test_dense",
    "icons/test_aliases",
    "icons/test_categories",
)


# Learning rate, and warm-up as a share of 1,000 steps: the best of seven or eight on validation, with tau 1 and, in
# xCLIP, a weight of nCLIP of 0.3; docs/study.md.
TUNED = {"clip": (2e-3, 0.6), "siglip": (2e-3, 0.6), "nclip": (2e-3, 0.6), "xclip": (2e-3, 0.45)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, objective="clip", steps=1000, preset="Ti/12", size=36)
    config = load_config("demo:" + ",".join(f"{key}={value}" for key, value in args.items()))
    config.run = f"runs/icons-{args.objective}"
    config.model.img.stem = "hmlp"  # one linear map of 12 x 12 pixels learns less from so few pictures
    config.optim.lr, share = TUNED[args.objective]
    config.optim.warmup = round(share * min(args.steps, 1000))
    config.data.sources, config.data.weights = ("icons:train",), ()
    config.data.spread_duplicate_captions = True  # "calendar" has over a hundred drawings
    config.data.tags_key = "category"
    config.data.tags = 1
    config.data.tags_append_prob = 0.3
    config.data.tags_only_prob = 0.0  # a category alone names nothing
    config.data.flip_prob = 0.0  # left and right are words here
    config.data.cache = True  # some 0.9 GB; to read and decode a batch takes a fifth of its step on two cores
    config.eval.sets = VALIDATION
    config.eval.final_sets = TESTS
    config.log.collapse_warmup_steps = 400  # with a short warm-up the loss is flat at ln 256 for some hundred steps
    return config
