import dataclasses

import pytest
from flax.traverse_util import unflatten_dict

from studies import records
from tests.helpers import tiny
from tests.studies import made
from tests.studies.made import TEST_SET, VALIDATION_SET
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError


def test_arms_see_test_sets_at_their_end_alone():
    evaluated = "arm 'one' would be evaluated on '.*Greys/30' before its end"
    for tested, changes, message in (
        (True, {"optim.lrr": 1e-3}, "arm 'one': config key 'optim.lrr' is unknown"),
        (True, {"eval.sets": (TEST_SET,)}, evaluated),
        (False, {}, evaluated),
    ):
        with pytest.raises(UserError, match=message):
            made.matrix(dataclasses.replace(made.ONE, changes=changes, tested=tested)).runs()


def test_first_seeds_come_first_and_equal_configs_once():
    again = dataclasses.replace(made.ARMS[0], name="again")
    runs = made.matrix(made.ARMS[0], again, dataclasses.replace(made.ARMS[1], seeds=(3, 4))).runs()
    assert [(run.arm.name, run.seed) for run in runs] == [("clip", 0), ("xclip", 3), ("clip", 1), ("xclip", 4)]
    config = runs[1].config
    assert (config.seed, config.eval.sets, config.eval.sets_at_end) == (3, (VALIDATION_SET,), (TEST_SET,))


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    of_runs = made.matrix(values={"clip": {0: 1.0, 1: 2.0}, "xclip": {0: 3.0}}).records
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


def test_a_run_is_collected_from_its_folder(tmp_path):
    run = made.matrix().runs()[0]
    about = {"arm": "clip", "commit": "c", "workers": 1, "error": ""}
    made.write_folder(tmp_path, schema.to_dict(schema.resolve(run.config)), 12.3456789)
    record = records.collect(tmp_path, tested=True, **about)
    assert record.value(TEST_SET, "") == record.value(TEST_SET, "top1") == 12.3457 and record.key == run.key
    assert record.value("b", "") is None and record.environment == {"versions": {"jax": "1"}, "workers": 1}
    with pytest.raises(UserError, match=r"arm 'clip' is for choices and was evaluated on .*Greys/30, not for"):
        records.collect(tmp_path, tested=False, **about)
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="is not a finished run"):
        records.collect(tmp_path, tested=True, **about)
    assert not records.collect(tmp_path, tested=True, **about | {"error": "loss of step 3 is nan"}).results
