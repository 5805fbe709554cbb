"""The recipe `small` from given weights: what it takes over from them."""

# ruff: noqa: F811  the tests name the imported fixture

import json
import shutil
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict

from tests.config.test_small import discs  # noqa: F401
from tests.helpers import tiny
from tests.helpers.util import free_address
from xclip_jax.commands import export
from xclip_jax.config import load, schema
from xclip_jax.core.errors import UserError
from xclip_jax.train import build, weights


def test_sizes_of_weights_are_taken_over(discs, run):
    c = load.load_config(f"small:pairs={discs},weights={run}")
    saved = json.loads((run / "config.json").read_text())["config"]
    assert c.model.img.image_size == saved["model"]["img"]["image_size"] and c.model.embed == saved["model"]["embed"]
    assert c.objective.name == "xclip" and c.data.tokenizer == "bytes" and c.init.weights == str(run)
    scratch = load.load_config(f"small:pairs={discs},tokenizer=bytes")
    assert c.optim.lr < scratch.optim.lr / 10 and c.steps * c.data.batch < scratch.steps * scratch.data.batch / 4
    assert load.load_config(f"small:pairs={discs},weights={run},objective=clip").objective.terms.to_dict() == {
        "clip": 1.0
    }
    schema.resolve(c)


def test_another_size_than_the_weights_shows_the_same_view(discs, run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "run")
    record = json.loads((changed / "config.json").read_text())
    size = record["config"]["model"]["img"]["image_size"]
    record["config"]["eval"] |= {"resize_size": 2 * size, "interpolation": "bilinear"}
    (changed / "config.json").write_text(json.dumps(record))
    c = load.load_config(f"small:pairs={discs},weights={changed},size={2 * size}")
    assert (c.model.img.image_size, c.eval.resize_size, c.eval.interpolation) == (2 * size, 4 * size, "bilinear")
    schema.resolve(c)
    # As a flag sets it, after the recipe was read, of this recipe and of another.
    tuned = load.load_config(f"finetune:data=folder:{tmp_path},weights={changed},examples=8,classes=2")
    for config in (c, tuned):
        config.model.img.image_size = 3 * size
        assert schema.resolve(config).eval.resize_size == 6 * size
        config.eval.resize_size = 7 * size
        assert schema.resolve(config).eval.resize_size == 7 * size


def test_what_contradicts_or_lacks_weights_is_refused(discs, run):
    for more, named in (
        (",tokenizer=bytes,preset=S/16", "leave tokenizer and preset"),
        ("/gone", "gone' does not exist"),
    ):
        with pytest.raises(UserError, match=named):
            load.load_config(f"small:pairs={discs},weights={run}{more}")


def test_a_cluster_head_of_weights_keeps_its_size(discs, run):
    c = load.load_config(f"small:pairs={discs},weights={run}")
    shapes = build.build(c).abstract
    tensors, _ = weights.read_initial(schema.resolve(c), shapes)
    heads = {name for name in flatten_dict(shapes.variables(), sep="/") if "/clusters_" in name}
    assert heads and heads <= tensors.keys() and c.model.cluster_head.clusters == 24


def test_weights_without_a_cluster_head_get_one_by_the_pairs(discs, tmp_path):
    c = load.load_config(f"small:pairs={discs},weights={tiny.untrained(tmp_path / 'clip', 'clip')},objective=xclip")
    tensors, _ = weights.read_initial(schema.resolve(c), build.build(c).abstract)
    assert c.model.cluster_head.clusters == 256
    assert tensors and not any("/clusters_" in name for name in tensors)


def test_the_objective_of_weights_is_taken_over_with_its_terms(discs, tmp_path):
    own = {"clip": 0.7, "nclip": 0.3}
    run = tiny.untrained(tmp_path / "own", objective__terms=own, objective__nclip__tau=2.0)
    taken = load.load_config(f"small:pairs={discs},weights={run}").objective
    assert (taken.terms.to_dict(), taken.nclip.tau) == (own, 2.0)
    c = load.load_config(f"small:pairs={discs},weights={run},objective=xclip")
    assert (c.objective.terms.to_dict(), c.objective.nclip.tau) == ({"clip": 0.5, "nclip": 0.5}, 0.5)
    own = {"clip": 1.0, "sharp": 0.2}
    plugins = {"sharp": {"type": "xclip_jax.objectives.nclip:Nclip", "tau": 0.1}}
    more = {"objective__name": "sharper", "objective__terms": own, "objective__plugins": plugins}
    c = load.load_config(f"small:pairs={discs},weights={tiny.untrained(tmp_path / 'more', **more)}")
    taken = schema.resolve(c).objective
    assert (taken.name, taken.terms, taken.plugins) == ("sharper", own, plugins)
    fine_tuned = json.loads((run / "config.json").read_text())
    terms = {"name": "classify", "terms": {"classify": 1.0}, "classify": {"classes": 3}}
    fine_tuned["config"]["objective"] |= terms
    (run / "config.json").write_text(json.dumps(fine_tuned))
    assert load.load_config(f"small:pairs={discs},weights={run}").objective.name == "clip"


def test_a_process_joins_others_after_a_recipe_has_read_weights(tmp_path):
    run = tiny.untrained(tmp_path / "run", "clip", data__tokenizer="clip")
    export.export(str(run), str(tmp_path / "weights"), to="hf")
    code = f"""from xclip_jax.config import load
from xclip_jax.core import console
from xclip_jax.processes import runtime
for recipe in ("small:pairs=folder:x,count=1000,device=cpu", "finetune:data=folder:x,examples=8,classes=2"):
    load.load_recipe(recipe + ",weights={tmp_path / "weights"}")
console.log0("hf:lab/x is commit 0")  # as reading from the Hub prints it
runtime.join(False, "{free_address()}", 1, 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "hf:lab/x is commit 0\n", done.stderr
