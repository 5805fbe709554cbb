"""The doctor on a run's folder: each warning and FAIL, from files as a run leaves them."""

import fcntl
import json
import math
import os
import shutil
import time

import pytest
from etils import epath

from tests.helpers import tiny
from tests.helpers.findings import only as the_only
from tests.helpers.pages import ENDED, written
from xclip_jax.commands import doctor as command
from xclip_jax.commands.diagnosis import check_run
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checks import FAIL, OK, WARNING

LN_B = math.log(16)


def rows(n=60, every=10, *, speed=100.0, **series_of):
    """Lines of a run of CLIP that learns; `series_of` are functions of the line's number, with __ for the slash."""
    lines = []
    for i in range(n):
        usual = {
            "clip__loss": LN_B - 0.03 * i,
            "clip__scale": 14.0 + i / 10,
            "grad_norm": 4.0 + (i % 3) / 10,
            "data__wait_share": 0.01,
            "data__bad": 2.0,
            "data__bad_share": 0.001,
            "samples_per_second": speed if i else 0.0,
        }
        values = usual | {name: function(i) for name, function in series_of.items()}
        line = {"step": every * i or 1, "clip/ln_b": LN_B} | {k.replace("__", "/"): v for k, v in values.items()}
        lines.append({"loss": line["clip/loss"]} | line)
    return lines


def run_of(tmp_path, lines, objective="clip", **changes):
    usual = {"steps": 1000, "log__every": 10, "checkpoint__every": 0}
    written(tmp_path / "run", tiny.config(objective, **usual | changes), lines)
    return tmp_path / "run"


def finish(folder, **changes):
    (folder / "results.json").write_text(json.dumps({"results": {}, "records": [], "ended": ENDED} | changes))


def findings(folder, check, **options):
    return [x for x in check_run(str(folder), **options) if x.check == check]


def only(folder, check, mark, **options):
    finding = the_only(list(check_run(str(folder), **options)), check, mark)
    assert finding.mark == OK or finding.remedy or finding.check == "objective"
    return finding


