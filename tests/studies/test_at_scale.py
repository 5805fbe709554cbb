"""The study of CC12M: its declaration, its recipe by arm, and records of runs that were made elsewhere."""

import json

import pytest

from studies import records
from studies.cc12m import study as cc12m
from studies.matrix import Matrix, Snapshot
from studies.runner import collect
from studies.worker import DIVERGED
from tests.studies.made_records import finished, write_folder
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.sets.published import PAPER


@pytest.fixture(scope="module")
def matrix():
    return Matrix(cc12m.study(), load_config)


def test_the_declared_study(matrix):
    configs = {run.arm.name: run.config for run in Snapshot(matrix, {}).runs}
    candidate = configs["tuning_clip_lr0.001_w4000"]
    assert candidate.steps == round(0.2 * configs["clip"].steps) and candidate.optim.warmup == 800
    assert configs["clip_twice"].steps == 2 * configs["clip"].steps
    assert configs["xclip_70"].objective.terms.to_dict() == {"clip": 0.3, "nclip": 0.7}
    assert not set(cc12m.VALIDATION) & {*cc12m.TESTS, *PAPER}
    for name in (*cc12m.VALIDATION, *cc12m.TESTS):
        registry.check(name)


def folder_of(path, config, **options):
    """A run's folder, as a launch script would leave it."""
    write_folder(path, schema.to_dict(schema.resolve(config)), **options)
    return str(path)


def test_runs_made_elsewhere_are_collected_and_choose_recipes(matrix, tmp_path):
    """A candidate started by the config file alone is recognised; the arms that wait for it say so."""
    runs = tmp_path / "runs.jsonl"
    argument = f"{cc12m.RECIPE}:seed={cc12m.TUNING_SEEDS[0]},runs={runs},arm="
    config = load_config(f"{argument}tuning_clip_lr0.002_w2000")
    assert config.optim.lr == 2e-3 and config.eval.final_sets == ()
    [name] = collect(matrix, runs, [folder_of(tmp_path / "candidate", config)])
    [record] = records.read_all(runs).values()
    assert name.startswith("tuning_clip_lr0.002_w2000-s100-") and record.section == "tuning"
    assert (record.commit, record.value("imagenet_minival", "top1")) == ("a" * 40, 7.0)
    assert record.environment["workers"] is None
    with pytest.raises(UserError, match="this run is finished"):
        list(collect(matrix, runs, [str(tmp_path / "candidate")]))
    with pytest.raises(UserError, match="arm 'clip' takes over the best recipe of clip, and not all of its candidates"):
        load_config(f"{cc12m.RECIPE}:arm=clip,runs={runs}")

    values = {arm.name: 1.0 for arm in matrix.study.of_section("tuning") if arm.objective == "clip"}
    for r in finished(matrix, values).values():
        if r.key != record.key:
            records.write(runs, r)
    config = load_config(f"{cc12m.RECIPE}:arm=clip,seed=2,runs={runs}")
    assert config.optim.lr == 2e-3 and config.seed == 2 and config.eval.final_sets == cc12m.TESTS
    [name] = collect(matrix, runs, [folder_of(tmp_path / "core", config)])
    assert name.startswith("clip-s2-")


def test_what_cannot_be_collected_is_one_sentence(matrix, tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run; --collect takes folders with a config\.json"):
        list(collect(matrix, tmp_path / "runs.jsonl", [str(tmp_path)]))
    other = folder_of(tmp_path / "other", load_config(f"{cc12m.RECIPE}:epochs=1"))
    with pytest.raises(UserError, match="has the config of no run of study 'cc12m'; start runs by its config file"):
        list(collect(matrix, tmp_path / "runs.jsonl", [other]))


def candidate(lr=0.002):
    return load_config(f"{cc12m.RECIPE}:seed={cc12m.TUNING_SEEDS[0]},arm=tuning_clip_lr{lr:g}_w2000")


def test_all_commits_of_a_run_are_recorded(matrix, tmp_path):
    first, later = "a" * 40, "b" * 40
    resumed = folder_of(tmp_path / "resumed", candidate(), commits=(first, later))
    list(collect(matrix, tmp_path / "runs.jsonl", [resumed]))
    [record] = records.read_all(tmp_path / "runs.jsonl").values()
    assert record.commit == f"{first}, {later}"

    changed = folder_of(tmp_path / "changed", candidate(0.001), commits=(first, f"{later}-dirty", first))
    unknown = folder_of(tmp_path / "unknown", candidate(0.004), commits=("unknown",))
    for folder, name in ((changed, f"{later}-dirty"), (unknown, "unknown")):
        with pytest.raises(UserError, match=rf"by code that is not that of a commit \({name}\)"):
            list(collect(matrix, tmp_path / "runs.jsonl", [folder]))
    list(collect(matrix, tmp_path / "runs.jsonl", [changed], allow_dirty=True))
    list(collect(matrix, tmp_path / "runs.jsonl", [unknown], commit=later))
    commits = {record.commit for record in records.read_all(tmp_path / "runs.jsonl").values()}
    assert commits == {f"{first}, {later}", f"{first}, {later}-dirty", later}


def test_runs_that_diverged_are_collected_as_such(matrix, tmp_path):
    """By the mark that the study's own processes leave, or by the word of whoever collects."""
    runs, why = tmp_path / "runs.jsonl", "loss of step 3 is nan"
    marked = folder_of(tmp_path / "marked", candidate(), results=False)
    with pytest.raises(UserError, match="is not a finished run"):
        list(collect(matrix, runs, [marked]))
    (tmp_path / "marked" / DIVERGED).write_text(json.dumps({"error": why}))
    unmarked = folder_of(tmp_path / "unmarked", candidate(0.004), results=False)
    list(collect(matrix, runs, [marked]))
    list(collect(matrix, runs, [unmarked], diverged="it said so"))
    assert [(r.error, list(r.results)) for r in records.read_all(runs).values()] == [(why, []), ("it said so", [])]
    with pytest.raises(UserError, match="has results; --diverged is for runs that ended without"):
        list(collect(matrix, runs, [folder_of(tmp_path / "done", candidate(0.001))], diverged="it said so"))


def test_another_recipe_is_named_in_the_commands():
    assert cc12m.study().command == "python -m studies --study cc12m"
    assert cc12m.study("recipe.py:root=/a").command.endswith("--study cc12m --recipe recipe.py:root=/a")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("arm=clap", "arm 'clap' is unknown; did you mean 'clip'"),
        ("arm=tuning_clip_lr0.001_w2000", "arm 'tuning_clip_lr0.001_w2000' has the seeds 100, not 0"),
    ],
)
def test_unknown_runs_are_one_sentence(argument, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(f"{cc12m.RECIPE}:{argument},runs={tmp_path / 'runs.jsonl'}")
