"""Recipes: their arguments, presets, and that they open no data."""

import importlib

import jax
import pytest
from flax.traverse_util import flatten_dict

from tests.helpers import tiny
from xclip_jax.config import load, recipes
from xclip_jax.core.errors import UserError
from xclip_jax.data import sources
from xclip_jax.models.two_towers import PRESETS
from xclip_jax.train import build, weights


@pytest.mark.parametrize(
    "spec", ["demo", "pretrain:data=cc12m", "small:pairs=none,weights=none", "finetune:data=folder:none,weights=none"]
)
def test_a_recipe_opens_no_data_and_no_weights(spec, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("get_config opens something")

    for module, name in ((weights, "adopt"), (sources, "open_pairs"), (sources, "open_labelled"), (jax, "devices")):
        monkeypatch.setattr(module, name, refuse)
    recipe, _, arg = spec.partition(":")
    config = importlib.import_module(f"configs.{recipe}").get_config(arg)
    assert config.data.sources and config.is_locked


def test_parse_arg():
    parsed = recipes.parse_arg("steps=5,rate=0.5", steps=1, rate=1.0, name="x")
    assert parsed.to_dict() == {"steps": 5, "rate": 0.5, "name": "x"}
    assert recipes.parse_arg("name=a,b,steps=5", steps=1, name="x").name == "a,b"
    for arg, message in (
        ("steps=5,b", "'b' is unknown"),
        ("stpes=5", "did you mean 'steps'"),
        ("name=https://h/a?x=1,b=2", "'b' is unknown; .*; write a comma in an address as %2C"),
        ("steps=many", "steps='many'; expected an integer"),
        ("objective=clap", "objective is 'clap'"),
        ("name=a,name=b", "'name' is given twice; .* name=A,B"),
    ):
        with pytest.raises(UserError, match=message):
            recipes.parse_arg(arg, steps=1, name="x", objective="clip")


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_of_the_full_size_recipe_builds(size):
    config = load.load_config(f"pretrain:preset={size},batch=64,pairs=640")
    params = flatten_dict(build.build(config).abstract.params, sep="/")
    heads = sum(x.size for name, x in params.items() if name.startswith("clusters"))
    assert 0 < heads < 5 * (sum(x.size for x in params.values()) - heads)
    assert config.model.img.image_size == {"Ti/12": 216}.get(size, 224)
    assert (config.steps, config.checkpoint.every) == (250, 200)


def test_arguments_that_would_have_no_effect_are_refused():
    with pytest.raises(UserError, match="root=/data is the folder of a set; name the set, data=NAME"):
        load.load_config("pretrain:root=/data")
    with pytest.raises(UserError, match="weights have towers of their own; leave preset=L/14 out"):
        load.load_config("finetune:weights=run,preset=L/14,examples=10,classes=2")


@pytest.mark.parametrize(("examples", "batch"), [(10, 32), (2000, 128), (100_000, 1024)])
def test_few_images_are_fine_tuned_in_small_batches(examples, batch):
    arg = f"finetune:data=folder:/x,examples={examples},classes=2"
    config = load.load_config(arg)
    assert (config.data.batch, config.optim.lr) == (batch, 4e-3 * batch / 1024)
    assert config.steps == max(examples * 100 // batch, 1)
    assert load.load_config(f"{arg},batch=512").data.batch == 512


def test_one_class_is_nothing_to_learn(tmp_path):
    tiny.folder(tmp_path / "train" / "cats", 3)
    with pytest.raises(UserError, match=r"folder:.*/train has one class, 'cats'; a classifier learns from two or more"):
        load.load_config(f"finetune:data=folder:{tmp_path}")
