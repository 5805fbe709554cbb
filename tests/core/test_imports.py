"""Modules that files name: none is imported without consent, and by files of results never."""

import contextlib
import json
import pathlib
import shutil
import sys

import pytest

import xclip_jax
from tests.helpers import tiny
from xclip_jax.commands import embed, evaluate, export, report
from xclip_jax.commands.doctor import main as doctor
from xclip_jax.commands.serve import main as serve
from xclip_jax.config import load as config_file
from xclip_jax.core.errors import UserError

EXTENSION = pathlib.Path(__file__).parents[1] / "extension"
REFUSED = "evil_mod:ConvMixer'.* if you trust these files, add --trust .*trust=True, or import evil_mod first"


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """A working folder with evil_mod.py, a complete tower that leaves a file when it is imported, and runs of it."""
    root = tmp_path_factory.mktemp("trust")
    code = (EXTENSION / "conv_mixer.py").read_text() + (EXTENSION / "greys.py").read_text()
    code += (EXTENSION / "json_lines.py").read_text().replace("tests.extension.greys", "evil_mod")
    (root / "evil_mod.py").write_text(f"{code}\npathlib.Path({str(root / 'executed')!r}).touch()\n")
    tower = {"img": {"type": "evil_mod:ConvMixer", "image_size": tiny.SIZE, "patch": 8, "width": 32, "depth": 1}}
    tiny.folder(root / "pairs")
    shutil.copytree(trained, root / "plain")
    sys.path.insert(0, str(root))
    try:
        run = tiny.untrained(root / "run", "clip", model__plugins=tower)
        export.export(str(run), str(root / "weights"), to="safetensors")
    finally:
        sys.path.remove(str(root))
        forget(root)
    return root


def forget(root):
    sys.modules.pop("evil_mod", None)
    (root / "executed").unlink(missing_ok=True)


@pytest.fixture
def root(folders, monkeypatch):
    monkeypatch.syspath_prepend(str(folders))
    monkeypatch.chdir(folders)
    forget(folders)
    yield folders
    forget(folders)


def executed(root):
    return (root / "executed").exists()


@pytest.mark.parametrize("name", ["run", "weights"])
def test_a_local_folder_imports_with_consent_alone(name, root):
    with pytest.raises(UserError, match=REFUSED):
        xclip_jax.load(root / name)
    assert not executed(root)
    assert xclip_jax.load(root / name, batch=8, trust=True).encode_text(["a fox"]).shape == (1, 16)
    assert executed(root)
    forget(root)
    with pytest.raises(UserError, match=REFUSED):  # consent is for one load
        xclip_jax.load(root / name)
    import evil_mod  # noqa: F401

    assert xclip_jax.load(root / name, batch=8).encode_text(["a fox"]).shape == (1, 16)


def test_a_download_imports_with_consent_alone(root, server):
    server.add("lab/x", root / "weights")
    with pytest.raises(UserError, match=REFUSED):
        xclip_jax.load("hf:lab/x")
    assert not executed(root)
    assert xclip_jax.load("hf:lab/x", batch=8, trust=True).card["commit"]


def test_commands_take_trust(root, tmp_path):
    commands = {
        embed.main: ["--checkpoint", "weights", "--images", "pairs", "--out", str(tmp_path / "x.parquet")],
        export.main: ["--checkpoint", "run", "--to", "safetensors", str(tmp_path / "out")],
        evaluate.main: ["--checkpoint", "run", "--suite", "retrieval/folder:pairs", "--output", f"{tmp_path}/e.json"],
        report.main: ["run", "--output", str(tmp_path / "page.html")],
        doctor: ["run"],
    }  # fmt: skip
    for command, arguments in commands.items():
        with pytest.raises(SystemExit, match=REFUSED):
            command(arguments)
        assert not executed(root)
        command([*arguments, "--trust"])
        assert executed(root)
        forget(root)
    with pytest.raises(SystemExit, match=REFUSED):
        serve(["run", "--images", "pairs", "--port", "0"])


def test_a_recipe_that_reads_weights_takes_trust(root):
    argv = ["train", "--config", "finetune:weights=weights,data=folder:none"]
    with pytest.raises(SystemExit, match=REFUSED):
        config_file.parse(argv)
    assert not executed(root)
    with pytest.raises(SystemExit, match="'none/train' does not exist"):  # what the recipe reads next
        config_file.parse([*argv, "--trust"])
    assert executed(root)


def test_results_import_nothing(root, tmp_path):
    """Not even with consent, which is for the model: their records are shown without layouts."""
    shutil.copytree(root / "plain", tmp_path / "plain")
    records = [{"set": "x", "family": "own", "metric": "nearer", "value": 12.5, "n": 4, "headline": True,
                "evaluator": "evil_mod:Neighbours"}]  # fmt: skip
    entry = {"set": "x", "name": "own/x", "metric": "nearer", "value": 12.5, "n": 4, "metrics": {"nearer": 12.5},
             "records": records, "checkpoint": "run", "step": 4, "profile": "openai", "changes": {},
             "fingerprint": "1", "items": "2"}  # fmt: skip
    (tmp_path / "plain" / "evaluation.json").write_text(json.dumps({"results": [entry]}))
    results = json.loads((tmp_path / "plain" / "results.json").read_text())
    (tmp_path / "plain" / "results.json").write_text(json.dumps(results | {"records": records}))
    evaluate.main(["--compare", str(tmp_path / "plain"), str(tmp_path / "plain")])
    report.main([str(tmp_path / "plain"), "--trust"])
    doctor([str(tmp_path / "plain")])
    export.export(str(tmp_path / "plain"), str(tmp_path / "out"), to="safetensors")
    assert not executed(root)
    assert "12.5" in (tmp_path / "plain" / "report.html").read_text()


SOURCES = ["evil_mod:JsonLines:pairs.jsonl"]


@pytest.mark.parametrize(
    "keys",
    [
        {"eval": {"sets": ["evil_mod:Greys/20"]}},
        {"data": {"sources": SOURCES, "holdout": 0.5}, "eval": {"sets": ["retrieval/holdout"]}},
    ],
)
def test_sets_and_sources_of_a_run_are_imported_by_its_report_with_consent_alone(keys, root, tmp_path):
    shutil.copytree(root / "plain", tmp_path / "plain")
    content = json.loads((tmp_path / "plain" / "config.json").read_text())
    for group, values in keys.items():
        content["config"][group] |= values
    (tmp_path / "plain" / "config.json").write_text(json.dumps(content))
    (root / "pairs.jsonl").write_text("")
    arguments = [str(tmp_path / "plain"), "--output", str(tmp_path / "page.html")]
    shutil.copytree(tmp_path / "plain", tmp_path / "again")
    try:
        report.main([str(tmp_path / "again"), *arguments])
    except SystemExit as stopped:
        assert "add --trust" in str(stopped)
    assert not executed(root)
    if content["config"]["data"]["holdout"]:
        for suite in ("retrieval/holdout", f"zeroshot/holdout@{tmp_path / 'again'}"):
            with pytest.raises(SystemExit, match=r"evil_mod:JsonLines'.* add --trust"):
                evaluate.main(["--checkpoint", str(tmp_path / "plain"), "--suite", suite])
            assert not executed(root)
    with contextlib.suppress(SystemExit):
        report.main([*arguments, "--trust"])
    assert executed(root)
