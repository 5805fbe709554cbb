"""The doctor before a run: versions, samples, the time of a step, settings."""

import dataclasses
import sys

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.findings import built, only
from xclip_jax.commands import preflight
from xclip_jax.commands.preflight import Options, check_config
from xclip_jax.config import schema
from xclip_jax.demo import emoji
from xclip_jax.train import memory
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.checks import FAIL, OK, WARNING
from xclip_jax.train.job import Job
from xclip_jax.train.training_folder import TrainingFolder

QUICK = Options(samples=32, seconds=0, step="never")


def installed(folder, **versions):
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_versions_that_are_not_those_that_are_needed(tmp_path, monkeypatch):
    assert only(list(preflight.check_versions()), "versions", OK).values["jax"] == jax.__version__
    installed(tmp_path, optax="0.1.3", jaxlib="0.1.75", jax_cuda12_plugin="0.1.74")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(preflight.check_versions())
    assert [(finding.mark, finding.text.partition(",")[0]) for finding in findings] == [
        (FAIL, "optax is 0.1.3"),
        (FAIL, "jax-cuda12-plugin is 0.1.74 and jaxlib 0.1.75"),
        (WARNING, f"jax is {jax.__version__} and jaxlib 0.1.75; they are released and tested as a pair"),
    ]
    assert findings[0].remedy == "pip install 'optax>=0.2.5'"
    assert findings[1].remedy == f"pip install -U 'jax[cuda12]=={jax.__version__}'"


def test_packages_and_a_python_that_are_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        assert "not installed" in only(list(preflight.check_versions()), "versions", WARNING).text
    installed(tmp_path, xclip_jax="9.0")
    with (tmp_path / "xclip_jax-9.0.dist-info/METADATA").open("a") as file:
        file.write("Requires-Python: >=9\nRequires-Dist: of-nobody>=1; python_version > '3'\n")
        file.write("Requires-Dist: of-nobody-else; extra == 'test'\n")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(preflight.check_versions())
    assert [(finding.mark, finding.text) for finding in findings] == [
        (FAIL, "of-nobody is not installed"),
        (FAIL, f"Python is {'.'.join(map(str, sys.version_info[:3]))}, and xclip_jax needs >=9"),
    ]


def test_faults_of_the_config_and_of_the_model_end_the_checks(tmp_path):
    config = tiny.config("clip", run=tmp_path / "run", optim__lr=-1.0, data__sources=("folder:x",))
    findings = list(check_config(config, QUICK))
    assert "optim.lr" in only(findings, "config", FAIL).text and findings[-1].check == "config"
    config.optim.lr, config.mesh.data = 1e-3, 3
    findings = list(check_config(config, QUICK))
    model = [finding for finding in findings if finding.check == "model"]
    assert [finding.mark for finding in model] == [FAIL, WARNING] and findings[-1] is model[-1]
    assert "does not fit 8 devices" in model[0].text
    config.mesh.data, config.data.tokenizer = -1, str(tmp_path / "no.json")
    findings = list(check_config(config, QUICK))
    assert any(x.mark == FAIL and x.check == "model" and "no.json" in x.text for x in findings)
    assert list(tmp_path.iterdir()) == []


def start_of(objective="clip", **changes):
    config = schema.resolve(tiny.config(objective, **changes))
    return Job(config, TrainingFolder(config.run))


@pytest.fixture(scope="module")
def start(pairs):
    return start_of(data__sources=(f"folder:{pairs}",), run="/nowhere/run")


def sample_findings(pairs, step_seconds=None, **changes):
    start = start_of(data__sources=(f"folder:{pairs}",), run="/nowhere/run", **changes)
    return list(preflight.check_samples(start, step_seconds, QUICK))


def test_a_checkpoint_is_restored_before_the_step_is_timed(tmp_path, pairs):
    start = start_of(data__sources=(f"folder:{pairs}",), run=tmp_path / "run", data__length_groups="full")
    (finding,) = preflight.time_step(start)
    assert finding.check == "step" and finding.values["peak_bytes"] > finding.values["activations_bytes"] > 0
    with Checkpointer(tmp_path / "run") as checkpointer:
        state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), start.experiment.abstract)
        checkpointer.save(dataclasses.replace(state, step=jax.numpy.asarray(4)), {"samples": 64})
    del start.resumes
    findings = preflight.time_step(start)
    assert only(findings, "resume", OK).text.startswith("the checkpoint of step 4 can be read")
    assert "the remaining 6 steps take" in only(findings, "step", OK).text
    for data in (tmp_path / "run/checkpoints/4/state").rglob("d/*"):
        data.unlink()
    findings = preflight.time_step(start)
    assert "checkpoints/4" in only(findings, "resume", FAIL).text and findings[-1].values["step_seconds"] > 0


def test_a_step_that_does_not_fit_is_not_run(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "fits_by_far", lambda *_: False)
    monkeypatch.setattr(memory, "compile_if_fits", lambda _: (None, "it needs more"))
    monkeypatch.setattr(preflight, "time_step", lambda *_: pytest.fail("run"))
    config = tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))
    findings = list(check_config(config, dataclasses.replace(QUICK, step="always")))
    assert "optim.microbatches" in only(findings, "memory", FAIL).remedy
    assert "unknown without a step" in only(findings, "reading", OK).text


