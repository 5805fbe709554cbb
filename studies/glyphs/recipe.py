"""Glyphs: characters in 147 typefaces, with the icons' recipe; the data are in docs/glyphs.md.

    python -m xclip_jax.main --config studies/glyphs/recipe.py
    python -m xclip_jax.main --config studies/glyphs/recipe.py:objective=clip,steps=3000

The argument's keys are those of studies/icons/recipe.py.
"""

import ml_collections

from studies.icons import recipe

SOURCE, SET = "studies.glyphs.sources:GlyphSplits", "studies.glyphs.sets:GlyphSets"
TESTS = ("concepts", "combinations", "composition", "rendering", "retrieval", "probe", "scripts", "aliases")
VALIDATION = ("concepts", "combinations", "rendering")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    config = recipe.get_config(arg)
    config.run = config.run.replace("icons", "glyphs")
    config.model.txt.context_length = 24  # names have up to nine words
    config.data.sources = (f"{SOURCE}:train",)
    config.data.tags_key, config.data.tags = "", 0  # a script is the first word of most names
    config.data.crop_scale = (0.85, 1.0)  # size and height tell small from capital letters; marks are at the edge
    config.eval.sets = tuple(f"{SET}/validation_{name}" for name in VALIDATION)
    config.eval.final_sets = tuple(f"{SET}/test_{name}" for name in TESTS)
    return config
