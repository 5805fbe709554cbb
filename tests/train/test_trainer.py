import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest

from tests.helpers import tiny
from tests.helpers.made_results import zero_shot
from xclip_jax.config import schema
from xclip_jax.core import console, storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import CLOCKS, RunFolder
from xclip_jax.data import loader
from xclip_jax.evaluators.results import flat, from_json
from xclip_jax.processes.interrupt import EXIT_RESUMABLE
from xclip_jax.train import build, job, trainer
from xclip_jax.train.batches import InputStallTimer
from xclip_jax.train.callbacks import Callback
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import MetricWriter, Progress
from xclip_jax.train.training_folder import TrainingFolder


def config(pairs, run, **changes):
    return tiny.config(run=run, **{"data__sources": (f"folder:{pairs}",)} | changes)


def logged(run):
    """Training metrics by step, without those that measure time."""
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCKS} for line in tiny.lines(run)}


def final_state(c):
    p = build.build(c)
    with Checkpointer(c.run) as checkpointer:
        state, position = checkpointer.restore(p.abstract)
    return jax.device_get(state), position


class Stopped(Exception):
    pass


class Recorder(Callback):
    def __init__(self):
        self.steps, self.ends = [], []

    def on_log(self, step, metrics):
        self.steps.append((step, metrics["loss"]))

    def on_end(self, job, variables, results):
        self.ends.append((job.folder.read_results()["results"], sorted(variables), results))


@pytest.fixture(scope="module")
def straight(pairs, tmp_path_factory):
    """Ten steps without a break: the config, the last state and position, and what a callback was called with."""
    c, recorder = config(pairs, tmp_path_factory.mktemp("straight") / "run"), Recorder()
    trainer.run(c, [recorder])
    return c, *final_state(c), recorder


def test_resume_is_bit_exact(pairs, tmp_path, straight, monkeypatch):
    """Killed at step 7, resumed from step 5: state and metrics, and so the data, are those of ten steps."""
    c, seen = config(pairs, tmp_path / "run"), []
    original = loader.to_global

    def counted(batch, mesh):
        if len(seen) == 7:
            raise Stopped
        seen.append(batch)
        return original(batch, mesh)

    monkeypatch.setattr(loader, "to_global", counted)
    with pytest.raises(Stopped):
        trainer.run(c)
    monkeypatch.undo()
    trainer.run(c)
    state, position = final_state(c)
    chex.assert_trees_all_equal(state, straight[1])
    counters = position.pop("counters")
    assert counters == straight[2].pop("counters")
    assert position == straight[2] == {"batch": tiny.BATCH, "samples": 10 * tiny.BATCH, "seed": 0}
    assert counters["samples"] == 10 * tiny.BATCH
    assert counters["bad"] == {}
    assert counters["tokens"] == logged(tmp_path / "run")[10]["tokens"] > 10 * tiny.BATCH
    assert logged(tmp_path / "run") == logged(pathlib.Path(straight[0].run))
    assert list(logged(tmp_path / "run")) == list(range(1, 11))


def test_callbacks_receive_metrics_and_the_model(straight):
    recorder = straight[3]
    assert recorder.steps == [(step, line["loss"]) for step, line in logged(pathlib.Path(straight[0].run)).items()]
    assert recorder.ends == [({}, ["batch_stats", "params"], [])]


@pytest.mark.parametrize(("expected", "warned"), [(0, False), (4, False), (5, False), (7, True), (2.5, True)])
def test_a_schedule_for_other_data_is_warned_of(expected, warned, straight, capsys):
    prepared = job.prepare(schema.resolve(straight[0]), TrainingFolder(straight[0].run))
    log = dataclasses.replace(prepared.config.log, expected_epochs=expected)
    trainer.warn_of_epochs(dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, log=log)), "pairs")
    line = capsys.readouterr().out  # 10 steps of 16 are 4 epochs of 40 pairs
    remedy = f"RECIPE:pairs=40, or set --config.steps={round(2.5 * expected)}, optim.warmup and eval.every"
    assert (
        f"WARNING: 10 steps are 4 epochs of these 40 pairs, and the recipe is meant for {expected:g}" in line
    ) == warned
    assert (remedy in line) == warned


