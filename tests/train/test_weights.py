import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch

from tests.data.test_tokenizer import save_words
from tests.helpers import tiny
from tests.helpers.util import random_variables, two_towers
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader, tokenizer
from xclip_jax.models.transformer import stack_blocks, unstack_blocks
from xclip_jax.train import build, trainer, weights
from xclip_jax.train.checkpoint import Checkpointer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.untrained(tmp_path_factory.mktemp("source") / "run", noise=0.1, model__img__depth=2)


@pytest.mark.slow  # two runs
def test_a_run_starts_from_another_and_resumes_without_it(source, pairs, tmp_path, capsys):
    kept = shutil.copytree(source, tmp_path / "source")
    # The first step's learning rate is zero: what is saved after it is what was loaded.
    c = tiny.config(
        "nclip", run=tmp_path / "run", steps=2, data__sources=(f"folder:{pairs}",), checkpoint__every=1,
        model__img__depth=2, model__scan=True, init__weights=str(kept), seed=1,
        mesh={"data": 2, "fsdp": 2, "model": 2, "strategy": "fsdp_tp"},
    )  # fmt: skip
    c.model.txt.context_length -= 2
    with tiny.cut_off(1):
        trainer.run(c)
    said = capsys.readouterr().out
    assert "starting from" in said and f"text positions cut from {tiny.LENGTH} to {tiny.LENGTH - 2}" in said
    assert "not in this run: params/log_scale, params/proj_img/linear/kernel, " in said and "WARNING" not in said
    there, here = jax.device_get((weights.load(str(kept))[2]["params"], tiny.restored(c, 1)[0].params))
    expected = there["img"] | {"transformer": stack_blocks(there["img"]["transformer"], 2)}
    chex.assert_trees_all_equal(here["img"], expected)
    chex.assert_trees_all_equal(here["clusters_txt"], there["clusters_txt"])
    np.testing.assert_array_equal(here["txt"]["positions"], there["txt"]["positions"][:-2])
    shutil.rmtree(kept)
    trainer.run(c)
    assert "starting from" not in capsys.readouterr().out
    assert np.any(tiny.restored(c, 2)[0].params["img"]["cls"] != here["img"]["cls"])


@pytest.mark.parametrize("average", [True, False])
def test_what_is_not_evaluated_is_not_read(average, tmp_path, monkeypatch):
    run = tiny.untrained(tmp_path / "run", "clip", ema__momentum=0.996, eval__ema=average)
    restore, read = Checkpointer.restore, []
    monkeypatch.setattr(Checkpointer, "restore", lambda *args: read.append(restore(*args)) or read[0])
    variables = weights.load(str(run)).variables
    ((state, _),) = read
    unread = ("params", "batch_stats") if average else ("ema_params", "ema_batch_stats")
    assert [getattr(state, name) for name in (*unread, "opt_state", "loss_state")] == [None] * 4
    chex.assert_trees_all_equal(variables["params"], state.ema_params if average else state.params)


def test_average_statistics_and_layout_of_a_start(source, capsys):
    """And a warning of another activation."""
    c = tiny.config(
        model__img__depth=2, model__img__style="openai", model__scan=True, init__weights=str(source), seed=1,
        ema__momentum=0.996, mesh={"data": 4, "fsdp": 2, "model": 1, "strategy": "zero1"},
    )  # fmt: skip
    p = build.build(c)
    fresh = tiny.drawn(p)
    begun = weights.init_from_weights(weights.read_initial(build.build(c).config, fresh)[0], fresh)
    assert "different settings: model.img.style ('xclip', 'openai' in this run)" in capsys.readouterr().out
    assert jax.tree.map(lambda x: x.sharding, begun) == jax.tree.map(lambda x: x.sharding, p.abstract)
    there = jax.device_get(weights.load(str(source))[2])
    for statistics in (begun.batch_stats, begun.ema_batch_stats):
        chex.assert_trees_all_equal(jax.device_get(statistics), there["batch_stats"])
    for params in (begun.params, begun.ema_params):
        blocks = unstack_blocks(jax.device_get(params["img"]["transformer"]), 2)
        chex.assert_trees_all_equal(jax.device_get(params["img"]) | {"transformer": blocks}, there["params"]["img"])
    chex.assert_trees_all_equal(begun.opt_state, fresh.opt_state)


def test_a_start_that_cannot_be(source, pairs, tmp_path):
    def run(**changes):
        changes = {"model__img__depth": 2, "init__weights": str(source)} | changes
        trainer.run(tiny.config(run=tmp_path / "run", data__sources=(f"folder:{pairs}",), **changes))

    with pytest.raises(UserError, match="does not exist; name the folder of a run"):
        run(init__weights=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"params/proj_img/linear/kernel has shape \(32, 16\), expected \(32, 8\)"):
        run(model__embed=8)
    with pytest.raises(UserError, match="params/img/transformer has 2 blocks, expected 3"):
        run(model__img__depth=3)
    assert not (tmp_path / "run").exists()


