"""The wheel, by way of the sdist, in an environment made by uv, away from any checkout: installed, trained, used."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import hub_server, tiny

ROOT = pathlib.Path(__file__).parents[1]
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # the discard port: refused at once
KEYS = ("run=run", "data.batch=32", "model.img.depth=1", "model.txt.depth=1", "eval.report=False")
TRAINING = ["train", "--config", "demo:objective=clip,steps=2", *(f"--config.{key}" for key in KEYS)]
TRAINING += ['--config.eval.sets_at_end=("emoji/test_rendering",)']
LOOK_UPS = """
from xclip_jax.demo import emoji as demo; from xclip_jax.data import tokenizer
from xclip_jax.evaluators import prompts
assert prompts.class_names("imagenet1k", [str(i) for i in range(1000)])[0] == "tench"
assert len(prompts.templates("openai80")) == 80
assert tokenizer.load("clip")(["a photo of a cat."], 8)[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]
"""
EMBEDDED = """
from xclip_jax.data import embeddings
print(len(embeddings.read("texts.parquet")["text"]), "texts")
"""


def uv_executable():
    beside = pathlib.Path(sys.executable).parent
    return shutil.which("uv", path=os.pathsep.join([str(beside), os.environ["PATH"]]))


def pip_index():
    """Return the index that pip is configured with, or "": uv does not read pip's configuration."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return os.environ.get("PIP_INDEX_URL") or subprocess.run(asked, capture_output=True, text=True).stdout.strip()


class Installed:
    """An environment with the wheel, and a folder to work in."""

    def __init__(self, folder):
        self.folder, self.work = folder, folder / "work"
        self.python, self.command = folder / "env" / "bin" / "python", folder / "env" / "bin" / "xclip-jax"
        self.environment = {k: v for k, v in os.environ.items()
                            if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TFDS_DATA_DIR")}  # fmt: skip
        self.environment["XCLIP_CACHE"] = str(folder / "cache")
        if (index := pip_index()) and "UV_DEFAULT_INDEX" not in os.environ:
            self.environment["UV_DEFAULT_INDEX"] = index

    def run(self, *command, **more):
        done = subprocess.run(
            list(map(str, command)), cwd=self.work, env=self.environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=["highest", "lowest-direct"])
def installed(tmp_path_factory, request):
    """With the newest versions of packages that setup.py allows, and with the oldest of those that it names."""
    # A copy: building a wheel writes into its source, and the folder must not offer the checkout's package.
    made = Installed(tmp_path_factory.mktemp("installed"))
    source, uv = made.folder / "source", uv_executable()
    if uv is None:
        pytest.skip("uv is not installed: pip install uv")
    shutil.copytree(ROOT / "xclip_jax", source / "xclip_jax")
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    made.work.mkdir()
    made.run(uv, "venv", "--no-config", "--python", sys.executable, made.folder / "env")
    made.run(uv, "build", "--no-config", "--out-dir", made.folder / "dist", source)  # an sdist, and the wheel from it
    (wheel,) = (made.folder / "dist").glob("*.whl")
    shutil.rmtree(source)
    made.run(uv, "pip", "install", "--resolution", request.param, "--python", made.python, f"{wheel}[demo,hub]")
    packages = json.loads(made.run(uv, "pip", "list", "--format=json", "--python", made.python))
    names = {package["name"] for package in packages}
    assert "xclip-jax" in names and not names & {"pip", "torch", "tensorflow", "transformers"}
    return made


@pytest.mark.slow
def test_first_steps_of_the_demo(installed):
    run, python, xclip_jax, work = installed.run, installed.python, installed.command, installed.work
    run(python, "-c", LOOK_UPS, **OFFLINE)
    assert not (installed.folder / "cache").exists()
    run(xclip_jax, *TRAINING, **OFFLINE)
    assert "emoji/test_rendering/top1" in (work / "run" / "results.json").read_text()
    run(python, "-c", f"{LOOK_UPS}assert len(demo.prepare().as_data_source('test_rendering')) > 200", **OFFLINE)

    assert "--config.optim.lr" in run(python, "-m", "xclip_jax.main", "--config", "demo", "--help")
    assert "is complete" in run(python, "-m", "xclip_jax.main", *TRAINING[1:], **OFFLINE)
    run(xclip_jax, "evaluate", "--checkpoint", "run", "--suite", "emoji/test_concepts", **OFFLINE)
    assert "emoji/test_concepts" in (work / "run" / "evaluation.json").read_text()
    run(xclip_jax, "export", "--checkpoint", "run", "--to", "safetensors", "out", **OFFLINE)
    (work / "texts.txt").write_text("a fox\na hen\n")
    run(xclip_jax, "embed", "--checkpoint", "out", "--texts", "texts.txt", "--out", "texts.parquet", **OFFLINE)
    assert "2 texts" in run(python, "-c", EMBEDDED, **OFFLINE)
    assert "usage" in run(xclip_jax, "report", "--help")
    packages = run(python, "-c", "import importlib.metadata as m; print(m.files('xclip_jax'))")
    assert "xclip_jax/py.typed" in packages and "'configs/" not in packages


@pytest.mark.slow
def test_own_pairs_and_the_hub(installed, tmp_path):
    """Train on 200 own pairs, push the model, and load it by its name."""
    run, xclip_jax, work = installed.run, installed.command, installed.work
    tiny.folder(work / "pairs", 200)
    training = ["--config", "small:pairs=pairs,epochs=2,size=24", "--config.run=own"]
    run(xclip_jax, "train", *training, "--config.model.img.depth=1")
    assert "retrieval/holdout" in (work / "own" / "results.json").read_text()
    assert "holdout" in (work / "own" / "report.html").read_text()
    program = "import sys, xclip_jax; print(xclip_jax.load(sys.argv[1]).encode_image(['pairs/003.png']).tolist())"

    def embedded(weights, **environment):
        return json.loads(run(installed.python, "-c", program, weights, **environment).splitlines()[-1])

    with hub_server.serve() as hub:
        account = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_CACHE": str(tmp_path)}
        account["HF_HUB_DISABLE_XET"] = "1"  # the stand-in has no such store
        export = ("export", "--checkpoint", "own", "--to", "open_clip", "exported", "--push", "me/shapes")
        assert "/me/shapes" in run(xclip_jax, *export, **account)
        again = embedded("hf:me/shapes", **account)
    np.testing.assert_allclose(again, embedded("own"), atol=1e-6)
    assert embedded("hf:me/shapes", **account | {"HF_HUB_OFFLINE": "1"}) == again