def test_sigterm_saves_and_the_same_command_goes_on(pairs, tmp_path, monkeypatch, capsys):
    script = (
        "import sys; from tests.train.test_trainer import config; from xclip_jax.train import trainer;"
        "trainer.run(config(*sys.argv[1:], steps=100_000, checkpoint__every=1000))"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    run, original, batches = tmp_path / "run", loader.to_global, []
    process = subprocess.Popen([sys.executable, "-c", script, str(pairs), str(run)], env=env)
    deadline = time.time() + 300
    while time.time() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_RESUMABLE
    saved = RunFolder(run).latest_step()
    assert saved == tiny.lines(run)[-1]["step"] >= 1

    def three(batch, mesh):
        batches.append(batch)
        if len(batches) == 3:  # the first step is logged after the second has begun
            raise Stopped
        return original(batch, mesh)

    monkeypatch.setattr(loader, "to_global", three)
    with pytest.raises(Stopped):
        trainer.run(config(pairs, run, steps=100_000, checkpoint__every=1000))
    assert f"resuming at step {saved}, sample {16 * saved:,}" in capsys.readouterr().out
    assert tiny.lines(run)[-1]["step"] == saved + 1


def test_complete_run_says_so_and_trains_no_more(straight, capsys, monkeypatch):
    monkeypatch.setattr(job, "build", lambda _: pytest.fail("a complete run was built again"))
    trainer.run(straight[0])
    assert "is complete at step 10" in capsys.readouterr().out


def test_run_folder_holds_what_is_needed_to_repeat_it(straight):
    record = json.loads((pathlib.Path(straight[0].run) / "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-3
    assert record["environment"]["versions"].keys() >= {"jax", "flax", "xclip_jax"}
    assert record["environment"]["commit"]
    line = logged(pathlib.Path(straight[0].run))[10]
    alarms = {"clip/ln_b", "nclip/mutual_information_img", "nclip/clusters_txt", "nclip/agreement", "rank/img"}
    assert alarms | {"loss", "grad_norm", "lr", "epoch"} <= line.keys()
    assert line["epoch"] == pytest.approx(10 * tiny.BATCH / 40)
    assert any((pathlib.Path(straight[0].run) / "tensorboard").iterdir())
    results = json.loads((pathlib.Path(straight[0].run) / "results.json").read_text())
    assert {"results", "config", "environment"} <= results.keys()


def test_other_settings_in_the_same_folder_are_refused(pairs, straight):
    c = config(pairs, straight[0].run, optim__lr=2e-3)
    with pytest.raises(UserError, match=r"different config: optim\.lr \(0\.001 in config\.json, 0\.002 now\)"):
        trainer.run(c)


def test_a_complete_run_is_not_one_of_other_data(pairs, straight, tmp_path, capsys):
    """Two recipes may give one folder to different pairs; the same pairs elsewhere are the same run."""
    run = shutil.copytree(straight[0].run, tmp_path / "run")
    other = shutil.copytree(pairs, tmp_path / "other")
    assert trainer.run(config(other, run)) == trainer.run(config(pairs, run)) == {}
    next(other.glob("*.txt")).write_text("another caption, longer than any")
    with pytest.raises(UserError, match=r"source 0, 'folder:.*other', has changed since"):
        trainer.run(config(other, run))


def test_checkpoint_of_another_architecture_is_refused(pairs, straight):
    c = config(pairs, straight[0].run, model__embed=32)
    message = r"another architecture: params/proj_img/linear/kernel has shape \(32, 16\), expected \(32, 32\)"
    with Checkpointer(c.run) as checkpointer, pytest.raises(UserError, match=message):
        checkpointer.restore(build.build(c).abstract)


def test_missing_checkpoint_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="holds no checkpoint"):
        checkpointer.restore(build.build(tiny.config()).abstract)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch": 12}, r"data\.batch=12 cannot be divided over 8 devices.*use 8 or 16"),
        ({"data__sources": ("folder:/no/such/place",)}, r"folder '/no/such/place' does not exist"),
        ({"data__sources": ("web:x",)}, r"unknown source 'web:x'"),
        ({"data__sources": ()}, r"data\.sources is empty"),
        ({"data__tokenizer": "clop"}, r"'clop'"),
        ({"mesh": {"data": 3, "fsdp": 1, "model": 1, "strategy": "dp"}}, r"does not fit 8 devices"),
        ({"eval__sets": ("emoji/tests",), "eval__every": 5}, r"emoji/tests"),
        ({"eval__sets": ("emoji/tests",)}, r"emoji/tests"),
        ({"eval__final_sets": ("imagenett",)}, r"imagenett"),
        ({"eval__final_sets": ("zeroshot/folder:nowhere",)}, r"nowhere"),
    ],
)
def test_bad_values_are_one_sentence_with_the_key(pairs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trainer.run(config(pairs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("failure", "changes"),
    [
        # Nothing asks for a decision, so nobody makes one.
        ("flat", {"objective__nclip__sharpness": 0.0, "objective__nclip__smoothness": 1.0, "optim__lr": 1e-3}),
        # Nothing asks for variety, so all pairs go to one cluster.
        pytest.param(
            "few clusters",
            {"objective__nclip__sharpness": 2.0, "objective__nclip__smoothness": 0.0, "optim__lr": 1e-2},
            marks=pytest.mark.slow,
        ),
        # A head that starts sharp and has no time to agree.
        pytest.param("disagreement", {"objective__nclip__tau": 0.01, "optim__lr": 1e-12}, marks=pytest.mark.slow),
    ],
)
def test_each_collapse_is_provoked_and_said_once(pairs, tmp_path, capsys, failure, changes):
    trainer.run(config(pairs, tmp_path / "run", objective="nclip", steps=60, log__collapse_warmup_steps=50, **changes))
    out = capsys.readouterr().out
    print(out[out.index("WARNING") :].splitlines()[0])
    assert out.count(f": {failure}: ") == 1


@pytest.mark.parametrize("remote", [False, True])  # in a bucket files cannot grow
def test_writer_drops_what_a_resumed_run_writes_again(tmp_path, monkeypatch, remote):
    monkeypatch.setattr(storage, "is_remote", lambda _: remote)
    writer = MetricWriter(RunFolder(tmp_path))
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while it wrote
    writer = MetricWriter(RunFolder(tmp_path), step=2)
    assert [line["step"] for line in tiny.lines(tmp_path)] == [1, 2]
    monkeypatch.setattr(storage, "REWRITE_SECONDS", -1)
    writer.write(3, {"loss": 0.5})
    assert tiny.lines(tmp_path)[-1] == {"step": 3, "loss": 0.5}
    writer.close()


def test_results_are_written_as_numbers_and_as_records(tmp_path):
    folder = RunFolder(tmp_path)
    writer = MetricWriter(folder)
    for step in (2, 4):
        writer.write_results(step, zero_shot("x", 10.0 * step))
    assert [line["step"] for line in folder.read_evaluations()] == [2, 4]
    writer = MetricWriter(folder, step=4, evaluations=3)  # the evaluation of step 4 will be made again
    (line,) = folder.read_evaluations()
    results = from_json(line["records"])
    assert tiny.lines(tmp_path) == [{"step": 2} | flat(results)] and flat(results)["zeroshot/x/top1"] == 20
    assert [(r.chance, r.n, r.headline) for r in results if r.unit] == [(25, 8, True), (100, 8, False)]


def test_a_checkpoint_finds_the_lines_before_it_written(pairs, tmp_path, monkeypatch):
    """Also in a bucket: a run that resumes from it after a kill does not make them again."""
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    there = {}
    save = trainer.Checkpointer.save

    def observed(self, state, position):
        there[int(state.step)] = [line["step"] for line in tiny.lines(tmp_path / "run")]
        save(self, state, position)

    monkeypatch.setattr(trainer.Checkpointer, "save", observed)
    trainer.run(config(pairs, tmp_path / "run", steps=4, checkpoint__every=2, log__every=1))
    assert there == {2: [1, 2], 4: [1, 2, 3, 4]}


class Step:
    """The result of a step that takes a while and begins when the one before has ended."""

    def __init__(self, seconds, before):
        self.end = max(time.monotonic(), before.end if before else 0) + seconds

    def block_until_ready(self):
        time.sleep(max(self.end - time.monotonic(), 0))


@pytest.mark.parametrize(("step", "data", "share"), [(0.2, 0.05, 0.0), (0.05, 0.2, 0.75)])
def test_waiting_counts_when_the_devices_are_idle(step, data, share):
    """A step that is longer than its data hides it; else the devices wait for the difference."""

    def batches():
        for i in range(5):
            time.sleep(data if i else 0.5)  # the first one waits for workers to start
            yield i

    stalls, before = InputStallTimer(), None
    for i, batch in enumerate(stalls(batches())):
        assert i == batch
        value = Step(step, before)
        stalls.step_started(value)
        if before:
            before.block_until_ready()  # as for its metrics
        before = value
    measured = stalls.share()
    stalls.close()
    assert measured == pytest.approx(share, abs=0.2)
    assert "input-bound: 75%" in Progress(10, 8).line(1, {"loss": 1.0, "data/wait_share": 0.75})
    assert "input-bound" not in Progress(10, 8).line(1, {"loss": 1.0, "data/wait_share": 0.01})


def test_durations():
    assert [console.format_duration(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