def test_an_expensive_step_is_not_compiled_on_a_cpu(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "compile_if_fits", lambda _: pytest.fail("compiled"))
    monkeypatch.setattr(preflight, "CHEAP_FLOPS", 1.0)
    config = tiny.config("clip", run=tmp_path / "run", data__sources=(f"folder:{pairs}",))
    findings = list(check_config(config, dataclasses.replace(QUICK, step="auto")))
    assert "the step is not compiled here" in only(findings, "memory", OK).text
    assert not [x for x in findings if x.check == "step"]


def test_reading_is_compared_with_the_step(pairs):
    assert "unknown without a step" in only(sample_findings(pairs), "reading", OK).text
    findings = sample_findings(pairs, step_seconds=60.0)
    assert only(findings, "reading", OK).values["needed_samples_per_second"] == pytest.approx(16 / 60)
    finding = only(sample_findings(pairs, step_seconds=1e-7), "reading", WARNING)
    assert finding.values["wait_share"] > 0.9 and "data.workers" in finding.remedy
    assert only(sample_findings(pairs, step_seconds=1e-7, data__cache=True), "reading", OK)


def test_bad_samples(tmp_path):
    pairs = tiny.folder(tmp_path / "pairs", n=60)
    for number in (1, 2, 3):
        (pairs / f"{number:03}.png").write_bytes(b"no image")
    changes = {"data__batch": 56}
    findings = sample_findings(pairs, **changes, data__max_bad_fraction=0.001)
    finding = only(findings, "samples", FAIL)
    assert finding.values["bad"] > 0 and "pairs/00" in finding.text and "the run stops" in finding.text
    assert only(sample_findings(pairs, **changes, data__max_bad_fraction=0.9), "samples", OK)
    share = finding.values["bad_share"]
    findings = sample_findings(pairs, **changes, data__max_bad_fraction=1.4 * share)
    assert only(findings, "samples", WARNING)
    for path in pairs.glob("*.png"):
        path.write_bytes(b"no image")
    findings = sample_findings(pairs, data__batch=8)
    assert "bad samples in a row" in only(findings, "samples", FAIL).text


def test_equal_captions_are_false_negatives(tmp_path):
    pairs = tiny.folder(tmp_path / "pairs", n=40)
    for path in pairs.glob("*.txt"):
        path.write_text("the same for all of them")
    finding = only(sample_findings(pairs, data__spread_duplicate_captions=True), "texts", FAIL)
    assert "texts that were read are equal in their" in finding.text and "nothing to learn" in finding.text
    for path in list(pairs.glob("*.txt"))[::2]:
        path.write_text("but not for a half")
    finding = only(sample_findings(pairs), "texts", WARNING)
    assert finding.values["duplicate_share"] == 1 and "spread_duplicate_captions" in finding.remedy
    assert "which makes them false negatives" in finding.text
    assert finding.values["full_share"] == 1
    assert only(sample_findings(pairs, data__spread_duplicate_captions=True), "texts", OK)


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
    findings = list(preflight.check_settings(built(objective, **usual | changes), step_seconds))
    assert all(x.mark == WARNING and x.remedy for x in findings) or [x.mark for x in findings] == [OK]
    return [x.line() for x in findings]


def test_settings_as_usual():
    (line,) = settings_of()
    assert line.startswith("ok") and settings_of(step_seconds=100.0) == [line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval__sets": ()}, "eval.sets and eval.final_sets are empty"),
        ({"eval__ema": True}, "eval.ema evaluates a moving average"),
        (
            {"log__collapse_warmup_steps": 500},
            "log.collapse_warmup_steps=500 is not below the 100 steps, so no step warns of a failure",
        ),
        ({"checkpoint__every": 0}, "checkpoint.every=0 saves only at the end"),
        ({"step_seconds": 400.0}, "checkpoint.every=20 saves every 2.2 h"),
    ],
)
def test_settings_with_which_a_run_shows_nothing_or_loses_much(changes, words):
    (line,) = settings_of(**changes)
    assert words in line and line.startswith("warning  settings")


def test_a_missing_extra_is_one_failure(tmp_path, monkeypatch, capfd):
    """Of the demo's training data and all of its evaluation sets; nothing is announced as downloading."""
    monkeypatch.setattr(emoji, "PACKAGES", ("not-installed",))
    sets = ("emoji/test_concepts", "emoji/test_rendering")
    config = tiny.config("clip", data__sources=("demo:train",), data__dir=str(tmp_path), eval__sets=sets)
    failures = [finding for finding in check_config(config, QUICK) if finding.mark == FAIL]
    assert [finding.text for finding in failures] == [
        "the demo data needs the package 'not-installed': pip install 'xclip_jax[demo]'"
    ]
    assert "ownload" not in "".join(capfd.readouterr())
