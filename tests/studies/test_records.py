import dataclasses
import pathlib

import pytest
from flax.traverse_util import unflatten_dict

from studies import records
from studies.declaration import Arm
from studies.matrix import Snapshot
from studies.photographs import stages
from tests.helpers import tiny
from tests.studies import made
from tests.studies.greys import TEST_SET, VALIDATION_SET
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError


@pytest.mark.parametrize(
    ("tested", "changes", "message"),
    [
        (True, {"optim.lrr": 1e-3}, "arm 'new': config key 'optim.lrr' is unknown"),
        (True, {"eval.sets": (TEST_SET,)}, "arm 'new' would be evaluated on '.*/test' before its end"),
        (False, {"eval.sets_at_end": (TEST_SET,)}, "arm 'new' would be evaluated on '.*/test' before its end"),
    ],
)
def test_arms_see_test_sets_at_their_end_alone(tested, changes, message):
    new = Arm("new", "", "tiny:objective=clip", changes, (0,), tested)
    with pytest.raises(UserError, match=message):
        made.matrix(new).runs()


def test_configs_of_arms():
    terms = {"objective.name": "xclip", "objective.terms": {"clip": 1.0, "nclip": 0.0}}
    chosen = Arm("chosen", "", "tiny:objective=clip", terms, (3, 4), tested=False)
    again = dataclasses.replace(made.ARMS[0], name="again")
    runs = made.matrix(*made.ARMS, chosen, again).runs()
    # First seeds first, and equal configs once.
    names = [(run.arm.name, run.seed) for run in runs]
    assert names == [("clip", 0), ("xclip", 0), ("chosen", 3), ("clip", 1), ("xclip", 1), ("chosen", 4)]
    assert runs[2].config.objective.terms.to_dict() == {"clip": 1.0, "nclip": 0.0}
    assert (runs[2].config.seed, runs[2].config.eval.sets_at_end) == (3, ())
    assert (runs[1].config.eval.sets, runs[1].config.eval.sets_at_end) == ((VALIDATION_SET,), (TEST_SET,))


def test_values_of_finished_runs():
    matrix = made.matrix()
    snapshot = Snapshot(matrix, made.finished(matrix, {"clip": {0: 4.0, 1: 6.0}}))
    top1, both, rank = made.MEASURES
    assert snapshot.values("clip", top1) == {0: 4.0, 1: 6.0} and snapshot.values("clip", both) == {0: 6.0, 1: 9.0}
    assert snapshot.values("clip", rank)[0] == pytest.approx(2.0794415)  # ln 8
    assert snapshot.values("xclip", top1) == snapshot.values("unknown", top1) == {}
    assert snapshot.missing() == {"xclip": 2}


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    matrix = made.matrix()
    of_runs = made.finished(matrix, {"clip": {0: 1.0, 1: 2.0}, "xclip": {0: 3.0}})
    for record in of_runs.values():
        assert records.write(path, record) == record.name
    again = records.read_all(path)
    assert {key: records.render(r) for key, r in again.items()} == {k: records.render(r) for k, r in of_runs.items()}
    with pytest.raises(UserError, match="this run is finished; delete its line to run it again"):
        records.write(path, next(iter(of_runs.values())))
    lines = path.read_text().splitlines(keepends=True)
    for text, message in (
        (lines[0] + lines[1][:50], r"line 2, is not the record of a run"),
        (lines[0] + lines[1].replace('"seed": 0}', '"seed": 8}'), "the seed differs from the config.s"),
        (lines[0] + lines[0].replace('"arm": "clip"', '"arm": "other"'), r"line 2, repeats other-s0-\w+"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            records.read_all(path)


def test_keys_have_what_decides_the_result():
    def key(**changes):
        return records.config_key(tiny.config("clip", **changes).to_dict())

    assert key() == key(run="elsewhere", data__threads=7, checkpoint__every=3, log__every=9, data__dir="/data")
    assert len({key(), key(seed=1), key(steps=11), key(optim__lr=2e-3), key(eval__sets=("a",))}) == 5
    flat = schema.flatten(tiny.config("clip").to_dict())
    del flat["optim.on_bad_steps"]  # a key that is newer than a record
    assert records.config_key(unflatten_dict(flat, sep=".")) == key()


def test_an_old_record_of_the_photographs_is_recognised(monkeypatch):
    """A line of e2fee370: the arm of today has its key."""
    record = records.read((pathlib.Path(__file__).parent / "golden" / "record.jsonl").read_text())
    steps, settings = 1280, stages.TEAMS["xclip"][2]
    arm = stages.arm_of("final_xclip", "", "xclip", stages.xclip(settings, steps), (3,), "split=train")
    matrix = stages.PhotographsMatrix(stages.study_of([arm]), load_config)
    assert matrix.run(arm, 3).key == record.key and record.value("photographs/test_unseen", "") == 50.0


def test_a_run_is_collected_from_its_folder(tmp_path):
    run = made.matrix().runs()[0]
    config = schema.to_dict(schema.resolve(run.config))
    about = {"arm": "clip", "commit": "c", "workers": 1, "error": ""}
    made.write_folder(tmp_path, config, 12.3456789)
    record = records.collect(tmp_path, tested=True, **about)
    assert record.value(TEST_SET, "") == record.value(TEST_SET, "top1") == 12.3457 and record.key == run.key
    assert record.value("b", "") is None and record.environment == {"versions": {"jax": "1"}, "workers": 1}
    with pytest.raises(UserError, match=r"arm 'clip' is for choices and was evaluated on .*test, not for validation"):
        records.collect(tmp_path, tested=False, **about)
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="is not a finished run"):
        records.collect(tmp_path, tested=True, **about)
    assert not records.collect(tmp_path, tested=True, **about | {"error": "loss of step 3 is nan"}).results
