"""One golden dump for each config: a change of any key of any experiment shows in the diff.

UPDATE_GOLDEN=1 python -m pytest tests/config/test_schema.py
"""

import os
import pathlib

import pytest

from docs import generate
from xclip_jax.config import load, schema

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {
    "pretrain": ("pretrain", None),
    "pretrain_clip": ("pretrain", "objective=clip"),
    "pretrain_siglip": ("pretrain", "objective=siglip"),
    "pretrain_nclip": ("pretrain", "objective=nclip"),
    "pretrain_L14": ("pretrain", "preset=L/14,batch=8192,pairs=35000000"),
    "pretrain_cc3m_clip": ("pretrain", "data=cc3m,objective=clip,batch=1024"),
    "pretrain_cc12m": ("pretrain", "data=cc12m"),
    "pretrain_yfcc15m": ("pretrain", "data=yfcc15m,preset=B/32"),
    "pretrain_yfcc15m_tars": ("pretrain", "data=yfcc15m,root=gs://bucket/tars,pairs=14000000"),
    "pretrain_35m": ("pretrain", "data=35m,root=/data"),
    "finetune": ("finetune", None),
    "finetune_L16": ("finetune", "preset=L/16,epochs=50"),
    "finetune_small": ("finetune", "data=folder:/my/set,examples=900,classes=3"),
    "finetune_glue": ("finetune", "data=glue:cola@/data/CoLA,examples=8551,classes=2"),
    "demo": ("demo", None),
    "demo_clip": ("demo", "objective=clip"),
    "demo_siglip": ("demo", "objective=siglip"),
    "demo_nclip": ("demo", "objective=nclip"),
    "small": ("small", "pairs=folder:/my/pairs,count=200,device=cpu"),
    "small_gpu": ("small", "pairs=tar:/my/pairs/*.tar,count=500000,device=gpu,objective=xclip"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
    module, arg = CONFIGS[name]
    config = load.load_config(f"{module}:{arg}" if arg else module)
    dump = "".join(f"{key} = {value!r}\n" for key, value in sorted(schema.flatten(config.to_dict()).items()))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dump)
    assert dump == path.read_text()


def test_every_config_file_has_a_dump():
    files = {path.stem for path in (GOLDEN.parents[1] / "configs").glob("*.py")} - {"__init__"}
    assert files == {module for module, _ in CONFIGS.values()}


@pytest.mark.parametrize("name", generate.PAGES)
def test_pages_made_from_the_code_are_current(name):
    made = generate.PAGES[name]()
    assert (GOLDEN.parents[1] / name).read_text() == made, "run python -m docs.generate"
