"""The study of CC12M: its declaration, its config file by arm, and run files of runs that were made elsewhere."""

import json

import pytest

from tests.study_records import finished
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.errors import UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.provenance import VALIDATION, Provenance
from xclip_jax.evaluators.published_sets import PAPER
from xclip_jax.evaluators.result import Result, to_json
from xclip_jax.run_folder import RunFolder
from xclip_jax.storage import write_json
from xclip_jax.study import cc12m, records
from xclip_jax.study.collect import collect
from xclip_jax.study.matrix import Matrix, Snapshot


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


def folder_of(path, config):
    """A finished run's folder, as a launch script would leave it."""
    saved = schema.to_dict(schema.resolve(config))
    folder = RunFolder(str(path))
    path.mkdir()
    write_json(folder.config_file, {"config": saved, "environment": {"commit": "a" * 40, "versions": {"jax": "1"}}})
    folder.metrics_file.write_text(json.dumps({"step": 1, "loss": 1.0, "samples_per_second": 32.0}) + "\n")
    role = Provenance(role=VALIDATION)
    results = [Result(name, "zeroshot", "top1", 7.0, headline=True, protocol=role) for name in config.eval.sets]
    results += [Result(name, "zeroshot", "top1", 7.0, headline=True) for name in config.eval.final_sets]
    environment = {"commit": "a" * 40, "versions": {"jax": "1"}}
    write_json(
        folder.results_file,
        {"results": {}, "records": to_json(results), "environment": environment, "seconds": 1.0, "config": saved},
    )
    return str(path)


def test_runs_made_elsewhere_are_collected_and_choose_recipes(matrix, tmp_path):
    """A candidate started by the config file alone is recognised; the arms that wait for it say so."""
    runs = tmp_path / "runs"
    argument = f"study_cc12m:seed={cc12m.TUNING_SEEDS[0]},runs={runs},arm="
    config = load_config(f"{argument}tuning_clip_lr0.002_w2000")
    assert config.optim.lr == 2e-3 and config.eval.final_sets == ()
    [path] = collect(matrix, runs, [folder_of(tmp_path / "candidate", config)])
    [record] = records.read_all(runs).values()
    assert path.name.startswith("tuning_clip_lr0.002_w2000-s100-") and record.section == "tuning"
    assert (record.commit, record.value("imagenet_minival", "top1")) == ("a" * 40, 7.0)
    with pytest.raises(UserError, match="exists: this run is finished"):
        list(collect(matrix, runs, [str(tmp_path / "candidate")]))
    with pytest.raises(UserError, match="arm 'clip' takes over the best recipe of clip, and not all of its candidates"):
        load_config(f"study_cc12m:arm=clip,runs={runs}")

    values = {arm.name: 1.0 for arm in matrix.study.of_section("tuning") if arm.objective == "clip"}
    for r in finished(matrix, values).values():
        if r.key != record.key:
            records.write(runs, r)
    config = load_config(f"study_cc12m:arm=clip,seed=2,runs={runs}")
    assert config.optim.lr == 2e-3 and config.seed == 2 and config.eval.final_sets == cc12m.TESTS
    [path] = collect(matrix, runs, [folder_of(tmp_path / "core", config)])
    assert path.name.startswith("clip-s2-")


def test_what_cannot_be_collected_is_one_sentence(matrix, tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run; --collect takes folders with a config\.json"):
        list(collect(matrix, tmp_path / "runs", [str(tmp_path)]))
    other = folder_of(tmp_path / "other", load_config("study_cc12m:epochs=1"))
    with pytest.raises(UserError, match="has the config of no run of study 'cc12m'; start runs by its config file"):
        list(collect(matrix, tmp_path / "runs", [other]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("arm=clap", "arm 'clap' is unknown; did you mean 'clip'"),
        ("arm=tuning_clip_lr0.001_w2000", "arm 'tuning_clip_lr0.001_w2000' has the seeds 100, not 0"),
    ],
)
def test_unknown_runs_are_one_sentence(argument, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(f"study_cc12m:{argument},runs={tmp_path}")
