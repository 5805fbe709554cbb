"""Texts in groups of their lengths: the same numbers as whole ones, and groups that batches fit."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import scipy.stats

from tests.helpers import tiny
from tests.train.test_step import catching
from xclip_jax.config.schema import resolve
from xclip_jax.data import length_groups, loader, sources
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.train import build, cost, prepare, trainer, weights
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

GROUPS = LengthGroups(((4, 0.5), (8, 0.75)))


def batch_of(experiment, lengths):
    text = np.random.default_rng(0).integers(1, 200, (tiny.BATCH, tiny.LENGTH), np.int32)
    text[np.arange(tiny.BATCH), np.array(lengths) - 1] = experiment.tokenizer.eot_id
    return tiny.batch(0, eot=experiment.tokenizer.eot_id) | {"text": text}


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("4:0.5,8:0.75", ((8, 4), (4, 8), (4, 12))),
        ("4:1", ((16, 4),)),
        ("4:0.01", ()),  # less than one of the rows
        ("12:0.5", ()),  # the whole context
        ("8:0.5,40:0.9", ((8, 8), (6, 12), (2, 12))),
        ("full", ()),
    ],
)
def test_sizes_of_a_spec(spec, sizes):
    assert LengthGroups.parse(spec).sizes(16, 12) == sizes
    assert str(LengthGroups.parse(spec)) == spec


def lengths_that_fit(microbatches):
    """Half of 4 tokens or less and a quarter of more than 8, on each of 4 devices and in each microbatch."""
    return [(2, 12, 4, 7)[i // microbatches % 4] for i in range(tiny.BATCH)]


@pytest.mark.parametrize(
    ("objective", "devices", "microbatches", "strategy"),
    [
        pytest.param("nclip", 1, 1, "dp", marks=pytest.mark.slow),
        ("clip", 2, 2, "dp"),
        pytest.param("nclip-ema", 2, 1, "dp", marks=pytest.mark.slow),
        pytest.param("xclip-ema", 4, 2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_cut_texts_are_those_of_whole_ones(objective, devices, microbatches, strategy):
    """Also if one text does not fit, so that the batch is computed whole."""
    options = {"optim__microbatches": microbatches, "mesh__strategy": strategy}
    options |= {"mesh__data": 2, "mesh__fsdp": 2} if strategy == "fsdp" else {}
    options |= {"objective__nclip__target": "ema"} if "ema" in objective else {}
    config = tiny.config(objective.split("-")[0], **options)
    whole = build.build(config, jax.devices()[:devices])
    lengths = lengths_that_fit(microbatches)
    batches = [batch_of(whole, [lengths[0] + longer, *lengths[1:]]) for longer in (0, 10)]
    results = []
    for experiment in (dataclasses.replace(whole, length_groups=GROUPS), whole):
        step, first = catching(experiment)
        results.append([step(first, loader.to_global(batch, experiment.mesh)) for batch in batches])
    for (cut, cut_metrics), (full, metrics), fits in zip(*results, (1.0, 0.0), strict=True):
        assert cut_metrics["text/cut"] == fits and "text/cut" not in metrics
        assert float(cut_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6, abs=1e-6)
        largest = max(np.abs(g).max() for g in jax.tree.leaves(full.opt_state))
        assert largest > 1e-3
        chex.assert_trees_all_close(cut.opt_state, full.opt_state, rtol=1e-5, atol=1e-5 * largest)


def test_groups_save_what_they_can_and_nearly_all_batches_fit():
    """Chosen from a thousand lengths for devices of 64 rows, and tried on ten thousand batches of other ones."""
    rng = np.random.default_rng(0)
    counts = np.bincount(np.minimum(rng.lognormal(2.8, 0.7, 1024).astype(int) + 3, 77), minlength=78)
    groups = length_groups.choose(counts, rows=64, draws=4, flops_of=float)
    sizes = groups.sizes(64, 77)
    assert 2 <= len(groups.cuts) <= 3 and sum(rows * tokens for rows, tokens in sizes) < 0.6 * 77 * 64
    assert LengthGroups.parse(str(groups)) == groups
    batches = np.sort(np.minimum(rng.lognormal(2.8, 0.7, (10_000, 4, 64)).astype(int) + 3, 77), axis=2)
    last = np.cumsum([rows for rows, _ in sizes]) - 1
    fitting = (batches[..., last] <= [tokens for _, tokens in sizes]).all(axis=(1, 2)).mean()
    assert fitting > 0.98
    # Nothing is cut where all texts fill the context.
    assert length_groups.choose(np.bincount([77] * 1024), rows=64, draws=4, flops_of=float) == length_groups.WHOLE


@pytest.mark.parametrize("rows", [1, 7, 96, 1000])
def test_groups_have_the_rows_that_they_were_chosen_for(rows, monkeypatch):
    """No row is lost where the shares are not round, in the spec of a config neither."""
    monkeypatch.setattr(scipy.stats.binom, "isf", lambda q, rows, p: np.floor(rows * p))  # as many as are expected
    counts = np.bincount([8] * 30_000 + [16] * 40_000 + [77] * 30_000, minlength=78)
    groups = length_groups.choose(counts, rows=rows, draws=1, flops_of=float)
    longer = [int(rows * (n + 2 * n**0.5 + 1) / 1e5) for n in (70_000, 30_000)]
    ends = sorted({rows - n for n in (*longer, 0) if n < rows})
    sizes = LengthGroups.parse(str(groups)).sizes(rows, 77)
    assert np.cumsum([n for n, _ in sizes]).tolist() == ends


@pytest.mark.slow
def test_a_run_chooses_groups_and_resumes_with_them_bit_exactly(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(length_groups, "_MULTIPLE", 2)
    monkeypatch.setattr(length_groups, "_LEAST_STEPS", 1)
    monkeypatch.setattr(length_groups, "_MISFITS", 0.5)  # of two rows a device, known by forty captions
    options = {"model__txt__context_length": 40}
    trainer.run(tiny.short(pairs, tmp_path / "whole", **options))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "encoded in groups" in line]
    spec = json.loads((tmp_path / "whole" / "config.json").read_text())["length_groups"]
    assert spec in line and LengthGroups.parse(spec).cuts
    trainer.run(tiny.short(pairs, tmp_path / "again", **options))
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.rmtree(checkpoints / "4")
    capsys.readouterr()
    # What would be chosen now does not count.
    monkeypatch.setattr(length_groups, "_LEAST_STEPS", 1000)
    trainer.run(tiny.short(pairs, tmp_path / "again", **options))
    assert "resuming at step 2" in capsys.readouterr().out
    metrics = [tiny.lines(tmp_path / name) for name in ("whole", "again")]
    losses, resumed = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in metrics)
    assert losses == resumed and 1.0 in {line["text/cut"] for line in metrics[1] if "loss" in line}

    # With other rows a device they are chosen anew.
    config = resolve(tiny.short(pairs, tmp_path / "again", optim__microbatches=2, **options))
    assert prepare.prepare(config, RunWriter(config.run))[0].experiment.length_groups == length_groups.WHOLE


def test_groups_of_a_run_are_kept_for_the_rows_that_they_are_for(run, tmp_path, capsys):
    folder = RunWriter(shutil.copytree(run, tmp_path / "run"))
    config = dataclasses.replace(weights.run_config(folder), run=str(folder.path))
    old, new = LengthGroups.parse("4:0.5"), LengthGroups.parse("8:0.5")
    content = json.loads(folder.config_file.read_text()) | {"length_groups": str(old)}
    folder.config_file.write_text(json.dumps(content | {"text_rows": [1, 8]}))
    assert folder.length_groups((1, 8)) == old and capsys.readouterr().out == ""
    assert folder.length_groups((4, 2)) is None
    # A start without groups does not replace them; those that are chosen anew do.
    full = dataclasses.replace(config, data=dataclasses.replace(config.data, length_groups="full"))
    for started, kept in ((full, (1, 8)), (config, (4, 2))):
        with folder.claimed(started, [], new, (4, 2)):
            pass
        assert folder.length_groups(kept) == (old if started is full else new)


def test_captions_are_counted_by_their_tokens(tmp_path):
    tiny.folder(tmp_path / "pairs", 5)
    for i, words in enumerate(("a", "abc", "abcdef", "b", "abcdefgh")):
        (tmp_path / "pairs" / f"{i:03d}.txt").write_text(words)
    config = tiny.config("clip", data__sources=(f"folder:{tmp_path / 'pairs'}",), model__txt__context_length=12)
    made = build.build(config)
    counts = prepare.count_lengths(made, sources.open_sources(made.config.data))
    assert counts.tolist() == np.bincount([3, 5, 8, 3, 10], minlength=13).tolist()  # start, bytes and end


def test_auto_counts_a_frozen_tower_without_its_backward_pass(monkeypatch, capsys):
    counts = np.bincount([4] * 1024, minlength=41)
    monkeypatch.setattr(prepare, "count_lengths", lambda *_: counts)
    monkeypatch.setattr(length_groups, "_LEAST_STEPS", 1)
    saved = []
    for frozen in (("txt",), (), ("img",)):
        config = tiny.config("clip", data__batch=512, model__txt__context_length=40, init__freeze=frozen)
        made = build.build(config)
        assert prepare.choose_length_groups(made, []).cuts
        saved.append(float(capsys.readouterr().out.split("saves ")[1].split("%")[0]))
    assert saved[0] < saved[1] < saved[2]
    whole = sum(cost.forward_flops(made.config).values())
    assert saved[1] == pytest.approx(100 * (made.model.txt.cut_flops(40) - made.model.txt.cut_flops(8)) / whole, abs=3)

    last = build.build(tiny.config("clip", data__batch=512, model__txt__context_length=40, model__txt__pool="last"))
    assert prepare.choose_length_groups(last, []) == length_groups.WHOLE  # it reads padding
    for method in ("cut_flops", "flops"):  # not counted
        with monkeypatch.context() as patch:
            patch.setattr(type(made.model.txt), method, lambda *_, **__: None)
            assert prepare.choose_length_groups(made, []) == length_groups.WHOLE


def test_flops_are_those_that_are_computed():
    config = build.build(tiny.config("clip")).config
    whole, cut = cost.step_flops(config), cost.step_flops(config, LengthGroups.parse("6:1"))
    tower = config.model.tower("txt")
    assert whole - cut == pytest.approx(3 * config.data.batch * (tower.flops(True) - tower.cut_flops(6)))
