"""The demo: emoji drawn by three artists, on a laptop's CPU in minutes.

    python -m xclip_jax.main --config configs/demo.py
    python -m xclip_jax.main --config configs/demo.py:objective=nclip

The argument's keys: objective (clip, siglip, nclip, xclip), steps, preset, size (pixels).
"""

import ml_collections

from xclip_jax.configs import common

TESTS = (
    "emoji/test_concepts",
    "emoji/test_concepts_one_prompt",
    "emoji/test_rendering",
    "emoji/test_rendering_flags",
    "emoji/test_rendering_animals_food",
    "emoji/test_rendering_rest",
    "emoji/test_rendering_flags_all_names",
    "emoji/test_line",
    "emoji/test_line_concepts",
    "emoji/test_retrieval",
    "emoji/test_probe",
    "emoji/test_aliases",
    "emoji/test_translations",
    "emoji/test_text_probe",
)


WARM_UP = 0.5  # share of the steps; this and the learning rate by validation: docs/demo.md


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = common.parse_arg(arg, objective="xclip", steps=680, preset="Ti/12", size=48)
    config = common.laptop("demo", args)
    config.model.img.stem = "linear"  # "hmlp", of the icons, has no other format that it could be exported to
    config.optim.lr, config.optim.warmup = 2e-3, round(WARM_UP * args.steps)
    config.data.sources = ("demo:train", "demo:train_tones")
    config.data.weights = (0.93, 0.07)
    config.data.spread_duplicate_captions = True  # the three pictures of a thing have one caption
    config.data.tags_key = "tags"
    config.data.tags = 4
    config.data.tags_only_prob = 0.3
    config.data.flip_prob = 0.5
    config.data.cache = True
    config.eval.sets = ("emoji/validation_concepts", "emoji/validation_rendering")
    config.eval.final_sets = TESTS
    config.log.collapse_warmup_steps = 200
    return config
