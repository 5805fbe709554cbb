"""The commands as a user gives them, on the demo's data, only shorter."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]


def command(*flags):
    line = [sys.executable, "-m", "xclip_jax.main", "--config", *flags]
    env = os.environ | {"XLA_FLAGS": ""}  # one device and code that is fast, as users have it
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    flags = (
        "configs/demo.py:steps=8",
        f"--config.run={folder}",
        "--config.data.batch=64",
        "--config.eval.sets_at_end=('emoji/test_concepts','emoji/test_retrieval')",
    )
    return folder, flags, command(*flags)


def test_from_data_to_table_and_picture(run):
    folder, _, done = run
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("step 8/8  loss ") for line in lines)
    assert any(line.startswith("step 4: emoji/validation_concepts top-1 ") for line in lines)
    row = next(line for line in lines if line.startswith("emoji/test_concepts")).split()
    assert row[1:3] == ["200", "600"]
    results = json.loads((folder / "results.json").read_text())["results"]
    assert float(row[3]) == pytest.approx(results["zeroshot/emoji/test_concepts/top1"], abs=0.051)
    assert results["retrieval/emoji/test_retrieval/images"] == 284
    with Image.open(folder / "picture.png") as picture:
        assert picture.width == 1600
    assert f"report: {folder / 'report.html'}" in lines
    page = (folder / "report.html").read_text()
    assert len(page) < 3e6
    for said in ("Things it has never seen", "Text to image", "OpenMoji", 'data-words="'):
        assert said in page, said


def test_another_objective_in_the_same_folder_is_one_sentence(run):
    folder, _, _ = run
    done = command("configs/demo.py:steps=8,objective=nclip", f"--config.run={folder}", "--config.data.batch=64")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder} contains a run with a different config: objective.name ('xclip'")
    assert len(done.stderr.strip().splitlines()) == 1