def test_a_run_that_is_well(tmp_path, capsys):
    folder = run_of(tmp_path, rows())
    with (folder / ".lock").open("w") as file:
        file.write("process 7 on a host\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert command.main([str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1] == "5 checks: 0 FAIL, 0 warnings"
    progress, checkpoints = lines[:2]
    assert "in progress by process 7 on a host: step 590 of 1,000, 1:06 left" in progress
    assert "none yet; a kill now would lose 590 steps, 1:34" in checkpoints


def test_stalled_stopped_and_complete(tmp_path):
    folder = run_of(tmp_path, rows())
    soon, late = time.time() + 60, time.time() + 3600
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert only(folder, "progress", OK, now=soon)
        finding = only(folder, "progress", FAIL, now=late)
        assert "stalled? step 590" in finding.text and "another process" in finding.text
    finding = only(folder, "progress", WARNING, now=soon)
    assert "not running and not complete" in finding.text and finding.remedy == "run the same command to resume"
    finish(folder)
    assert only(folder, "progress", OK).text == "complete at step 1,000"  # though the last has no line: it was skipped


def test_skipped_steps(tmp_path):
    folder = run_of(tmp_path, rows())
    assert not findings(folder, "skipped steps")

    def skipped(*lines):
        text = "".join(json.dumps({"step": x} if isinstance(x, int) else x) + "\n" for x in lines)
        (folder / "skipped_steps.jsonl").write_text(text)

    skipped(7, 11, 12, *range(591, 601), {"step": 600, "rewound_to": 500}, *range(601, 611))
    text = only(folder, "skipped steps", WARNING).text
    assert text.startswith("23 of 610 steps were skipped")
    assert only(folder, "progress", WARNING).remedy == "run the same command to resume"
    skipped(7, 595, *range(597, 608))
    finding = only(folder, "skipped steps", FAIL)
    assert "the last 11 steps, to step 607" in finding.text and "lower optim.lr" in finding.remedy
    assert only(folder, "progress", WARNING).remedy == "see the skipped steps"
    (folder / "metrics.jsonl").write_text("")  # bad from the first step on
    skipped(*range(1, 12))
    only(folder, "skipped steps", FAIL)


def test_nothing_learned(tmp_path):
    folder = run_of(tmp_path, rows(clip__loss=lambda i: LN_B + 0.001))
    text = only(folder, "objective", FAIL).text
    assert "clip, plateau: the loss is 2.774" in text and "optim.warmup" in text
    assert "Warning at 10 of 10 logged steps" in text
    shutil.rmtree(folder)
    folder = run_of(tmp_path, rows(5, clip__loss=lambda i: LN_B))
    only(folder, "objective", OK)  # not judged yet
    finish(folder)
    assert "plateau" in only(folder, "objective", FAIL).text


def test_devices_that_wait_and_bad_samples(tmp_path):
    series = {"data__wait_share": lambda i: 0.3 if i >= 30 else 0.0, "data__bad_share": lambda i: 0.03}
    folder = run_of(tmp_path, rows(**series))
    finding = only(folder, "input", WARNING)
    assert "waited 30% of the time" in finding.text and "data.threads" in finding.remedy
    entry = {"position": 1, "source": 0, "index": 1, "reason": "truncated image", "detail": ""}
    (folder / "bad_samples.jsonl").write_text(json.dumps(entry) + "\n")
    assert only(folder, "samples", WARNING).text.startswith("3.00% bad, the limit is 5.00% (truncated image: 1)")


def test_checkpoints(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    content = json.loads((folder / "config.json").read_text())
    content["config"] |= {"steps": 1000, "checkpoint": {"every": 400, "keep": 3}}
    (folder / "config.json").write_text(json.dumps(content))
    only(folder, "checkpoints", OK)
    shutil.copytree(folder / "checkpoints/0", folder / "checkpoints/400")
    text = only(folder, "checkpoints", FAIL).text
    assert "damaged in" in text and "400 (" in text
    (folder / "checkpoints/400/digest.json").unlink()
    assert "400 (digest.json is missing)" in only(folder, "checkpoints", FAIL).text
    checkpoint_files.write_digest(epath.Path(folder / "checkpoints/400"), 400)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in rows()))
    finding = only(folder, "checkpoints", OK)
    assert finding.text.startswith("step 0, step 400;") and "would lose 190 steps, 0:15" in finding.text
    for file in (folder / "checkpoints/400/state").rglob("d/*"):
        os.remove(file)
    assert "is missing, or has another size)" in only(folder, "checkpoints", FAIL).text


def test_a_checkpoint_that_is_replaced_meanwhile_is_no_damage(tmp_path, run, monkeypatch):
    folder, real = tmp_path / "run", checkpoint_files.find_fault
    shutil.copytree(run, folder)

    def replace(path, step):
        (folder / "checkpoints/0").rename(folder / "checkpoints/400")
        return real(path, step)

    monkeypatch.setattr(checkpoint_files, "find_fault", replace)
    assert only(folder, "checkpoints", OK).text == "step 400, written meanwhile"


def test_results(tmp_path):
    folder = run_of(tmp_path, rows())
    record = {"set": "a", "family": "zeroshot", "metric": "top1", "value": 50.0, "unit": "%", "n": 100, "chance": 10.0}
    for value, mark in ((50.0, OK), (11.0, WARNING)):
        finish(folder, records=[record | {"value": value, "protocol": "", "headline": True}])
        assert only(folder, "results", mark).text.startswith(f"{int(mark == OK)} of 1 sets")
    finish(folder, failed={"b": "file is gone"})
    assert "b could not be evaluated: file is gone" in only(folder, "results", FAIL).text


def test_a_damaged_run_is_named(tmp_path):
    folder = run_of(tmp_path, [])
    assert [x.check for x in check_run(str(folder))] == ["progress", "checkpoints"]
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=f"^error: {folder}/config.json is damaged"):
        command.main([str(folder)])
