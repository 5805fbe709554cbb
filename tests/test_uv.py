"""First use in an environment made by uv, which has no pip: nothing that the demo needs may ask for it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from xclip_jax.data import package_index

ROOT = pathlib.Path(__file__).parents[1]
OFFLINE = "http://127.0.0.1:9/simple"  # the discard port: refused at once
TRAINING = [
    "-m",
    "xclip_jax.main",
    "--config",
    "configs/demo.py:objective=clip,steps=2",
    "--config.run=run",
    "--config.data.batch=32",
    "--config.model.img.depth=1",
    "--config.model.txt.depth=1",
    '--config.eval.final_sets=("emoji/test_rendering",)',
    "--config.eval.report=False",
]
LOOK_UPS = """
from xclip_jax.data import demo, tokenizer
from xclip_jax.evaluators import names
assert names.class_names("imagenet1k", [str(i) for i in range(1000)])[0] == "tench"
assert len(names.templates("openai80")) == 80
assert tokenizer.load("clip")(["a photo of a cat."], 8)[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]
"""


def uv_executable():
    beside = pathlib.Path(sys.executable).parent
    return shutil.which("uv", path=os.pathsep.join([str(beside), os.environ["PATH"]]))


@pytest.mark.slow
@pytest.mark.skipif(uv_executable() is None, reason="uv is not installed: pip install uv")
def test_first_steps_of_the_demo(tmp_path):
    # A copy: building a wheel writes into its source, and the folder must not offer the checkout's package.
    shutil.copytree(ROOT / "xclip_jax", tmp_path / "source" / "xclip_jax")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    shutil.copytree(ROOT / "configs", tmp_path / "work" / "configs")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TFDS_DATA_DIR")}
    environment |= {"UV_DEFAULT_INDEX": package_index.index_url(), "XCLIP_CACHE": str(tmp_path / "cache")}
    if certificates := package_index.pip_setting("cert"):
        environment["SSL_CERT_FILE"] = certificates
    python = tmp_path / "env" / "bin" / "python"

    def run(*command, **more):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path / "work", env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    uv = uv_executable()
    run(uv, "venv", "--no-config", "--python", sys.executable, tmp_path / "env")
    run(uv, "pip", "install", "--python", python, f"{tmp_path / 'source'}[demo]")
    installed = {package["name"] for package in json.loads(run(uv, "pip", "list", "--format=json", "--python", python))}
    assert "xclip-jax" in installed and "pip" not in installed
    offline = {"UV_DEFAULT_INDEX": OFFLINE}
    run(python, "-c", LOOK_UPS, **offline)
    assert not (tmp_path / "cache").exists()
    run(python, *TRAINING)
    assert "emoji/test_rendering/top1" in (tmp_path / "work" / "run" / "results.json").read_text()
    run(python, "-c", f"{LOOK_UPS}assert len(demo.prepare().as_data_source('test_rendering')) > 200", **offline)
