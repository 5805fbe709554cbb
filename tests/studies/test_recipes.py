"""The studies' recipes: one golden dump for each config, as of the package's own."""

import os
import pathlib

import pytest

from studies.cc12m import study as cc12m
from studies.glyphs import recipe as glyphs
from studies.icons import study as icons
from xclip_jax.config import load, schema

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIGS = {
    "icons": icons.RECIPE,
    "icons_xclip": f"{icons.RECIPE}:objective=xclip,steps=2000,size=48",
    "glyphs": glyphs.__file__,
    "cc12m": f"{cc12m.RECIPE}:objective=xclip,root=gs://bucket",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
    config = load.load_config(CONFIGS[name])
    dump = "".join(f"{key} = {value!r}\n" for key, value in sorted(schema.flatten(config.to_dict()).items()))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dump)
    assert dump == path.read_text()


def test_the_schedule_of_the_icons_is_usual():
    resolved = schema.resolve(load.load_config(icons.RECIPE))
    assert 0 < 3 * resolved.optim.warmup <= 2 * resolved.steps
