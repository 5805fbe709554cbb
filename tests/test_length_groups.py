"""Texts in groups of their lengths: the same numbers as whole ones, and groups that batches fit."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_step import gradients
from xclip_jax import flops
from xclip_jax.data import length_groups, loader
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.errors import UserError
from xclip_jax.train import build, state, trainer

GROUPS = "4:0.5,8:0.75"


def text(rows, length, eot, lengths):
    """Random tokens with the end of the text where `lengths` say, and other random tokens after it."""
    tokens = np.random.default_rng(0).integers(1, 200, (rows, length), np.int32)
    tokens[np.arange(rows), np.array(lengths) - 1] = eot
    return tokens


def batch_of(experiment, lengths):
    batch = tiny.batch(0, eot=experiment.tokenizer.eot_id)
    return batch | {"text": text(tiny.BATCH, tiny.LENGTH, experiment.tokenizer.eot_id, lengths)}


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("4:0.5,8:0.75", ((8, 4), (4, 8), (4, 12))),
        ("4:1", ((16, 4),)),
        ("4:0.01", ()),  # less than one of the rows
        ("12:0.5", ()),  # the whole context
        ("8:0.5,40:0.9", ((8, 8), (6, 12), (2, 12))),
        ("full", ()),
        ("auto", ()),
    ],
)
def test_sizes_of_a_spec(spec, sizes):
    assert LengthGroups.parse(spec).sizes(16, 12) == sizes
    if sizes:
        assert str(LengthGroups.parse(spec)) == spec


@pytest.mark.parametrize("spec", ["", "4", "4:x", "4:0", "0:0.5", "4:1.5", "8:0.5,4:0.7", "4:0.5,8:0.5", "none"])
def test_a_wrong_spec_is_named(spec):
    with pytest.raises(UserError, match=r"24:0\.6,40:0\.9"):
        LengthGroups.parse(spec)
    with pytest.raises(UserError, match=r"data\.length_groups"):
        build.build(tiny.config(data__length_groups=spec))


def test_a_tower_that_reads_padding_is_not_cut():
    with pytest.raises(UserError, match=r"data\.length_groups=.4:0\.5. cuts texts"):
        build.build(tiny.config(data__length_groups="4:0.5", model__txt__pool="last"))


def lengths_that_fit(microbatches):
    """Half of 4 tokens or less and a quarter of more than 8, on each of 4 devices and in each microbatch."""
    return [(2, 12, 4, 7)[i // microbatches % 4] for i in range(tiny.BATCH)]


@pytest.mark.parametrize(
    ("objective", "devices", "microbatches", "strategy"),
    [
        ("clip", 1, 1, "dp"),
        pytest.param("nclip", 2, 2, "dp", marks=pytest.mark.slow),
        pytest.param("nclip-ema", 2, 1, "dp", marks=pytest.mark.slow),
        ("xclip", 4, 2, "fsdp"),
    ],
)
def test_gradients_of_cut_texts_are_those_of_whole_ones(objective, devices, microbatches, strategy):
    results = []
    for spec in (GROUPS, "full"):
        options = {"optim__microbatches": microbatches, "mesh__strategy": strategy}
        options |= {"mesh__data": 2, "mesh__fsdp": 2} if strategy == "fsdp" else {}
        options |= {"objective__nclip__target": "ema"} if "ema" in objective else {}
        config = tiny.config(objective.split("-")[0], data__length_groups=spec, **options)
        made = build.build(config, jax.devices()[:devices])
        results.append(gradients(made, batch_of(made, lengths_that_fit(microbatches))))
    (loss_cut, grads_cut, _), (loss, grads, _) = results
    assert loss_cut == pytest.approx(loss, rel=1e-6, abs=1e-6)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert largest > 1e-3
    chex.assert_trees_all_close(grads_cut, grads, rtol=1e-5, atol=1e-5 * largest)


def test_one_text_that_is_too_long_has_the_batch_computed_whole():
    made = build.build(tiny.config("clip", data__length_groups=GROUPS), jax.devices()[:1])
    whole = build.build(tiny.config("clip"), jax.devices()[:1])
    for longer, cut in ((0, 1.0), (1, 0.0)):
        lengths = lengths_that_fit(1)
        lengths[0] += 10 * longer
        batch = batch_of(made, lengths)
        losses = []
        for experiment in (made, whole):
            s = state.create(experiment.init, experiment.abstract)
            _, metrics = experiment.compiled(s, loader.to_global(batch, experiment.mesh))
            losses.append(float(metrics["loss"]))
            assert metrics.get("text/cut") == (cut if experiment is made else None)
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_groups_save_what_they_can_and_nearly_all_batches_fit():
    """Chosen from a thousand lengths for devices of 64 rows, and tried on ten thousand batches of other ones."""
    rng = np.random.default_rng(0)
    counts = np.bincount(np.minimum(rng.lognormal(2.8, 0.7, 1024).astype(int) + 3, 77), minlength=78)
    groups = length_groups.choose(counts, rows=64, draws=4, flops_of=float)
    assert 2 <= len(groups.cuts) <= 3 and groups.mean(float, 77) < 0.6 * 77
    assert LengthGroups.parse(str(groups)) == groups
    sizes = groups.sizes(64, 77)
    batches = np.sort(np.minimum(rng.lognormal(2.8, 0.7, (10_000, 4, 64)).astype(int) + 3, 77), axis=2)
    last = np.cumsum([rows for rows, _ in sizes]) - 1
    fitting = (batches[..., last] <= [tokens for _, tokens in sizes]).all(axis=(1, 2)).mean()
    assert fitting > 0.98
    # Nothing is cut where all texts fill the context.
    assert length_groups.choose(np.bincount([77] * 1024), rows=64, draws=4, flops_of=float) == length_groups.WHOLE


def test_a_run_chooses_groups_and_resumes_with_them_bit_exactly(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(length_groups, "_MULTIPLE", 2)
    monkeypatch.setattr(length_groups, "_LEAST_STEPS", 1)
    monkeypatch.setattr(length_groups, "_MISFITS", 0.5)  # of two rows a device, known by forty captions
    options = {"model__txt__context_length": 40}
    trainer.run(tiny.short(pairs, tmp_path / "whole", **options))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "encoded in groups" in line]
    spec = json.loads((tmp_path / "whole" / "config.json").read_text())["length_groups"]
    assert f"data.length_groups={spec}" in line and LengthGroups.parse(spec).cuts
    trainer.run(tiny.short(pairs, tmp_path / "again", **options))
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.rmtree(checkpoints / "4")
    capsys.readouterr()
    # What would be chosen now does not count.
    monkeypatch.setattr(length_groups, "_LEAST_STEPS", 1000)
    trainer.run(tiny.short(pairs, tmp_path / "again", **options))
    assert "resuming at step 2" in capsys.readouterr().out
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "again")
    ]
    losses, resumed = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in metrics)
    assert losses == resumed and {line["text/cut"] for line in metrics[1] if "loss" in line} <= {0.0, 1.0}


def test_flops_are_those_that_are_computed():
    config = build.build(tiny.config("clip")).config
    whole, cut = flops.train_step(config), flops.train_step(config, LengthGroups.parse("6:1"))
    tower = config.model.txt
    assert whole - cut == pytest.approx(3 * config.data.batch * (tower.flops(True) - tower.cut_flops(6)))
