"""The doctor: settings that are allowed and seldom right."""

import pytest

from tests.helpers.findings import built
from xclip_jax.commands.doctor import settings
from xclip_jax.commands.doctor.finding import OK, WARNING
from xclip_jax.config import load, schema


def settings_of(objective="clip", step_seconds=None, **changes):
    usual = {
        "steps": 100,
        "optim__warmup": 10,
        "data__batch": 256,
        "eval__sets": ("a",),
        "eval__every": 20,
        "log__collapse_warmup_steps": 20,
        "checkpoint__every": 20,
    }
    findings = list(settings.check_settings(built(objective, **usual | changes), step_seconds))
    assert all(x.mark == WARNING and x.remedy for x in findings) or [x.mark for x in findings] == [OK]
    return [x.line() for x in findings]


def test_settings_as_usual():
    (line,) = settings_of()
    assert line.startswith("ok") and settings_of(step_seconds=100.0) == [line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__warmup": 67}, "optim.warmup=67 is more than two thirds of the 100 steps"),
        ({"optim__warmup": 0}, "optim.warmup is 0"),
        ({"optim__lr": 5e-3}, "optim.lr=0.005 is 20 times the rate of 0.00025"),
        ({"data__batch": 64}, "data.batch=64: the contrastive loss tells a pair from 63 others"),
        ({"eval__every": 0}, "eval.every=0 evaluates at the end alone"),
        ({"eval__sets": (), "eval__final_sets": ("a",)}, "eval.sets is empty"),
        ({"eval__sets": ()}, "eval.sets and eval.final_sets are empty"),
        ({"eval__ema": True}, "eval.ema evaluates a moving average"),
        (
            {"log__collapse_warmup_steps": 500},
            "log.collapse_warmup_steps=500 is not below the 100 steps, so no step warns of a failure",
        ),
        ({"checkpoint__every": 0}, "checkpoint.every=0 saves at the end alone"),
        ({"step_seconds": 400.0}, "checkpoint.every=20 saves every 2.2 h"),
    ],
)
def test_settings_that_are_seldom_right(changes, words):
    (line,) = settings_of(**changes)
    assert words in line and line.startswith("warning  settings")


@pytest.mark.parametrize("name", ["demo", "pretrain:objective=clip", "pretrain", "finetune"])
def test_the_schedules_of_the_packages_recipes_are_usual(name):
    config = load.load_config(name)
    config.steps = config.steps or 1000
    assert list(settings._schedule(schema.resolve(config))) == []


def test_a_small_batch_of_few_pairs_is_as_usual():
    """The data allow no larger one."""
    experiment = built("clip", data__batch=16)
    for pairs, expected in ((None, 1), (32, 1), (31, 0), (16, 0)):
        lines = [x for x in settings.check_settings(experiment, None, pairs) if "tells a pair" in x.text]
        assert len(lines) == expected, pairs


def test_a_device_with_few_pairs(monkeypatch):
    """Of accelerators alone."""
    experiment = built("nclip", data__batch=64, optim__microbatches=4)
    assert not [line for line in settings.check_settings(experiment, None) if "a device encodes" in line.text]
    monkeypatch.setattr(settings.jax, "devices", lambda: [type("Device", (), {"platform": "tpu"})])
    (finding,) = [line for line in settings.check_settings(experiment, None) if "a device encodes" in line.text]
    assert "encodes 2 pairs at a time" in finding.text
