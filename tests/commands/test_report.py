"""The page of a run, and the command that writes it."""

import json
import re
import shutil

import pytest

from tests.helpers import tiny
from tests.helpers.pages import HOSTILE, check
from xclip_jax import report
from xclip_jax.commands import report as command
from xclip_jax.config import schema
from xclip_jax.core.run_folder import RunReader
from xclip_jax.report import page as pages
from xclip_jax.train import trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of xCLIP on pairs and a set whose words are hostile, with its report."""
    root = tmp_path_factory.mktemp("report")
    pairs = tiny.folder(root / "pairs")
    for i in range(0, 40, 2):
        (pairs / f"{i:03d}.txt").write_text(HOSTILE)
    tiny.classes(root / "set", names=("cat", "<img src=x onerror=alert(3)>"))
    changes = {"data__sources": (f"folder:{pairs}",), "mesh__fsdp": 2, "eval__every": 2, "eval__report": True}
    changes |= {"eval__sets": (f"folder:{root / 'set'}",)}
    trainer.run(tiny.config(run=root / "run", steps=4, **changes), [report.callback()])
    return root


def test_the_page_of_a_run_needs_nothing_else_and_escapes_everything(run):
    text = RunReader(run / "run").report_file.read_text()
    page = check(text)
    assert "alert" not in re.sub(r"&lt;.*?&gt;|alert\(2\)", "", text)
    words = " ".join(page.text)
    for text in ("What xCLIP learned", "4 steps of 16 image-text pairs", "top-1", "Mutual information"):
        assert text in words, text
    assert "onerror=alert(3)" in words  # shown as text
    assert (run / "run" / "picture.png").exists()


def test_a_run_in_progress(run, tmp_path):
    """Without a checkpoint there are curves; a half-written line and a half-written checkpoint are left alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(run / "run" / "config.json", folder)
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    half = folder / "checkpoints" / "3.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    command.main([str(folder)])
    assert half.exists()
    page = check(RunReader(folder).report_file.read_text())
    words = " ".join(page.text)
    assert "What xCLIP has learned so far" in words and "holds no checkpoint" in words
    assert "2 of 4 steps" in words and "None yet; evaluate with" in words
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    command.main([str(folder)])
    assert "No step is logged yet" in RunReader(folder).report_file.read_text()


def test_a_report_that_fails_loses_nothing(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run / "run", tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    expected = json.loads(results.read_text())["results"]
    results.unlink()
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["config"]["run"] = str(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(pages, "collect_examples", lambda *_, **__: 1 / 0)
    config = schema.complete(content["config"])
    assert trainer.run(config, [report.callback()]) == pytest.approx(expected, abs=1e-4)
    assert json.loads(results.read_text())["results"] == pytest.approx(expected, abs=1e-4)
    assert "no report: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/none"], "none' does not exist"),
        (["{}"], "is not a run directory"),
        (["{}/run", "--sets", "imagenett"], "'imagenett'"),
        (["{}/run", "--step", "9"], "step 9"),
        (["{}/run", "--output", "{}"], "--output"),
        ([], "RUN"),
        (["{}/run", "{}/run"], "different runs"),
    ],
)
def test_bad_input(flags, message, run, monkeypatch):
    monkeypatch.setattr(command, "collect_examples", lambda *_, **__: pytest.fail("made predictions first"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        command.main([flag.format(run) for flag in flags])