def towers(size=16, length=8, embed=8, vocab=20, **img):
    model = two_towers(
        img={"image_size": size, "patch": 4, "width": 16, "depth": 1, "heads": 2} | img,
        txt={"vocab": vocab, "eot_id": 19, "context_length": length, "width": 8, "depth": 1, "heads": 2},
        embed=embed,
    )  # fmt: skip
    args = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32)
    return model, jax.device_get(random_variables(model, *args))


def convert(before, after):
    pairs = {name: (getattr(before[0], name), getattr(after[0], name)) for name in ("img", "txt")}
    return weights.convert_params(before[1], after[1], pairs, "x")


@pytest.mark.parametrize("size", [8, 28])
def test_image_positions_are_interpolated_as_open_clip_does(size):
    before, after = towers(16), towers(size)
    found, notes = convert(before, after)
    vision = {"image_size": size, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
    theirs = open_clip.model.CLIP(8, vision, {"vocab_size": 20, "width": 8, "heads": 2, "layers": 1})
    held = {"visual.positional_embedding": torch.tensor(before[1]["params"]["img"]["positions"])}
    open_clip.model.resize_pos_embed(held, theirs)
    expected = held["visual.positional_embedding"].numpy()
    np.testing.assert_allclose(found["params/img/positions"], expected, rtol=0, atol=1e-6)
    assert notes == [f"image positions interpolated from 4 x 4 to {size // 4} x {size // 4}"]


def test_what_is_fresh_and_what_is_left_out_is_named():
    found, notes = convert(towers(embed=0), towers(embed=16, style="siglip"))
    assert "params/txt/tokens" in found and "params/log_scale" not in found
    assert notes == [
        "not in x, so initialised at random: params/img/patches/bias, params/log_scale, params/proj_txt/linear/kernel",
        "in x but not in this run: params/img/norm_pre/norm/bias, params/img/norm_pre/norm/scale",
    ]
    with pytest.raises(UserError, match=r"img/positions has shape \(16, 16\), expected \(17, 16\)"):
        convert(towers(pool="mean"), towers())
    with pytest.raises(UserError, match=r"txt/positions has shape \(8, 8\), expected \(9, 8\)"):
        convert(towers(), towers(length=9))
    with pytest.raises(UserError, match=r"txt/tokens has shape \(20, 8\), expected \(30, 8\)"):
        convert(towers(), towers(vocab=30))


def test_a_frozen_tower_stays_bit_for_bit_and_has_no_moments():
    changes = {"optim__weight_decay": 0.5, "optim__grad_clip_norm": 1.0, "optim__microbatches": 2}
    p = build.build(tiny.config("clip", init__freeze=("txt",), **changes))
    before = tiny.drawn(p)
    kept, after = jax.device_get(before.params), before
    for seed in range(3):
        after, metrics = p.compiled(after, loader.to_global(tiny.batch(seed), p.mesh))
    assert metrics["grad_norm"] > 0
    same = jax.tree.map(np.array_equal, kept, jax.device_get(after.params))
    assert all(jax.tree.leaves(same.pop("txt"))) and not any(jax.tree.leaves(same))
    # Two moments for each parameter that moves, and counters.
    count = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
    assert count == 2 * sum(x.size for name in same for x in jax.tree.leaves(kept[name]) if x.ndim)


def test_a_config_adopts_the_tokenizer_in_the_folder_of_a_run(tmp_path):
    words = save_words(tmp_path / "words.json", ["?", "<pad>", "<s>", "</s>", "picture"])
    run = tiny.untrained(tmp_path / "run", "clip", data__tokenizer=words)
    (tmp_path / "words.json").unlink()
    c = tiny.config("clip")
    weights.adopt(c, str(run))
    assert c.data.tokenizer == str(run / "tokenizer.json") and tokenizer.load(c.data.tokenizer).vocab_size == 5


def test_a_config_adopts_the_width_of_embeddings_that_a_style_demands(tmp_path):
    parts = {"model__img__pool": "map", "model__img__style": "siglip", "model__txt__style": "siglip",
             "model__txt__causal": False, "model__txt__pool": "last"}  # fmt: skip
    run = tiny.untrained(tmp_path / "run", "siglip", model__embed=32, **parts)
    assert load_config(f"finetune:data=folder:x,weights={run},examples=8,classes=2").model.embed == 32


def test_a_fingerprint_does_not_depend_on_the_layout_of_blocks():
    stacked, plain = (build.build(tiny.config("clip", model__scan=scan), jax.devices()[:1]) for scan in (True, False))
    params = tiny.drawn(stacked).params
    converted = {name: getattr(plain.model, name).convert(params[name])[0] for name in plain.model.towers}
    found = weights.fingerprint(stacked, {"params": params})
    assert found == weights.fingerprint(plain, {"params": params | converted})
    changed = params | {"log_scale": params["log_scale"] + 1}
    assert found != weights.fingerprint(stacked, {"params": changed})
