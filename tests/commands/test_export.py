"""Exports of a run: its numbers in other projects, and its card."""

import json
import sys

import chex
import jax
import numpy as np
import open_clip
import pytest
import torch
import transformers
import yaml

from tests.helpers import tiny
from xclip_jax import interop
from xclip_jax.commands import evaluate, export
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.objectives import RECIPES
from xclip_jax.train import trainer, weights
from xclip_jax.train.build import make_encoder, profile_of_run

pytestmark = pytest.mark.long

STEPS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that evaluates its moving average, with results of a set in two classes."""
    root = tmp_path_factory.mktemp("export")
    pairs = tiny.folder(root / "pairs")
    suite = f"folder:{tiny.classes(root / 'set', 4)}"
    trainer.run(tiny.config(
        "xclip", run=root / "run", steps=STEPS, data__sources=(f"folder:{pairs}",), data__tokenizer="clip",
        checkpoint__every=1, ema__momentum=0.5, eval__ema=True, eval__sets_at_end=(suite,),
        model__scan=True,
    ))  # fmt: skip
    evaluate.evaluate(str(root / "run"), suite)
    return root / "run"


@pytest.fixture(scope="module")
def expected(run):
    """Embeddings of the run's average, by its own evaluation."""
    _, parts, variables, *_ = weights.load(str(run))
    return encode(parts, variables)


def encode(parts, variables):
    encoder = make_encoder(parts)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    found = encoder.images(variables, images), encoder.texts(variables, ["a cat", "number 3", "x"])
    return {f"{key}_{kind}": x for kind, out in zip(("img", "txt"), found, strict=True) for key, x in out.items()}


def test_a_run_in_our_form_is_the_run(run, expected, tmp_path, capsys):
    export.export(str(run), str(tmp_path / "out"), to="safetensors")
    _, parts, variables, step, _ = weights.load(str(tmp_path / "out"))
    chex.assert_trees_all_equal(jax.device_get(variables), jax.device_get(weights.load(str(run))[2]))
    chex.assert_trees_all_equal(encode(parts, variables), expected)
    assert step == 0 and "cluster_logits_img" in expected
    capsys.readouterr()
    # What is evaluated so has the run's numbers.
    suite = f"folder:{run.parent / 'set'}"
    evaluate.main(["--checkpoint", str(tmp_path / "out" / interop.WEIGHTS), "--suite", suite])
    there = json.loads((tmp_path / "out" / f"{interop.WEIGHTS}.evaluation.json").read_text())
    here = json.loads((run / "evaluation.json").read_text())
    assert there["results"][0]["metrics"] == here["results"][0]["metrics"]
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        weights.load(str(tmp_path / "out"), 3)


def test_other_projects_compute_the_embeddings_of_the_run(run, expected, tmp_path, capsys):
    for to, remedy in (("hf", "rotate"), ("open_clip", "lay")):
        export.main(["--checkpoint", str(run), "--to", to, str(tmp_path / to)])
        out = capsys.readouterr().out
        assert "no field for it: clusters_img, clusters_txt\n" in out and f"data.decoding='xclip'; {remedy} " in out
        assert f"{run}, step {STEPS}, as {to}" in out
        _, parts, variables, *_ = weights.load(str(tmp_path / to))
        features = encode(parts, variables)
        assert features.keys() == {"features_img", "embedding_img", "features_txt", "embedding_txt"}
        for key, x in features.items():
            np.testing.assert_allclose(x, expected[key], rtol=0, atol=1e-5, err_msg=key)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(["a cat", "number 3", "x"])
    model = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    with torch.no_grad():
        z_txt = model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(z_txt, expected["embedding_txt"], rtol=0, atol=1e-5)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")(
        ["a cat", "number 3", "x"], padding="max_length", truncation=True, return_tensors="pt")  # fmt: skip
    assert tokens["input_ids"].shape[1] == tiny.LENGTH
    with torch.no_grad():
        z_txt = theirs.text_projection(theirs.text_model(**tokens).pooler_output).numpy()
    z_txt = z_txt / np.linalg.norm(z_txt, axis=1, keepdims=True)
    np.testing.assert_allclose(z_txt, expected["embedding_txt"], atol=1e-5)


def test_prompts_of_own_classes_are_kept(run, tmp_path):
    """So that the export's own labelled images are evaluated as the run's are."""
    config, _, variables, *_ = weights.load(str(run))
    values = schema.to_dict(config)
    values["eval"] |= {"templates": ["a drawing of a {c}"]}
    assert interop.write(jax.device_get(variables), values, str(tmp_path / "out")) == []
    assert profile_of_run(weights.load(str(tmp_path / "out"))[0]).templates == ("a drawing of a {c}",)


def test_the_card_of_a_run(run, tmp_path, monkeypatch):
    export.export(str(run), str(tmp_path / "hf"))
    card = (tmp_path / "hf" / export.CARD).read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["license"], head["tags"]) == ("transformers", "unknown", ["xclip", "xclip_jax"])
    data, results, evaluation, config = (
        json.loads((run / f"{name}.json").read_text()) for name in ("data", "results", "evaluation", "config")
    )
    for part in (
        f"| {data[0]['samples']} | by size |", "| optim.lr | 0.001 |",
        f"| objective.terms.clip | {RECIPES['xclip']['clip']} |",
        f"| data.batch | {tiny.BATCH} |",
        "| step | 2 of 2 |", "| parameters | their moving average |",
        "# xCLIP, ViT of width 32", "Trained on image-text pairs.",
        "| objective.nclip.smoothness | 2.0 |", "| model.cluster_head.clusters | 24 |",
        "not stored, because 'hf' has no field for it: clusters_img, clusters_txt",
        f"commit `{config['environment']['commit']}`", f"jax {config['environment']['versions']['jax']}",
        "The licence of the training data: see its sources", "## Limits",
        f"| {evaluation['results'][0]['value']:.1f} |",
        "One caption of each pair is drawn, from text",
    ):  # fmt: skip
        assert part in card, part
    assert results["results"]
    # The Hub shows what is in its model-index.
    (index,) = head["model-index"]
    shown = {(row["dataset"]["type"], m["type"]): m["value"] for row in index["results"] for m in row["metrics"]}
    (entry,) = [entry for entry in evaluation["results"] if entry["step"] == STEPS]
    assert index["name"] == "xCLIP" and shown == {("folder:set", entry["metric"]): round(entry["value"], 2)}
    assert str(run.parent) not in card and "| `folder:pairs` |" in card and "| `folder:set` |" in card
    # Without the client the card has no such index, and results of the last step are none of an earlier one.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    export.export(str(run), str(tmp_path / "earlier"), step=1)
    card = (tmp_path / "earlier" / export.CARD).read_text()
    assert "| step | 1 of 2 |" in card and "this checkpoint was not evaluated" in card
    plain = yaml.safe_load(card.split("---\n")[1])
    assert plain == {key: value for key, value in head.items() if key != "model-index"}
    # Weights of others: nothing is made up.
    export.export(str(tmp_path / "hf"), str(tmp_path / "oc"), to="open_clip")
    card = (tmp_path / "oc" / export.CARD).read_text()
    assert "## Recipe" not in card and "Converted from `hf`" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "{}", "--to", "gguf", "{}/../x"], "--to is 'gguf'"),
        (["--checkpoint", "{}"], "OUT"),
        (["--checkpoint", "{}", "{}/config.json"], "config.json' is not a folder"),
        (["--checkpoint", "{}", "{}"], "run' has other files, such as"),
    ],
)
def test_bad_input(flags, message, run):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        export.main([flag.format(run) for flag in flags])
