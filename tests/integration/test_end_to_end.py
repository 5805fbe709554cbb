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


def test_from_data_to_table_and_picture(tmp_path):
    """The demo, of narrow towers and two steps."""
    run = tmp_path / "run"
    flags = [f"--config.model.{tower}.{key}" for tower in ("img", "txt") for key in ("depth=1", "width=64", "heads=2")]
    flags += ["--config.model.cluster_head.clusters=64", "--config.model.cluster_head.hidden=64"]
    flags += [f"--config.run={run}", "--config.data.batch=64", "--config.eval.every=0", "--config.eval.sets=()"]
    flags += ["--config.eval.sets_at_end=('emoji/test_concepts','emoji/test_retrieval')"]
    line = [sys.executable, "-m", "xclip_jax.main", "--config", "configs/demo.py:steps=2", *flags]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device, as users have it
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("step 2/2  loss ") for line in lines)
    row = next(line for line in lines if line.startswith("emoji/test_concepts")).split()
    assert row[1:3] == ["200", "600"]
    results = json.loads((run / "results.json").read_text())["results"]
    assert float(row[3]) == pytest.approx(results["zeroshot/emoji/test_concepts/top1"], abs=0.051)
    assert results["retrieval/emoji/test_retrieval/images"] == 284
    with Image.open(run / "picture.png") as picture:
        assert picture.width == 1600
    assert f"report: {run / 'report.html'}" in lines
    page = (run / "report.html").read_text()
    assert len(page) < 3e6
    for said in ("Things it has never seen", "Text to image", "OpenMoji"):
        assert said in page, said
