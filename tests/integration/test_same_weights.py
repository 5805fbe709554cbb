"""Results of one model are shown together, those of other weights, preprocessing or commits never with them."""

import json
import shutil

import pytest
import tokenizers
from etils import epath

import xclip_jax
from tests.helpers import tiny
from xclip_jax.commands import evaluate, export
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators import results
from xclip_jax.report import card, collect
from xclip_jax.train import weights

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs a and b, with a moving average, and two sets: folders "one" and "two"."""
    root = tmp_path_factory.mktemp("weights")
    for name in ("one", "two"):
        tiny.classes(root / name, 5, size=26)
    for seed, name in enumerate("ab"):
        tiny.untrained(root / name, noise=0.3, ema__momentum=0.5, eval__ema=True, seed=seed)
    return root


def shown(file):
    """Names of the folders of the results that a file shows."""
    return [entry["set"].rpartition("/")[2] for entry in json.loads(file.read_text())["results"]]


def change(run, **keys):
    """Change free keys of a run's group `eval`, as a run that resumes does."""
    content = json.loads((run / "config.json").read_text())
    content["config"]["eval"] |= keys
    (run / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("key", "value"), [("ema", False), ("resize_size", 2 * tiny.SIZE)])
def test_keys_that_change_the_features_at_the_same_step(key, value, root, tmp_path):
    run, one, two = tmp_path / "run", f"folder:{root / 'one'}", f"folder:{root / 'two'}"
    shutil.copytree(root / "a", run)
    before = xclip_jax.load(run, batch=8).fingerprint()
    evaluate.evaluate(str(run), one)
    change(run, **{key: value})
    assert xclip_jax.load(run, batch=8).fingerprint() != before
    # Nothing has been measured with the new value yet.
    assert not collect.read(run).results and not card.measured(RunReader(run), weights.load(str(run)))
    evaluate.evaluate(str(run), two)
    assert shown(run / "evaluation.json") == ["two"]
    assert {result.set for result in collect.read(run).results} == {two}
    assert {result.set for result in card.measured(RunReader(run), weights.load(str(run)))} == {two}
    assert {row["set"] for row in evaluate.compare(str(run), str(run))} == {two}


def test_a_free_key_that_changes_no_feature_keeps_the_results_together(root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / "a", run)
    evaluate.evaluate(str(run), f"folder:{root / 'one'}")
    content = json.loads((run / "config.json").read_text())
    content["config"]["eval"]["batch"] = 4
    content["config"]["model"]["img"]["remat"] = "full"
    (run / "config.json").write_text(json.dumps(content))
    evaluate.evaluate(str(run), f"folder:{root / 'two'}")
    assert shown(run / "evaluation.json") == ["one", "two"]


def test_a_branch_of_the_hub_that_moves(root, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        export.export(str(root / name), str(tmp_path / name), to="safetensors")
    first = server.add("lab/x", tmp_path / "a")
    evaluate.evaluate("hf:lab/x", f"folder:{root / 'one'}")
    assert f"hf:lab/x is commit {first}" in capsys.readouterr().out
    second = server.add("lab/x", tmp_path / "b")
    evaluate.evaluate("hf:lab/x", f"folder:{root / 'two'}")
    file = tmp_path / "lab--x.evaluation.json"
    assert shown(file) == ["two"]
    entries = results.read(epath.Path(file))[0]
    assert [entry["commit"] for entry in entries] == [first, second]
    assert xclip_jax.load("hf:lab/x", batch=8).card["commit"] == second


@pytest.mark.parametrize("changes", [{"data__normalization": "clip"}, {"data__tokenizer": "fingerprints.json"}])
def test_a_fingerprint_is_of_preprocessing_tokenizer_and_meaning_too(changes, tmp_path, monkeypatch):
    """mteb and `embed` take it for what decides the features."""
    monkeypatch.chdir(tmp_path)
    words = {"<|startoftext|>": 256, "<|endoftext|>": 257} | {f"w{i}": i for i in range(256)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save("fingerprints.json")
    runs = [tiny.untrained(tmp_path / name, "clip", **keys) for name, keys in (("a", {}), ("b", changes))]
    a, b = (xclip_jax.load(run, batch=8).fingerprint() for run in runs)
    assert a != b
    export.export(str(runs[1]), "out", to="safetensors")
    assert xclip_jax.load("out", batch=8).fingerprint() == b
