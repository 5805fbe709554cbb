import os
import pathlib

import pytest

from xclip_jax.config import load, schema

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECIPE = "studies/icons/recipe.py"
CONFIGS = {"icons": RECIPE, "icons_xclip": f"{RECIPE}:objective=xclip,steps=2000,size=48"}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
    config = load.load_config(CONFIGS[name])
    dump = "".join(f"{key} = {value!r}\n" for key, value in sorted(schema.flatten(config.to_dict()).items()))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dump)
    assert dump == path.read_text()
