"""The wheel in an environment made by uv, which has no pip, away from any checkout: installed, trained, used."""

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
    "train",
    "--config",
    "demo:objective=clip,steps=2",
    "--config.run=run",
    "--config.data.batch=32",
    "--config.model.img.depth=1",
    "--config.model.txt.depth=1",
    '--config.eval.final_sets=("emoji/test_rendering",)',
    "--config.eval.report=False",
]
LOOK_UPS = """
from xclip_jax.data import demo, tokenizer
from xclip_jax.evaluators import prompts
assert prompts.class_names("imagenet1k", [str(i) for i in range(1000)])[0] == "tench"
assert len(prompts.templates("openai80")) == 80
assert tokenizer.load("clip")(["a photo of a cat."], 8)[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]
"""
EMBEDDED = """
from xclip_jax.data import embeddings
print(len(embeddings.read("texts.npz")["text"]), "texts")
"""


def uv_executable():
    beside = pathlib.Path(sys.executable).parent
    return shutil.which("uv", path=os.pathsep.join([str(beside), os.environ["PATH"]]))


@pytest.mark.slow
@pytest.mark.skipif(uv_executable() is None, reason="uv is not installed: pip install uv")
def test_first_steps_of_the_demo(tmp_path):
    # A copy: building a wheel writes into its source, and the folder must not offer the checkout's package.
    shutil.copytree(ROOT / "xclip_jax", tmp_path / "source" / "xclip_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "source" / "configs")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    (tmp_path / "work").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TFDS_DATA_DIR")}
    environment |= {"UV_DEFAULT_INDEX": package_index.index_url(), "XCLIP_CACHE": str(tmp_path / "cache")}
    if certificates := package_index.pip_setting("cert"):
        environment["SSL_CERT_FILE"] = certificates
    python, xclip_jax = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "xclip-jax"

    def run(*command, **more):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path / "work", env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    uv = uv_executable()
    run(uv, "venv", "--no-config", "--python", sys.executable, tmp_path / "env")
    run(uv, "build", "--no-config", "--wheel", "--out-dir", tmp_path / "dist", tmp_path / "source")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.rmtree(tmp_path / "source")
    run(uv, "pip", "install", "--python", python, f"{wheel}[demo]")
    installed = {package["name"] for package in json.loads(run(uv, "pip", "list", "--format=json", "--python", python))}
    assert "xclip-jax" in installed and "pip" not in installed
    offline = {"UV_DEFAULT_INDEX": OFFLINE}
    run(python, "-c", LOOK_UPS, **offline)
    assert not (tmp_path / "cache").exists()
    run(xclip_jax, *TRAINING)
    assert "emoji/test_rendering/top1" in (tmp_path / "work" / "run" / "results.json").read_text()
    run(python, "-c", f"{LOOK_UPS}assert len(demo.prepare().as_data_source('test_rendering')) > 200", **offline)

    assert "--config.optim.lr" in run(python, "-m", "xclip_jax.main", "--config", "demo", "--help")
    assert "is complete" in run(python, "-m", "xclip_jax.main", *TRAINING[1:], **offline)
    run(xclip_jax, "evaluate", "--checkpoint", "run", "--suite", "emoji/test_concepts", **offline)
    assert "emoji/test_concepts" in (tmp_path / "work" / "run" / "evaluation.json").read_text()
    run(xclip_jax, "export", "--checkpoint", "run", "--to", "safetensors", "out", **offline)
    (tmp_path / "work" / "texts.txt").write_text("a fox\na hen\n")
    run(xclip_jax, "embed", "--checkpoint", "out", "--texts", "texts.txt", "--out", "texts.npz", **offline)
    assert "2 texts" in run(python, "-c", EMBEDDED, **offline)
    assert "clusters_img" in run(xclip_jax, "plan", "--config", "xclip:preset=B/16", "--explain", **offline)
    assert "usage" in run(xclip_jax, "report", "--help")
    packages = run(python, "-c", "import importlib.metadata as m; print(m.files('xclip_jax'))")
    assert "xclip_jax/py.typed" in packages and "'configs/" not in packages
